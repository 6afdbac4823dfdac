"""Weights from safetensors files, piece by piece, so that no more than the model and one piece are ever in memory."""

import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvtool.errors import CapacityError, ModelError, UnsupportedError
from kvtool.layers.linear import RowLinear, Slot
from kvtool.layers.moe import PackedExperts
from kvtool.layers.norm import QKNorm, RMSNorm
from kvtool.layers.quantized import Dense, EightBitMatrix, Int4Matrix, Matrix, side_by_side
from kvtool.models.config import ModelConfig
from kvtool.models.decoder import Decoder
from kvtool.models.fields import read_fields, refuse_lfs_pointer
from kvtool.models.quantization import Conversion, Quantization, common_group
from kvtool.models.stored import StoredQuantization, marker, pieces_of, read_matrix
from kvtool.parallel import ONE_RANK, Parallel, Shard

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
    quantization: Quantization | None = None,
) -> Decoder:
    """The model in this folder, or a rank's part of it, on the device, in the given dtype.

    Weights go shard by shard and piece by piece to where they stay: beyond the model itself, a piece's worth of host
    memory is used. Where layers hold quantised weights, one layer at a time has room for 16-bit ones.

    Args:
        load_format: "dummy" reads no weights and draws them from `seed`.
        max_model_len: tokens of the longest sequence it will see; None: `config.max_position`. LongRoPE chooses its
            factors by it.
        parallel: what the rank holds; nothing else is read but whole matrices of quantised weights, to be cut.
        quantization: what becomes of a checkpoint whose weights are not quantised yet.

    Raises:
        ModelError: the weights are missing, damaged or not those of `config`.
        ConfigError: `quantization` keeps a layer that the model has not.
        CapacityError: the device has no room for them.
    """
    tensors = stored_tensors(folder) if load_format == "auto" else []
    if load_format == "dummy" and config.quantization:
        quantization = Quantization(config.quantization.rounding)
    whole = quantization is None and config.quantization is None
    with _within_memory(folder, device):
        longest = max_model_len or config.max_position
        model = Decoder(config, longest, dtype=dtype, device=device, parallel=parallel, has_layers=whole)
    plan = model if whole and model.is_whole else Decoder(config, 1, dtype=torch.bfloat16, device=META)
    if quantization:
        quantization.check(plan)
    weights = RandomWeights(seed) if load_format == "dummy" else Checkpoint(plan, tensors)
    weights.fill(model)
    if not whole:
        with _within_memory(folder, device, torch.OutOfMemoryError):
            conversion = Conversion(quantization, model, common_group(plan)) if quantization else None
            _add_layers(model, weights, parallel.stage.layers(config.num_layers), conversion)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what is measured next is without what only loading took
    return model


def _add_layers(
    model: Decoder, weights: "RandomWeights | Checkpoint", layers: Iterable[int], conversion: Conversion | None
) -> None:
    """Make, fill and quantise one layer after the other."""
    for layer in layers:
        model.add_layer(layer)
        if conversion:
            conversion.prepare(layer)
        elif isinstance(weights, Checkpoint):
            weights.fill_quantized(model, layer)
        weights.fill(model, f"layers.{layer}.")
        if conversion:
            conversion(layer)


@contextmanager
def _within_memory(folder: Path, device: torch.device, failure: type[RuntimeError] = RuntimeError) -> Iterator[None]:
    """Raises CapacityError where the device has too little memory for what happens inside.

    Args:
        failure: torch's word for that; a CPU has none of its own.
    """
    try:
        yield
    except failure as error:
        reason = str(error).partition("\n")[0]
        raise CapacityError(f"{folder}: the model does not fit in the memory of {device}: {reason}") from error


def stored_tensors(folder: Path) -> list[StoredTensor]:
    """Every tensor of a checkpoint, in the order of the files' bytes. Reads headers only.

    Raises:
        ModelError: no safetensors, or a file that is missing, truncated, inconsistent or a git-LFS pointer.
    """
    return [tensor for file in _weight_files(folder) for tensor in _tensors_of(file)]


