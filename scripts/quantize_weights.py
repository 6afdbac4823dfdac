#!/usr/bin/env python3
"""Quantise a model's weights once, and save them as a checkpoint that others open as well.

    scripts/quantize_weights.py --model Qwen/Qwen2.5-7B-Instruct --method awq --output Qwen2.5-7B-AWQ
    kvtool serve --model Qwen2.5-7B-AWQ

awq is saved as an AWQ checkpoint (gemm), gptq and w4a16 as GPTQ (its first format), w8a8 and fp8 as compressed-tensors.
Embedding and output projection stay as they are, and so do layers that --keep-layers names; config.json lists what has
stayed in the words of each format. Nothing is at --output before all is computed.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from kvtool.chosen_model import choose_model
from kvtool.config import EngineConfig
from kvtool.errors import ConfigError, KVToolError
from kvtool.layers.moe import PackedExperts
from kvtool.layers.quantized import Int4Matrix, Matrix
from kvtool.models import Decoder, ModelConfig
from kvtool.models.quantization import named
from kvtool.models.stored import Kind, StoredQuantization, marker, pieces_of, write_matrix
from kvtool.parallel import ONE_RANK, Shard

KINDS: dict[str, Kind] = {"gptq": "gptq", "awq": "awq", "w4a16": "gptq", "w8a8": "int8", "fp8": "fp8"}
WEIGHTS = "model.safetensors"
COPIED = ("*.json", "*.txt", "*.jinja", "*.model")  # beside the weights: tokenizer, template, generation defaults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a folder, a hub id, or the name of an embedded model")
    parser.add_argument("--method", required=True, choices=KINDS)
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--calibration", metavar="FILE", help="text that gptq, awq and fp8 look at")
    parser.add_argument("--keep-layers", default="", metavar="GLOBS", help="layers that stay in 16 bits")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="to compute in; auto: the checkpoint's on a GPU, else float32")
    args = parser.parse_args()
    keep = tuple(glob.strip() for glob in args.keep_layers.split(",") if glob.strip())
    config = EngineConfig(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        quantization=args.method,
        keep_layers=keep,
        calibration=args.calibration,
    )
    try:
        save(config, args.output)
    except KVToolError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def save(engine: EngineConfig, output: Path) -> None:
    """Write the folder.

    Raises:
        KVToolError: the model cannot be loaded or quantised, or the folder cannot be made.
    """
    if output.exists():
        raise ConfigError(f"--output {output}: exists; give a new folder")
    chosen = choose_model(engine)
    folder, config = chosen.path, chosen.config
    if config.quantization:
        raise ConfigError(f"--model {engine.model}: its weights are quantised already, as {config.quantization.method}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as private:
            made = Path(private) / "made"  # others may read it, too
            made.mkdir()
            for pattern in COPIED:
                for file in folder.glob(pattern):
                    if not file.name.endswith(".safetensors.index.json"):
                        shutil.copy(file, made)
            model = chosen.load(engine, ONE_RANK)
            stored = StoredQuantization(KINDS[engine.quantization], less_one=True)
            tensors = dict(stored_tensors(model, config, stored))
            groups = {m.group_size for m in model.modules() if isinstance(m, Int4Matrix)}
            fields = json.loads((folder / "config.json").read_text())
            fields["quantization_config"] = quantization_config(
                engine.quantization, max(groups, default=0), *layers_of(tensors, stored)
            )
            (made / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
            save_file(tensors, made / WEIGHTS, metadata={"format": "pt"})
            (made / WEIGHTS).chmod((made / "config.json").stat().st_mode)  # safetensors makes it its owner's alone
            made.rename(output)
    except OSError as error:
        raise ConfigError(f"--output {output}: {error.strerror}") from error
    print(f"{output}: {engine.quantization}, {sum(tensor.nbytes for tensor in tensors.values()):,} bytes of weights")


def stored_tensors(model: Decoder, config: ModelConfig, stored: StoredQuantization) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the checkpoint; those that are no matrices of fewer bits in the dtype that they came in."""
    dtype = getattr(torch, config.dtype)
    plain: dict[str, Tensor] = {}
    for name, slot in model.slots():
        into = plain.setdefault(name, torch.empty(slot.shape, dtype=dtype))
        into[tuple(slice(first, first + n) for first, n in zip(slot.start, slot.to.shape, strict=True))] = slot.to
    yield from ((as_stored(name), tensor) for name, tensor in plain.items())
    plan = Decoder(config, 1, dtype=dtype, device=torch.device("meta"))
    for layer in range(config.num_layers):
        rows_of = {name.removesuffix(".weight"): slot.shape[0] for name, slot in plan.slots(f"layers.{layer}.")}
        for matrix, names in matrices_of(model, plan, layer):
            columns, first = Shard.whole(matrix.shape[1]), 0
            for name in dict.fromkeys(names):
                if isinstance(why := pieces_of(stored, rows_of[name], columns.size), str):
                    raise ConfigError(f"{name}: {why}; keep it with --keep-layers")
                rows, first = Shard(matrix.shape[0], first, rows_of[name]), first + rows_of[name]
                for suffix, tensor in write_matrix(stored, matrix.cut(rows, columns)).items():
                    yield as_stored(f"{name}.{suffix}"), tensor.contiguous().cpu()


def matrices_of(model: Decoder, plan: Decoder, layer: int) -> Iterator[tuple[Matrix, list[str]]]:
    """Matrices of fewer bits, and the names of what stands in each, one part behind the other."""
    for path, linear in model.linears(layer).items():
        if isinstance(linear.weight, Matrix):
            yield linear.weight, named(plan, path)
    for path, mixture in model.mixtures(layer).items():
        if isinstance(experts := mixture.experts, PackedExperts):
            names = named(plan, path)
            yield experts.gate_up, [name for i, name in enumerate(names) if i % 3 < 2]
            yield experts.down, names[2::3]


def as_stored(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def layers_of(tensors: Mapping[str, Tensor], stored: StoredQuantization) -> tuple[list[str], list[str]]:
    """Names of the layers whose matrices are stored in fewer bits, and of those whose are not."""
    end, matrices = f".{marker(stored)}", [name for name, tensor in tensors.items() if tensor.ndim == 2]
    quantized = {name.removesuffix(end) for name in tensors if name.endswith(end)}
    plain = {x.removesuffix(".weight") for x in matrices if x.startswith("model.layers.") and x.endswith(".weight")}
    return sorted(quantized), sorted(plain - quantized)


def quantization_config(method: str, group: int, quantized: list[str], plain: list[str]) -> dict[str, Any]:
    """What config.json says of it, in the words of the tools that others read it with.

    Args:
        group: columns to a scale.
        quantized, plain: names of the layers that are and that are not.
    """
    if method in ("gptq", "w4a16"):
        common = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": False, "static_groups": True}
        common |= {"sym": False, "lm_head": False, "checkpoint_format": "gptq", "pack_dtype": "int32"}
        if plain:  # gptqmodel reads the first, optimum the second
            common["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in plain}
            common["modules_in_block_to_quantize"] = [quantized]
        return common
    if method == "awq":
        common = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
        return common | {"modules_to_not_convert": plain or None}
    eight_bits = {"num_bits": 8, "type": "int" if method == "w8a8" else "float", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": eight_bits | {"strategy": "channel", "dynamic": False},
        "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if method == "w8a8" else "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head", *plain],
        "kv_cache_scheme": None,
    }


if __name__ == "__main__":
    main()
