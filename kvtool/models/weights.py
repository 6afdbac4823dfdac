"""Weights from safetensors files, piece by piece, so that no more than the model and one piece are ever in memory."""

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvtool.errors import CapacityError, ModelError
from kvtool.layers.linear import Slot
from kvtool.layers.norm import QKNorm, RMSNorm
from kvtool.models.config import ModelConfig, read_fields, refuse_lfs_pointer
from kvtool.models.decoder import Decoder
from kvtool.parallel import ONE_RANK, Parallel

INDEX = "model.safetensors.index.json"
PIECE_BYTES = 4 << 20
META = torch.device("meta")
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
    parallel: Parallel = ONE_RANK,
) -> Decoder:
    """The model in this folder, or a rank's part of it, on the device, in the given dtype.

    Weights go shard by shard and piece by piece to where they stay: beyond the model itself, a piece's worth of host
    memory is used.

    Args:
        load_format: "dummy" reads no weights and draws them from `seed`.
        max_model_len: tokens of the longest sequence it will see; None: `config.max_position`. LongRoPE chooses its
            factors by it.
        parallel: what the rank holds; nothing else is read.

    Raises:
        ModelError: the weights are missing, damaged or not those of `config`.
        CapacityError: the device has no room for them.
    """
    tensors = stored_tensors(folder) if load_format == "auto" else []
    try:
        model = Decoder(config, max_model_len or config.max_position, dtype=dtype, device=device, parallel=parallel)
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
    longest_row = max(math.prod(tensor.shape[1:]) * STORED_DTYPES[tensor.dtype].itemsize for tensor, _ in matched)
    buffer = bytearray(max(PIECE_BYTES, longest_row))
    for tensor, slot in matched:
        _fill(slot, tensor, buffer)


def weight_bytes(model: Decoder) -> int:
    """What the model takes where it is, the table of its rotations included."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def fill_randomly(model: Decoder, seed: int) -> None:
    """Random weights with standard deviation 0.02, norms 1. The same seed gives the same weights on the same device, of
    which each rank has its part."""
    example = next(model.parameters())
    if example.device.type == "meta":
        return
    # Drawing billions of numbers takes minutes on CPU. Repeating one block, of a length prime to every row's, takes
    # seconds, and no two rows come out equal.
    generator, length = torch.Generator(example.device).manual_seed(seed), 1_000_003
    block = (torch.randn(length, generator=generator, device=example.device) * 0.02).to(example.dtype)
    block = torch.cat([block, block])
    for name, slot in model.slots():
        width, columns = math.prod(slot.shape[1:]), slice(sum(slot.start[1:]), None)
        place = zlib.crc32(name.encode()) + slot.start[0] * width
        for rows in slot.to.split(max(1, length // width)):
            whole = block[place % length :][: len(rows) * width].view(len(rows), *slot.shape[1:])
            rows.copy_(whole[:, columns][:, : rows.shape[1]] if rows.ndim == 2 else whole)
            place += whole.numel()
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


def _match(model: Decoder, tensors: list[StoredTensor]) -> list[tuple[StoredTensor, Slot]]:
    """Where each tensor, or a piece of it, goes; pieces in the order of their bytes."""
    known = _slots(model if model.is_whole else Decoder(model.config, 1, dtype=torch.bfloat16, device=META))
    slots = _slots(model)
    matched: dict[str, StoredTensor] = {}
    drafts = tuple(f"layers.{model.config.num_layers + i}." for i in range(model.config.num_draft_layers))
    for tensor in tensors:
        name = tensor.name.removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in known):
            continue  # computed, and tied to the embedding
        if name.startswith(drafts):
            continue
        if name not in known:
            raise ModelError(
                f"{tensor} has no place in the {model.config.model_type} model of config.json; are both of one model?"
            )
        if name in matched:
            raise ModelError(f"{tensor} is also in {matched[name].file.name}; download the checkpoint again")
        if tensor.dtype not in STORED_DTYPES:
            raise ModelError(f"{tensor} is stored as {tensor.dtype}; convert it to one of {', '.join(STORED_DTYPES)}")
        shape = known[name][0].shape
        if tensor.shape != shape:
            raise ModelError(
                f"{tensor} has shape {list(tensor.shape)}, but config.json makes it {list(shape)}; "
                "are both of one model?"
            )
        matched[name] = tensor
    missing = [name for name in known if name not in matched]
    if missing:
        folder = tensors[0].file.parent if tensors else "the checkpoint"
        named = ", ".join(missing[:3]) + " …" * (len(missing) > 3)
        raise ModelError(f"{folder}: {named} is missing from the weights; download them again")
    return [(tensor, slot) for name, tensor in matched.items() for slot in slots.get(name, ())]


def _slots(model: Decoder) -> dict[str, list[Slot]]:
    slots: dict[str, list[Slot]] = {}
    for name, slot in model.slots():
        slots.setdefault(name, []).append(slot)
    return slots


def _fill(slot: Slot, tensor: StoredTensor, buffer: bytearray) -> None:
    """Read a tensor, or a piece of it, into its place, as many rows at a time as the buffer holds."""
    dtype = STORED_DTYPES[tensor.dtype]
    row_bytes, read_bytes = (math.prod(shape[1:]) * dtype.itemsize for shape in (tensor.shape, slot.to.shape))
    place = tensor.start + slot.start[0] * row_bytes + sum(slot.start[1:]) * dtype.itemsize
    if slot.to.numel() == 0:
        return
    with tensor.file.open("rb", buffering=0) as stream:
        for piece in slot.to.split(len(buffer) // read_bytes):
            view = memoryview(buffer)[: len(piece) * read_bytes]
            at_once = len(view) if read_bytes == row_bytes else read_bytes  # of whole rows, or of a row's piece
            for start in range(0, len(view), at_once):
                stream.seek(place)
                count = stream.readinto(view[start:][:at_once])
                assert count == at_once, "safe_open has checked that the file holds it"
                place += at_once // read_bytes * row_bytes
            stored = torch.frombuffer(buffer, dtype=dtype, count=piece.numel()).view(piece.shape)
            values = stored.to(slot.to.dtype)
            if not _is_finite(values):
                if _is_finite(stored):
                    raise ModelError(f"{tensor} holds values beyond {slot.to.dtype}; choose another --dtype")
                raise ModelError(f"{tensor} holds NaN or infinity; the checkpoint is damaged, download it again")
            piece.copy_(values)


def _is_finite(values: Tensor) -> bool:
    low, high = values.aminmax()  # one pass, and NaN comes through
    return bool(low.isfinite() and high.isfinite())