class Checkpoint:
    """Weights in files, of which all names and shapes are checked before the first one is read.

    They are converted to the model's dtype on the host, a piece at a time, and refused where the result is not finite.

    Args:
        plan: all of the model, perhaps on no device.

    Raises:
        ModelError: a tensor is missing, unexpected, stored twice, of the wrong shape or an unreadable type.
    """

    def __init__(self, plan: Decoder, tensors: list[StoredTensor]) -> None:
        known = {name: slots[0].shape for name, slots in _slots(plan).items()}
        self.stored = plan.config.quantization
        self.quantized: dict[str, dict[str, StoredTensor]] = {}
        if self.stored:
            self.quantized = _quantized(self.stored, known, tensors)
            taken = {tensor.name for pieces in self.quantized.values() for tensor in pieces.values()}
            known = {name: shape for name, shape in known.items() if name.removesuffix(".weight") not in self.quantized}
            tensors = [tensor for tensor in tensors if tensor.name not in taken]
        self.plain = _match(plan.config, known, tensors)
        rows = (math.prod(tensor.shape[1:]) * STORED_DTYPES[tensor.dtype].itemsize for tensor in self.plain.values())
        self.buffer = bytearray(max(PIECE_BYTES, *rows))

    def fill(self, model: Decoder, within: str = "") -> None:
        """Fill what the model has under paths that begin with `within`, in the order of the files' bytes.

        Raises:
            ModelError: a tensor holds NaN or infinity, or what the model's dtype cannot hold.
        """
        slots = _slots(model, within)
        for name, tensor in self.plain.items():
            for slot in slots.get(name, ()):
                _fill(slot, tensor, self.buffer)

    def fill_quantized(self, model: Decoder, layer: int) -> None:
        """Give the products of a layer the matrices that are stored for them; what needs 16-bit weights gets what they
        stand for.

        Raises:
            ModelError: numbers of theirs mean nothing.
            UnsupportedError: they cannot be shared out among the ranks.
        """
        for path, linear in model.linears(layer).items():
            if matrices := self._matrices(model, path):
                if isinstance(linear, RowLinear) and not all(each.cuts(linear.inputs) for each in matrices.values()):
                    linear.share_outputs()
                linear.replace(side_by_side(self._pieces(model, path, matrices)))
        for path, mixture in model.mixtures(layer).items():
            if matrices := self._matrices(model, path):
                pieces = self._pieces(model, path, matrices)
                gates, ups, downs = (pieces[part::3] for part in range(3))
                gates_and_ups = [piece for pair in zip(gates, ups, strict=True) for piece in pair]
                mixture.experts = PackedExperts(
                    mixture.experts.experts, side_by_side(gates_and_ups), side_by_side(downs)
                )
        for name, slot in model.slots(f"layers.{layer}."):
            if (part := name.removesuffix(".weight")) in self.quantized:
                matrix = self._read(part, model.dtype, slot.to.device)
                slot.to.copy_(_cut(matrix, slot, part).dense(slot.to.dtype))

    def _matrices(self, model: Decoder, path: str) -> dict[str, Int4Matrix | EightBitMatrix]:
        """Those that are stored for a module of the model, by their names."""
        devices = {name.removesuffix(".weight"): slot.to.device for name, slot in model.slots(path)}
        return {
            part: self._read(part, model.dtype, device) for part, device in devices.items() if part in self.quantized
        }

    def _pieces(self, model: Decoder, path: str, matrices: Mapping[str, Matrix]) -> list[Matrix]:
        """A rank's pieces of a module's weights, in order, also of those that are not among `matrices`."""
        pieces: list[Matrix] = []
        for name, slot in model.slots(path):
            if (part := name.removesuffix(".weight")) in matrices:
                pieces.append(_cut(matrices[part], slot, part))
            elif part != name:
                _fill(slot, self.plain[name], self.buffer)
                pieces.append(Dense(slot.to.clone()))
        return pieces

    def _read(self, part: str, dtype: torch.dtype, device: torch.device) -> Int4Matrix | EightBitMatrix:
        assert self.stored is not None
        tensors = {}
        for suffix, tensor in self.quantized[part].items():
            with safe_open(tensor.file, "pt") as file:
                tensors[suffix] = file.get_tensor(tensor.name).to(device)
        try:
            return read_matrix(self.stored, tensors, dtype)
        except ValueError as error:
            raise ModelError(f"{tensor.file}: {part}: {error}; the checkpoint is damaged, download it again") from None


def _cut(matrix: Matrix, slot: Slot, name: str) -> Matrix:
    rows, columns = map(Shard, slot.shape, slot.start, slot.to.shape)
    if not matrix.cuts(columns):
        raise UnsupportedError(f"{name}: ranks would cut its groups of quantised columns; use fewer, or --ep")
    return matrix.cut(rows, columns)


