"""The bytes of a cache as they are allocated: stores filled with tokens, beside what was predicted."""

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvtool.config import KVOptions
from kvtool.errors import CapacityError, UnsupportedError
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.layout import KVLayout
from kvtool.kv.store import KVStore
from kvtool.sizing.shapes import ModelShape
from kvtool.sizing.theory import Scheme, kv_format

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class MeasuredSize:
    """A store with sequences of equal length in it, all in bytes.

    Attributes:
        tokens: a number: of all sequences together.
        packed: what the tokens in blocks take, a token at a time.
        unused_rows: of blocks, behind the last token of each sequence.
        tails: of the sequences' newest tokens.
        predicted: the sum of these three, which is `KVLayout.bytes_for`.
        allocated: by how much that grew which torch's allocator holds.
        rounding: of the allocator, and what it needs for itself: allocated - predicted.
    """

    tokens: int
    packed: int
    unused_rows: int
    tails: int
    predicted: int
    allocated: int
    rounding: int


def measured_size(
    shape: ModelShape, scheme: Scheme, options: KVOptions, batch: int, context: int, device: torch.device
) -> MeasuredSize:
    """Fill a store with `batch` sequences of `context` tokens. All layers keep all of them, whatever their windows, as
    those of kvtool's engine do.

    Raises:
        CapacityError: the device has not so much memory.
        UnsupportedError: an allocator that cannot be asked.
    """
    num_layers = len(shape.windows)
    layout = KVLayout(scheme.spec(num_layers), kv_format(options, scheme, num_layers))
    fmt = layout.format
    gc.collect()
    held = allocator(device)
    before = held()
    try:
        store = KVStore(layout, batch * fmt.num_blocks(context), batch, DTYPE, device)
        fill(store, batch, context)
        allocated = held() - before
    except (torch.OutOfMemoryError, RuntimeError) as error:
        size = f"{layout.bytes_for([context] * batch) / 2**30:,.1f} GiB for {shape.name} as {scheme.name}"
        raise CapacityError(f"{device} has no {size}; lower --batch or --context") from error
    predicted, blocks = layout.bytes_for([context] * batch), batch * fmt.num_blocks(context) * layout.block_bytes
    packed = batch * fmt.packed_tokens(context) * layout.block_bytes // fmt.block_size
    return MeasuredSize(
        tokens=batch * context,
        packed=packed,
        unused_rows=blocks - packed,
        tails=batch * layout.tail_bytes,
        predicted=predicted,
        allocated=allocated,
        rounding=allocated - predicted,
    )


def fill(store: KVStore, batch: int, context: int) -> None:
    """Write `batch` sequences of `context` tokens as prompts, one behind the other, into all layers."""
    per_seq, device = store.format.num_blocks(context), store.blocks.device
    for seq in range(batch):
        blocks = range(seq * per_seq, (seq + 1) * per_seq)
        kv_batch = KVBatch.build(store.format, [Span(0, context, blocks, seq)], device)
        for layer in store.layers:
            key, value = (
                torch.randn(context, stream.heads, stream.dim, dtype=DTYPE, device=device)
                for stream in (store.layout.spec.key, store.layout.spec.value)
            )
            layer.write(key, value, kv_batch)


def allocator(device: torch.device) -> Callable[[], int]:
    """What tells how many bytes the allocator behind torch's tensors on `device` holds: torch's own on a GPU, malloc's
    on a CPU.

    Raises:
        UnsupportedError: a C library whose malloc does not tell.
    """
    if device.type == "cuda":
        return lambda: torch.cuda.memory_allocated(device)
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError) as error:
        raise UnsupportedError("--section measured: on a CPU this needs glibc 2.33, whose malloc counts") from error
    mallinfo2.restype = MallInfo
    return lambda: (info := mallinfo2()).uordblks + info.hblkhd


class MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc's malloc.h."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
