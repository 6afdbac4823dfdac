"""Decode steps as CUDA graphs: one launch for a whole step, whatever the host is doing."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.format import KVFormat
from kvtool.request import ScheduledSpan

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)

# (ids [n], batch) → logits [n, vocab_size]
Step = Callable[[Tensor, KVBatch], Tensor]


@dataclass(frozen=True)
class Captured:
    """A graph, what it reads, and what it writes: logits [size, vocab_size], and the largest one's ids, -1 where they
    are not finite."""

    graph: torch.cuda.CUDAGraph
    batch: KVBatch
    logits: Tensor
    greedy: Tensor


class DecodeGraphs:
    """Steps that compute one token for each of up to `sizes[-1]` sequences.

    A step of n runs as the next larger size that was captured; what is too much repeats the last sequence, which then
    computes and writes the same bytes twice. All inputs go to the device in one transfer, but for the block table: it
    stays there by slot, a row is sent when its sequence is new, and after that only ever grows by its last block.

    Args:
        step: the model on a batch; what it runs is captured, so it must not look at any value.
        fmt: of the KV store.
        newest: [max_num_seqs], ids that were sampled last, by slot.
        max_blocks: of the longest sequence.
    """

    def __init__(self, step: Step, fmt: KVFormat, newest: Tensor, max_blocks: int) -> None:
        self._step, self._format, self._newest = step, fmt, newest
        device, most = newest.device, len(newest)
        self.sizes = sorted({*(size for size in SIZES if size < most), min(most, SIZES[-1])})
        self._table = torch.zeros(most, max_blocks, dtype=torch.int64, device=device)
        self._lengths = [-1] * most  # blocks that each row of the table holds; -1: of a sequence that is gone
        # By size. Rows: slot, position, first position read at full precision, row and block written to; the newest
        # block's place in the table, and the block.
        self._inputs = {size: torch.zeros(7, size, dtype=torch.int64, device=device) for size in self.sizes}
        self._staged = {size: torch.zeros(7, size, dtype=torch.int64).pin_memory() for size in self.sizes}
        self._sent = torch.cuda.Event()
        self._captured: dict[int, Captured] = {}
        self._logits = torch.empty(0, device=device)  # of all sizes; the largest makes it

    def capture(self, sizes: Sequence[int]) -> None:
        """Capture some of `sizes`, the largest first, so that the smaller ones find its memory."""
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        for size in sorted(sizes, reverse=True):
            with torch.cuda.stream(stream):
                self._run(size)  # lazily loaded kernels must be there before
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                outputs = self._run(size)
            self._captured[size] = Captured(graph, *outputs)

    def forget(self, slots: Iterable[int]) -> None:
        """The sequences in these slots are new, or have moved."""
        for slot in slots:
            self._lengths[slot] = -1

    def holds(self, spans: Sequence[ScheduledSpan]) -> bool:
        """These are decodes, and not too many."""
        return len(spans) <= self.sizes[-1] and not any(span.token_ids for span in spans)

    def launch(self, spans: Sequence[ScheduledSpan]) -> tuple[KVBatch, Tensor, Tensor]:
        """What ran, logits [n, vocab_size] and greedy ids [n]; valid until the next launch."""
        self._send_new_rows(spans)
        size = next(size for size in self.sizes if size >= len(spans))
        columns = [self._inputs_of(span) for span in spans]
        self._sent.synchronize()  # what is staged has been read
        self._staged[size].copy_(torch.tensor(columns + columns[-1:] * (size - len(spans))).T)
        self._inputs[size].copy_(self._staged[size], non_blocking=True)
        self._sent.record()
        captured = self._captured[size]
        captured.graph.replay()
        n = len(spans)
        ran = replace(captured.batch, spans=tuple(map(as_kv_span, spans)), num_decodes=n)
        return ran, captured.logits[:n], captured.greedy[:n]

    def _send_new_rows(self, spans: Sequence[ScheduledSpan]) -> None:
        """Send the blocks of sequences of which more than the newest block is unknown."""
        for span in spans:
            known, length = self._lengths[span.slot], len(span.blocks)
            if not known <= length <= known + 1 or known < 0:
                self._table[span.slot, :length] = torch.tensor(span.blocks, device=self._table.device)
            self._lengths[span.slot] = length

    def _inputs_of(self, span: ScheduledSpan) -> tuple[int, ...]:
        fmt, position, blocks = self._format, span.start, span.blocks
        size = fmt.block_size if fmt.packs_on_write else fmt.tail_tokens
        written = blocks[position // size] if fmt.packs_on_write else 0
        newest = (len(blocks) - 1, blocks[-1]) if blocks else (0, 0)
        return (span.slot, position, fmt.visible(position), position % size, written, *newest)

    def _run(self, size: int) -> tuple[KVBatch, Tensor, Tensor]:
        slots, positions, visible, rows, written, column, newest = self._inputs[size]
        self._table.index_put_((slots, column), newest)
        batch = KVBatch(
            format=self._format,
            spans=(),
            num_decodes=size,
            positions=positions,
            block_table=self._table[slots],
            rows=rows,
            token_blocks=written,
            tail_slots=slots,
            visible=visible,
        )
        computed = self._step(self._newest[slots], batch)
        if len(self._logits) < size:
            self._logits = torch.empty_like(computed)
        logits = self._logits[:size].copy_(computed)
        greedy = torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)
        self._newest.index_put_((slots,), greedy.clamp(min=0))
        return batch, logits, greedy


def as_kv_span(span: ScheduledSpan) -> Span:
    """The span as the KV store knows it."""
    return Span(span.start, span.end, span.blocks, span.slot)
