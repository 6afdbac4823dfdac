"""Which experts tokens want: drawn evenly, drawn by Zipf's law, or as a model was seen to choose."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from kvtool.errors import ConfigError
from kvtool.expert_parallel.layer import LayerShape

MAX_FILE_BYTES = 1 << 28


@dataclass(frozen=True)
class Routing:
    """What a router says of tokens: `ids` [T, top_k] int64, all of a token different, and `weights` [T, top_k] fp32
    that sum to 1."""

    ids: Tensor
    weights: Tensor


def make_routing(kind: str, num_tokens: int, shape: LayerShape, seed: int, draw: int = 0) -> Routing:
    """Args:
        kind: "uniform", "zipf" (of exponent 1, or `zipf:S`), or a file of what was recorded.
        draw: which tokens; those of another draw want the same experts as often.

    Raises:
        ConfigError: a kind that is none of these, or a file that does not fit the layer.
    """
    generator = torch.Generator().manual_seed(seed)
    name, _, exponent = kind.partition(":")
    if name in ("uniform", "zipf"):
        try:
            s = float(exponent or 1) if name == "zipf" else 0.0
        except ValueError:
            s = -1.0
        if not 0 <= s <= 10 or (name == "uniform" and exponent):
            raise ConfigError(f"--routing {kind}: write uniform, zipf, zipf:S with an S from 0 to 10, or a file's name")
        chances = torch.arange(1, shape.num_experts + 1, dtype=torch.float64).pow(-s)
        shuffled = chances[torch.randperm(shape.num_experts, generator=generator)]
        generator.manual_seed(seed + 1 + draw)
        ids = torch.multinomial(shuffled.expand(num_tokens, -1), shape.top_k, generator=generator)
    else:
        recorded = read_routing(Path(kind), shape)
        ids = recorded[torch.arange(draw * num_tokens, (draw + 1) * num_tokens) % len(recorded)]
    weights = torch.rand(num_tokens, shape.top_k, generator=generator).softmax(-1)
    return Routing(ids, weights)


def read_routing(path: Path, shape: LayerShape) -> Tensor:
    """Expert ids [T, top_k] from lines of JSON, the list of one token's experts in each.

    Raises:
        ConfigError: it cannot be read, or does not fit the layer.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"--routing {path}: is larger than {MAX_FILE_BYTES >> 20} MiB; record fewer tokens")
        lines = msgspec.json.Decoder(list[int]).decode_lines(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"--routing {path}: {error.strerror}; write uniform, zipf or a file's name") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"--routing {path}: holds no lists of expert ids, one a line ({error})") from error
    for number, ids in enumerate(lines, 1):
        if len(ids) != shape.top_k or len(set(ids)) != len(ids) or not all(0 <= i < shape.num_experts for i in ids):
            wanted = f"{shape.top_k} different ids from 0 to {shape.num_experts - 1}"
            raise ConfigError(f"--routing {path}: line {number}: must be {wanted}")
    if not lines:
        raise ConfigError(f"--routing {path}: is empty")
    return torch.tensor(lines)