def weight_bytes(model: Decoder) -> int:
    """What the model takes where it is, the table of its rotations included."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


class RandomWeights:
    """Random weights with standard deviation 0.02, norms 1. The same seed gives the same weights on the same device, of
    which each rank has its part."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fill(self, model: Decoder, within: str = "") -> None:
        """Fill what the model has under paths that begin with `within`."""
        device = model.rotary.table.device
        if device.type == "meta":
            return
        # Drawing billions of numbers takes minutes on CPU. Repeating one block, of a length prime to every row's, takes
        # seconds, and no two rows come out equal.
        generator, length = torch.Generator(device).manual_seed(self.seed), 1_000_003
        block = (torch.randn(length, generator=generator, device=device) * 0.02).to(model.dtype)
        block = torch.cat([block, block])
        for name, slot in model.slots(within):
            width, columns = math.prod(slot.shape[1:]), slice(sum(slot.start[1:]), None)
            place = zlib.crc32(name.encode()) + slot.start[0] * width
            for rows in slot.to.split(max(1, length // width)):
                whole = block[place % length :][: len(rows) * width].view(len(rows), *slot.shape[1:])
                rows.copy_(whole[:, columns][:, : rows.shape[1]] if rows.ndim == 2 else whole)
                place += whole.numel()
        for path, module in model.named_modules():
            if isinstance(module, (RMSNorm, QKNorm)) and path.startswith(within):
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


def _quantized(
    stored: StoredQuantization, known: Mapping[str, tuple[int, ...]], tensors: Iterable[StoredTensor]
) -> dict[str, dict[str, StoredTensor]]:
    """The tensors of each quantised matrix of the layers, by the last part of their names."""
    by_name: dict[str, StoredTensor] = {}
    for tensor in tensors:
        if (first := by_name.setdefault(tensor.name.removeprefix("model."), tensor)) is not tensor:
            raise ModelError(f"{tensor} is also in {first.file.name}; download the checkpoint again")
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, shape in known.items():
        part = name.removesuffix(".weight")
        marked = by_name.get(f"{part}.{marker(stored)}")
        if marked is None or not name.startswith("layers.") or len(shape) != 2:
            continue
        pieces = pieces_of(stored, *shape)
        if isinstance(pieces, str):
            raise ModelError(f"{marked}: {pieces}; is quantization_config of config.json that of these weights?")
        found[part] = {}
        for suffix, piece in pieces.items():
            beside = by_name.get(f"{part}.{suffix}")
            if beside is None:
                if piece.optional:
                    continue
                raise ModelError(f"{marked} has no {part}.{suffix} beside it; download the checkpoint again")
            if beside.dtype not in piece.dtypes or beside.shape not in piece.shapes:
                wanted = f"{' or '.join(piece.dtypes)} {list(piece.shapes[0])}"
                raise ModelError(
                    f"{beside} is {beside.dtype} {list(beside.shape)}, but config.json makes it {wanted}; "
                    "are both of one model?"
                )
            found[part][suffix] = beside
    if not found:
        raise ModelError(
            f"config.json: quantization_config says that weights are quantised, but no layer has a {marker(stored)}"
        )
    return found


def _match(
    config: ModelConfig, known: Mapping[str, tuple[int, ...]], tensors: list[StoredTensor]
) -> dict[str, StoredTensor]:
    """The tensor of each name of the model, in the order of their bytes."""
    matched: dict[str, StoredTensor] = {}
    drafts = tuple(f"layers.{config.num_layers + i}." for i in range(config.num_draft_layers))
    for tensor in tensors:
        name = tensor.name.removeprefix("model.")
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in known):
            continue  # computed, and tied to the embedding
        if name.startswith(drafts):
            continue
        if name not in known:
            raise ModelError(
                f"{tensor} has no place in the {config.model_type} model of config.json; are both of one model?"
            )
        if name in matched:
            raise ModelError(f"{tensor} is also in {matched[name].file.name}; download the checkpoint again")
        if tensor.dtype not in STORED_DTYPES:
            mark = config.quantization and f"{name.removesuffix('.weight')}.{marker(config.quantization)}"
            lacks = f" and has no {mark} beside it; download the checkpoint again"
            remedy = lacks if mark else f"; convert it to one of {', '.join(STORED_DTYPES)}"
            raise ModelError(f"{tensor} is stored as {tensor.dtype}{remedy}")
        if tensor.shape != known[name]:
            raise ModelError(
                f"{tensor} has shape {list(tensor.shape)}, but config.json makes it {list(known[name])}; "
                "are both of one model?"
            )
        matched[name] = tensor
    missing = [name for name in known if name not in matched]
    if missing:
        folder = tensors[0].file.parent if tensors else "the checkpoint"
        named = ", ".join(missing[:3]) + " …" * (len(missing) > 3)
        raise ModelError(f"{folder}: {named} is missing from the weights; download them again")
    return matched


def _slots(model: Decoder, within: str = "") -> dict[str, list[Slot]]:
    slots: dict[str, list[Slot]] = {}
    for name, slot in model.slots(within):
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
