"""The packed cache of one sequence as a safetensors file, and back bit for bit."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvtool.errors import ConfigError
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.codecs import check_fits
from kvtool.kv.format import KVFormat, LayerFormat, StreamFormat
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore
from kvtool.models import Decoder
from kvtool.paged_model import PagedModel

METADATA = "kvtool.cache"


@dataclass(frozen=True)
class CachedPrompt:
    """A store that holds one sequence and nothing else: its blocks in order, its tail in slot 0.

    Attributes:
        token_ids: of the sequence.
    """

    store: KVStore
    token_ids: tuple[int, ...]

    @property
    def first_near(self) -> int:
        """First position that stands in the tail."""
        return self.store.format.packed_tokens(len(self.token_ids))

    @property
    def tail_rows(self) -> Tensor:
        """[n] int64, where the tail's tokens stand in its slot."""
        positions = torch.arange(self.first_near, len(self.token_ids), device=self.store.tails.device)
        return positions % self.store.format.tail_tokens

    def equals(self, other: "CachedPrompt") -> bool:
        """The same tokens, the same format and the same bytes."""
        if (self.token_ids, self.store.layout) != (other.token_ids, other.store.layout):
            return False
        pairs = zip(self.tensors().values(), other.tensors().values(), strict=True)
        return all(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) for ours, theirs in pairs)

    def tensors(self) -> dict[str, Tensor]:
        """`layers.0.key.codes` and its like ("scale", "zero"), [blocks, heads, rows, n]; "tail", [heads, tokens, D]."""
        named: dict[str, Tensor] = {}
        for index, layer in enumerate(self.store.layers):
            for name, stream in (("key", layer.key), ("value", layer.value)):
                named |= {f"layers.{index}.{name}.{field}": array for field, array in stream.arrays.items()}
                if self.first_near < len(self.token_ids):
                    named[f"layers.{index}.{name}.tail"] = stream.tail[0][:, self.tail_rows]
        return {name: tensor.cpu().contiguous() for name, tensor in named.items()}


@torch.inference_mode()
def cache_prompt(model: Decoder, layout: KVLayout, token_ids: list[int], dtype: torch.dtype) -> CachedPrompt:
    """Run `token_ids` through the model, and keep the cache that this leaves.

    Raises:
        UnsupportedError: the format cannot hold what the model makes of them.
    """
    device = next(model.parameters()).device
    num_blocks = layout.format.num_blocks(len(token_ids))
    store = KVStore(layout, num_blocks, 1, dtype, device)
    paged = PagedModel(model, store)
    batch = KVBatch.build(layout.format, [Span(0, len(token_ids), range(num_blocks), 0)], device)
    paged(torch.tensor(token_ids, device=device), batch)
    paged.seal(batch)
    check_fits(not store.take_fault().item())
    return CachedPrompt(store, tuple(token_ids))


def write_cache(path: Path, cached: CachedPrompt) -> None:
    """Write a file that any reader of safetensors opens; its metadata says how the bytes are to be understood.

    Raises:
        ConfigError: it cannot be written.
    """
    about = {
        "format": asdict(cached.store.format),
        "spec": asdict(cached.store.layout.spec),
        "dtype": str(cached.store.dtype).removeprefix("torch."),
        "token_ids": cached.token_ids,
    }
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(save(cached.tensors(), {METADATA: json.dumps(about)}))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"--dump {path}: cannot be written ({error.strerror}); choose another file") from error


def read_cache(path: Path) -> CachedPrompt:
    """What `write_cache` wrote, in a store on the CPU.

    Raises:
        ConfigError: the file is not whole, or none of ours.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        layout, token_ids = _layout(about), tuple(map(int, about["token_ids"]))
        store = KVStore(layout, layout.format.num_blocks(len(token_ids)), 1, getattr(torch, about["dtype"]))
        cached = CachedPrompt(store, token_ids)
        _fill(cached, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{path}: holds no cache that kvtool wrote ({error})") from error
    return cached


def _layout(about: Any) -> KVLayout:
    fmt, spec = about["format"], about["spec"]
    layers = (LayerFormat(StreamFormat(**layer["key"]), StreamFormat(**layer["value"])) for layer in fmt["layers"])
    streams = StreamSpec(**spec["key"]), StreamSpec(**spec["value"])
    return KVLayout(
        KVSpec(spec["num_layers"], *streams, spec["element_size"], spec["latent"]),
        KVFormat(tuple(layers), fmt["block_size"], fmt["residual"]),
    )


def _fill(cached: CachedPrompt, tensors: dict[str, Tensor]) -> None:
    expected = cached.tensors()
    if tensors.keys() != expected.keys():
        raise ValueError(f"{sorted(tensors.keys() ^ expected.keys())[0]} is missing or too many")
    for index, layer in enumerate(cached.store.layers):
        for name, stream in (("key", layer.key), ("value", layer.value)):
            for field, array in stream.arrays.items():
                _copy(array, tensors[f"layers.{index}.{name}.{field}"])
            tail = tensors.get(f"layers.{index}.{name}.tail")
            if tail is not None:
                stream.tail[0][:, cached.tail_rows] = tail


def _copy(array: Tensor, stored: Tensor) -> None:
    if array.shape != stored.shape or array.dtype != stored.dtype:
        raise ValueError(f"{list(stored.shape)} {stored.dtype} stands where {list(array.shape)} {array.dtype} belongs")
    array.copy_(stored)
