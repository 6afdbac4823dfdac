"""Small steps as CUDA graphs: one launch for a whole step, whatever the host is doing."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvtool.kv.batch import KVBatch, Span, on_device
from kvtool.kv.format import KVFormat
from kvtool.request import ScheduledBatch, ScheduledSpan
from kvtool.sampler import greedy

SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 160, 192, 224, 256)

# Tokens that the rows of prompts may read, each for itself; more is read faster by a prefill kernel.
MOST_READ = 1 << 16

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


class Inputs(NamedTuple):
    """What a graph of `size` rows reads, each [size] int64. A row computes one token.

    Attributes:
        slots, positions, visible: of the token; the first position that it reads at full precision.
        rows, blocks: where it is written: row of its block or tail, and the block.
        columns, newest: the sequence's newest block: its place in the table, and the block.
        ids: the token; -1: what was sampled last for its slot.
        targets: where the sampled id goes: a slot, or behind the last where nothing is sampled.
        samples: rows whose logits are asked for, the rest anything.
    """

    slots: Tensor
    positions: Tensor
    visible: Tensor
    rows: Tensor
    blocks: Tensor
    columns: Tensor
    newest: Tensor
    ids: Tensor
    targets: Tensor
    samples: Tensor


class DecodeGraphs:
    """Steps of up to `SIZES[-1]` tokens: decodes, and prompts so short that their tokens can run as rows of their own.

    A step of n runs as the next larger size that was captured; what is too much repeats the last row, which then
    computes and writes the same bytes twice. All inputs go to the device in one transfer, but for the block table: it
    stays there by slot, a row is sent when its sequence is new, and after that only ever grows by its last block.

    Args:
        step: the model on a batch; what it runs is captured, so it must not look at any value.
        fmt: of the KV store.
        newest: [max_num_seqs + 1], ids that were sampled last, by slot, and one that nobody reads.
        max_blocks: of the longest sequence.
    """

    def __init__(self, step: Step, fmt: KVFormat, newest: Tensor, max_blocks: int) -> None:
        self._step, self._format, self._newest = step, fmt, newest
        device, most = newest.device, len(newest) - 1
        self._table = torch.zeros(most, max_blocks, dtype=torch.int64, device=device)
        self._lengths = [-1] * most  # blocks that each row of the table holds; -1: of a sequence that is gone
        shape = len(Inputs._fields)
        self._inputs = {size: torch.zeros(shape, size, dtype=torch.int64, device=device) for size in SIZES}
        self._staged = {size: torch.zeros(shape, size, dtype=torch.int64).pin_memory() for size in SIZES}
        self._sent = torch.cuda.Event()
        self._captured: dict[int, Captured] = {}
        self._logits = torch.empty(0, device=device)  # of all sizes; the largest makes it

    def capture(self, sizes: Sequence[int]) -> None:
        """Capture some of `SIZES`, the largest first, so that the smaller ones find its memory."""
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # where the store and the inputs are being filled with zeros
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

    def holds(self, batch: ScheduledBatch) -> bool:
        """Graphs have been captured, it is not too much, and what runs of prompts needs no more than their rows."""
        fmt, prompts = self._format, [span for span in batch.spans if span.token_ids]
        return (
            bool(self._captured)
            and sum(span.length for span in batch.spans) <= SIZES[-1]
            and sum(span.length * span.end for span in prompts) <= MOST_READ
            and not batch.forks
            and not any(span.targets for span in prompts)
            # Blocks are packed when the step is over.
            and all(fmt.packs_on_write or fmt.visible(span.start) == fmt.visible(span.end - 1) for span in prompts)
        )

    def launch(self, batch: ScheduledBatch) -> tuple[KVBatch, Tensor, Tensor]:
        """What ran, a span for each row, logits [n, vocab_size] and greedy ids [n] of the n samples; valid until the
        next launch."""
        self._send_new_rows(batch.spans)
        rows = [row for span in batch.spans for row in self._rows(span)]
        ends = list(accumulate(span.length for span in batch.spans))
        samples = [ends[sample.span] - 1 for sample in batch.samples]
        size, count = next(size for size in SIZES if size >= len(rows)), len(samples)
        self._sent.synchronize()  # what is staged has been read
        staged = self._staged[size].numpy()
        staged[:-1] = np.array(rows + rows[-1:] * (size - len(rows))).T
        staged[-1, :count] = samples
        self._inputs[size].copy_(self._staged[size], non_blocking=True)
        self._sent.record()
        captured = self._captured[size]
        captured.graph.replay()
        spans = tuple(Span(p, p + 1, s.blocks, s.slot) for s in batch.spans for p in range(s.start, s.end))
        ran = replace(captured.batch, spans=spans, num_decodes=len(rows))
        if len(rows) == count:
            return ran, captured.logits[:count], captured.greedy[:count]
        chosen = self._inputs[size][-1, :count]
        return ran, captured.logits[chosen], captured.greedy[chosen]

    def _send_new_rows(self, spans: Sequence[ScheduledSpan]) -> None:
        """Send the blocks of sequences of which more than the newest block is unknown."""
        for span in spans:
            known, length = self._lengths[span.slot], len(span.blocks)
            if span.token_ids or not 0 <= known <= length <= known + 1:
                sent = on_device({"blocks": np.array(span.blocks, np.int64)}, self._table.device)
                self._table[span.slot, :length] = sent["blocks"]
            self._lengths[span.slot] = length

    def _rows(self, span: ScheduledSpan) -> Iterator[tuple[int, ...]]:
        """`Inputs` of each token, but for the samples."""
        fmt, blocks, slot = self._format, span.blocks, span.slot
        size = fmt.block_size if fmt.packs_on_write else fmt.tail_tokens
        column, newest = (len(blocks) - 1, blocks[-1]) if blocks else (0, 0)
        nobody = len(self._newest) - 1
        for index, position in enumerate(range(span.start, span.end)):
            written = blocks[position // size] if fmt.packs_on_write else 0
            id_ = span.token_ids[index] if span.token_ids else -1
            target = slot if position == span.end - 1 else nobody
            yield slot, position, fmt.visible(position), position % size, written, column, newest, id_, target

    def _run(self, size: int) -> tuple[KVBatch, Tensor, Tensor]:
        inputs = Inputs(*self._inputs[size])
        self._table.index_put_((inputs.slots, inputs.columns), inputs.newest)
        batch = KVBatch(
            format=self._format,
            spans=(),
            num_decodes=size,
            positions=inputs.positions,
            block_table=self._table[inputs.slots],
            rows=inputs.rows,
            token_blocks=inputs.blocks,
            tail_slots=inputs.slots,
            visible=inputs.visible,
        )
        computed = self._step(torch.where(inputs.ids < 0, self._newest[inputs.slots], inputs.ids), batch)
        if len(self._logits) < size:
            self._logits = torch.empty_like(computed)
        logits = self._logits[:size].copy_(computed)
        return batch, logits, greedy(logits, self._newest, inputs.targets)


def as_kv_span(span: ScheduledSpan) -> Span:
    """The span as the KV store knows it."""
    return Span(span.start, span.end, span.blocks, span.slot)
