"""Weights from safetensors files, piece by piece, so that no more than the model and one piece are ever in memory."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvtool.errors import CapacityError, ModelError
from kvtool.layers.norm import QKNorm, RMSNorm
from kvtool.models.config import ModelConfig, read_fields, refuse_lfs_pointer
from kvtool.models.decoder import Decoder

INDEX = "model.safetensors.index.json"
PIECE_BYTES = 4 << 20
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `start` is its first byte in the file; `dtype` is safetensors' name."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


def load_model(
    folder: Path,
    config: ModelConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    load_format: Literal["auto", "dummy"] = "auto",
    seed: int = 0,
    max_model_len: int | None = None,
) -> Decoder:
    """The model in this folder, on the device, in the given dtype.

    Weights go shard by shard and piece by piece to where they stay: beyond the model itself, a piece's worth of host
    memory is used.

    Args:
        load_format: "dummy" reads no weights and draws them from `seed`.
        max_model_len: tokens of the longest sequence it will see; None: `config.max_position`. LongRoPE chooses its
            factors by it.

    Raises:
        ModelError: the weights are missing, damaged or not those of `config`.
        CapacityError: the device has no room for them.
    """
    tensors = stored_tensors(folder) if load_format == "auto" else []
    try:
        model = Decoder(config, max_model_len or config.max_position, dtype=dtype, device=device)
    except RuntimeError as error:  # torch's word for a failed allocation
        reason = str(error).partition("\n")[0]
        raise CapacityError(f"{folder}: the model does not fit in the memory of {device}: {reason}") from error
    if load_format == "dummy":
        fill_randomly(model, seed)
    else:
        load_weights(model, tensors)
    return model


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of a checkpoint, in the order of the files' bytes. Reads headers only.

    Raises:
        ModelError: no safetensors, or a file that is missing, truncated, inconsistent or a git-LFS pointer.
    """
    return [tensor for file in _weight_files(folder) for tensor in _tensors_of(file)]


def load_weights(model: Decoder, tensors: list[StoredTensor]) -> None:
    """Fill the model from a checkpoint. All names and shapes are checked before the first weight is read.

    Weights are converted to the model's dtype on the host, a piece at a time, and refused where the result is not
    finite.

    Raises:
        ModelError: a tensor is missing, unexpected, stored twice, of the wrong shape or an unreadable type, or holds
            NaN or infinity.
    """
    matched = _match(model, tensors)
    longest_row = max(slot[0].numel() * STORED_DTYPES[tensor.dtype].itemsize for tensor, slot in matched)
    buffer = bytearray(max(PIECE_BYTES, longest_row))
    for tensor, slot in matched:
        _fill(slot, tensor, buffer)


def fill_randomly(model: Decoder, seed: int) -> None:
    """Random weights with standard deviation 0.02, norms 1. The same seed gives the same weights on the same device."""
    device, dtype = model.embed_tokens.weight.device, model.embed_tokens.weight.dtype
    if device.type == "meta":
        return
    # Drawing billions of numbers takes minutes on CPU. Repeating one block, of a length prime to every row's, takes
    # seconds, and no two rows come out equal.
    generator = torch.Generator(device).manual_seed(seed)
    block = (torch.randn(1_000_003, generator=generator, device=device) * 0.02).to(dtype)
    for parameter in model.parameters():
        memory = parameter if parameter.is_contiguous() else parameter.t()
        for piece in memory.view(-1).split(len(block)):
            piece.copy_(block[: len(piece)])
        block = block.roll(parameter.numel() % len(block))
    for module in model.modules():
        if isinstance(module, (RMSNorm, QKNorm)):
            module.weight.fill_(1.0)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        index = read_fields(folder / INDEX)
        weight_map = index.nested("weight_map")
        names = sorted({str(name) for name in weight_map.values.values()})
        if not names:
            index.refuse("weight_map", "is missing or empty; download the file again")
        for name in names:
            if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
                index.refuse("weight_map", f"names {name!r}; shards must be .safetensors files of the same folder")
            if not (folder / name).exists():
                index.refuse("weight_map", f"names the shard {name}, which is missing; download it")
        return [folder / name for name in names]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    pickled = sorted(file.name for pattern in ("*model*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"{folder / pickled[0]}: pickled weights can run code when they are opened; convert them to safetensors"
        )
    raise ModelError(f"{folder}: no model.safetensors or {INDEX}; --load-format dummy needs no weights")


def _tensors_of(file: Path) -> list[StoredTensor]:
    try:
        with file.open("rb") as stream:
            refuse_lfs_pointer(file, stream.read(64))
            with safe_open(file, "pt"):  # checks that the header is sound and that the tensors fill the file exactly
                pass
            stream.seek(0)
            header_bytes = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(header_bytes))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: is damaged or unreadable ({error}); download it again") from error
    tensors = [
        StoredTensor(name, file, entry["dtype"], tuple(entry["shape"]), 8 + header_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    return sorted(tensors, key=lambda tensor: tensor.start)


def _match(model: Decoder, tensors: list[StoredTensor]) -> list[tuple[StoredTensor, Tensor]]:
    slots, config = dict(model.slots()), model.config
    drafts = tuple(f"layers.{config.num_layers + layer}." for layer in range(config.num_draft_layers))
    matched: dict[str, tuple[StoredTensor, Tensor]] = {}
    for tensor in tensors:
        name = tensor.name.removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in slots):
            continue  # computed, and tied to the embedding
        if name.startswith(drafts):
            continue
        if name not in slots:
            raise ModelError(
                f"{tensor} has no place in the {model.config.model_type} model of config.json; are both of one model?"
            )
        if name in matched:
            raise ModelError(f"{tensor} is also in {matched[name][0].file.name}; download the checkpoint again")
        if tensor.dtype not in STORED_DTYPES:
            raise ModelError(f"{tensor} is stored as {tensor.dtype}; convert it to one of {', '.join(STORED_DTYPES)}")
        if tensor.shape != slots[name].shape:
            raise ModelError(
                f"{tensor} has shape {list(tensor.shape)}, but config.json makes it {list(slots[name].shape)}; "
                "are both of one model?"
            )
        matched[name] = tensor, slots[name]
    missing = [name for name in slots if name not in matched]
    if missing:
        folder = tensors[0].file.parent if tensors else "the checkpoint"
        named = ", ".join(missing[:3]) + " …" * (len(missing) > 3)
        raise ModelError(f"{folder}: {named} is missing from the weights; download them again")
    return list(matched.values())


def _fill(slot: Tensor, tensor: StoredTensor, buffer: bytearray) -> None:
    """Read a tensor into its place, as many rows at a time as the buffer holds."""
    dtype = STORED_DTYPES[tensor.dtype]
    rows = len(buffer) // (slot[0].numel() * dtype.itemsize)
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        for piece in slot.split(rows):
            nbytes = piece.numel() * dtype.itemsize
            count = stream.readinto(memoryview(buffer)[:nbytes])
            assert count == nbytes, "safe_open has checked that the file holds it"
            stored = torch.frombuffer(buffer, dtype=dtype, count=piece.numel()).view(piece.shape)
            values = stored.to(slot.dtype)
            if not _is_finite(values):
                if _is_finite(stored):
                    raise ModelError(f"{tensor} holds values beyond {slot.dtype}; choose another --dtype")
                raise ModelError(f"{tensor} holds NaN or infinity; the checkpoint is damaged, download it again")
            piece.copy_(values)


def _is_finite(values: Tensor) -> bool:
    low, high = values.aminmax()  # one pass, and NaN comes through
    return bool(low.isfinite() and high.isfinite())
