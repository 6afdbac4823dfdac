"""Steps as CUDA graphs: one launch for all layers, whatever the host is doing."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain, pairwise
from math import prod
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from kvtool.gpus import GPU, GPUS
from kvtool.kernels import takes
from kvtool.kv.batch import ALIGNED, Cut, Integers, KVBatch, Span, each, integers, on_device
from kvtool.kv.fixed import MOST_PROMPTS, Room, fixed_batch
from kvtool.kv.format import KVFormat
from kvtool.request import ScheduledBatch, ScheduledSpan
from kvtool.sampler import greedy

# Rows of steps of decodes. Beyond 128, products take longer the more there are (on an H200 those of a 7B model about a
# tenth for 32 more), and so does attention over packed KV, whether they are somebody's or not.
SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 144, 160, 176, 192, 208, 224, 256, 288, 320, 384, 448, 512)

# Tokens of steps with prompts. Of the larger ones an eighth is left over at most; prompts that come alone, whose first
# token is waited for, find half the distance where products gain by it: a layer of a 7B takes an H200 186, 236 and 256
# µs at 256, 320 and 384. Decodes that are nobody's cost little, but the more there could be, the fewer programs share
# one.
TOKENS = (*range(128, 2048, 128), *range(2048, 4096, 256), *range(4096, 8193, 512))
TOKENS_ALONE = (160, *range(192, 1024, 128))
DECODES = (0, 16, 256)

# What the host takes to launch the kernels of a layer one by one: 0.45 ms beside one H200, 1.1 beside another.
LAYER_SECONDS = 1e-3
SUSTAINED = 0.7  # of a GPU's FLOP/s, in products of many rows

# Tokens that the rows of prompts may read, each for itself; more is read faster by a prefill kernel.
MOST_READ = 1 << 16
FEW = 64  # tokens of prompts that come alone, more of which are read faster so

# (ids [n], batch, tokens wanted [w] or None: all) → hidden states [n or w, hidden_size]
Step = Callable[[Tensor, KVBatch, Tensor | None], Tensor]
# (hidden states [n, hidden_size], memory for them or None) → logits [n, vocab_size]
Head = Callable[[Tensor, Tensor | None], Tensor]
Outputs = TypeVar("Outputs")


def decode_sizes(max_num_seqs: int) -> list[int]:
    """Of `SIZES`, those that so many sequences need, and small ones for short prompts."""
    return [size for smaller, size in pairwise((0, *SIZES)) if size <= 256 or smaller < max_num_seqs]


def worthwhile_tokens(products: float, gpu: GPU | None) -> int:
    """Tokens of a step up to which the host takes longer to launch its kernels than the GPU to run them.

    Longer steps are as fast without a graph, which would hold memory for them.

    Args:
        products: of a layer, as `kvtool.models.Decoder.products` counts them.
        gpu: None: it is not known, and taken for an A100.
    """
    return int(LAYER_SECONDS * SUSTAINED * (gpu or GPUS["A100"]).flops16 / (2 * products))


def prompt_rooms(most_decodes: int, worthwhile: int, max_num_batched_tokens: int) -> list[Room]:
    """For steps of up to `worthwhile` tokens, `most_decodes` of them decodes; the largest last."""
    sizes = [size for size in TOKENS if size <= worthwhile and size < max_num_batched_tokens]
    if 1 < max_num_batched_tokens <= min(worthwhile, TOKENS[-1]):
        sizes.append(max_num_batched_tokens)
    decodes = [sorted({min(some, most_decodes, size - 2) for some in DECODES}) for size in sizes]
    alone = [Room(0, size) for size in TOKENS_ALONE if size <= worthwhile and size < max_num_batched_tokens]
    rooms = {*alone, *(Room(some, size) for size, counts in zip(sizes, decodes, strict=True) for some in counts)}
    return sorted(rooms, key=lambda room: (room.tokens, room.decodes))


def most_rows(max_num_batched_tokens: int) -> int:
    """Tokens that the model sees at once at most: those of a step, or of the largest graph of decodes."""
    return max(max_num_batched_tokens, SIZES[-1])


class BlockTable:
    """The blocks of the sequences that decode, on the device by slot; a graph adds the newest one by itself.

    Attributes:
        rows: [max_num_seqs, max_blocks] int64.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.rows = torch.zeros(max_num_seqs, max_blocks, dtype=torch.int64, device=device)
        self._lengths = [0] * max_num_seqs  # blocks that each row holds; 0: of nobody, or of who is gone
        self._owners: list[Sequence[int]] = [()] * max_num_seqs  # the list of blocks of each row's sequence, its own

    def forget(self, slots: Iterable[int]) -> None:
        """The sequences in these slots are new, or have moved."""
        for slot in slots:
            self._lengths[slot] = 0

    def send(self, spans: Sequence[ScheduledSpan]) -> None:
        """Send the blocks of sequences of which more than the newest block is unknown."""
        new = []
        for span in spans:
            is_other = span.token_ids and span.blocks is not self._owners[span.slot]
            known, length = 0 if is_other else self._lengths[span.slot], len(span.blocks)
            if not known <= length <= known + 1:
                new.append(span)
            self._lengths[span.slot], self._owners[span.slot] = length, span.blocks
        if not new:
            return
        counts = integers((len(span.blocks) for span in new), len(new))
        owners, columns = each(np.zeros_like(counts), counts)
        slots = integers((span.slot for span in new), len(new))[owners]
        blocks = integers(chain.from_iterable(span.blocks for span in new), len(owners))
        sent = on_device({"slots": slots, "columns": columns, "blocks": blocks}, self.rows.device)
        self.rows.index_put_((sent["slots"], sent["columns"]), sent["blocks"])


class Capturer:
    """Makes graphs that share their memory, so none may run beside another; the largest come first, best."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], Outputs]) -> tuple[torch.cuda.CUDAGraph, Outputs]:
        """`run` as a graph, and what it returned."""
        run()  # lazily loaded kernels must be there before
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog may ask for the state of earlier events meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = run()
        return graph, outputs


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
        ids: the token, or its place: see `known`.
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
    """Steps of few tokens: decodes, and prompts so short that their tokens can run as rows of their own.

    A step of n runs as the next larger size that was captured; what is too much repeats the last row, which then
    computes and writes the same bytes twice. All inputs go to the device in one transfer, but for the block table.

    Args:
        step: the model on a batch; what it runs is captured, so it must not look at any value.
        head: likewise, on the hidden states.
        fmt: of the KV store.
        recent: [1 + K, max_num_seqs + 1], ids that were sampled last and drafted, by slot, and of a slot that nobody
            reads.

    Attributes:
        sizes: of `SIZES`, those that so many sequences need.
    """

    def __init__(self, step: Step, head: Head, fmt: KVFormat, recent: Tensor, table: BlockTable) -> None:
        self._step, self._head, self._format, self._recent, self._table = step, head, fmt, recent, table
        self._newest = newest = recent[0]
        device, shape = newest.device, len(Inputs._fields)
        self.sizes = decode_sizes(len(newest) - 1)
        self._inputs = {size: torch.zeros(shape, size, dtype=torch.int64, device=device) for size in self.sizes}
        self._staged = {size: torch.zeros(shape, size, dtype=torch.int64).pin_memory() for size in self.sizes}
        self._sent = torch.cuda.Event()
        self._captured: dict[int, Captured] = {}
        self._logits = torch.empty(0, device=device)  # of all sizes; the largest makes it

    def capture(self, sizes: Sequence[int], capturer: Capturer) -> None:
        """Capture some of `sizes`, the largest first, so that the smaller ones find its memory."""
        for size in sorted(sizes, reverse=True):
            graph, outputs = capturer.capture(partial(self._run, size))
            self._captured[size] = Captured(graph, *outputs)

    def rehearse(self) -> None:
        """Launch what all graphs would hold; no memory of it stays."""
        for size in reversed(self.sizes):
            self._run(size)
        self._logits = self._logits.new_empty(0)

    def holds(self, batch: ScheduledBatch) -> bool:
        """Graphs have been captured, it is not too much, and what runs of prompts needs no more than their rows."""
        fmt, prompts = self._format, [span for span in batch.spans if span.token_ids]
        return (
            bool(self._captured)
            and sum(span.length for span in batch.spans) <= self.sizes[-1]
            and sum(span.length * span.end for span in prompts) <= MOST_READ
            and not batch.forks
            and not any(span.targets for span in prompts)
            # Blocks are packed when the step is over.
            and all(fmt.packs_on_write or fmt.visible(span.start) == fmt.visible(span.end - 1) for span in prompts)
        )

    def launch(self, batch: ScheduledBatch) -> tuple[KVBatch, Tensor, Tensor]:
        """What ran, its spans being those tokens that complete a block, logits [n, vocab_size] and greedy ids [n] of
        the n samples; valid until the next launch."""
        self._table.send(batch.spans)
        ends = integers((span.end for span in batch.spans), len(batch.spans))
        rows = decode_rows(self._format, batch.spans, ends, nobody=len(self._newest) - 1)
        samples = integers((sample.span for sample in batch.samples), len(batch.samples))
        length, count = rows.shape[1], len(samples)
        size = next(size for size in self.sizes if size >= length)
        self._sent.synchronize()  # what is staged has been read
        staged = self._staged[size].numpy()
        staged[:-1, :length], staged[:-1, length:] = rows, rows[:, -1:]
        staged[-1, :count] = np.flatnonzero(rows[-1] < len(self._newest) - 1)[samples]  # last tokens of their spans
        self._inputs[size].copy_(self._staged[size], non_blocking=True)
        self._sent.record()
        captured = self._captured[size]
        captured.graph.replay()
        full = () if self._format.packs_on_write else self._format.visible(ends) > self._format.visible(ends - 1)
        completing = [batch.spans[index] for index in np.flatnonzero(full)]
        spans = tuple(Span(span.end - 1, span.end, span.blocks, span.slot) for span in completing)
        ran = replace(captured.batch, spans=spans, num_decodes=length)
        if length == count:
            return ran, captured.logits[:count], captured.greedy[:count]
        chosen = self._inputs[size][-1, :count]
        return ran, captured.logits[chosen], captured.greedy[chosen]

    def _run(self, size: int) -> tuple[KVBatch, Tensor, Tensor]:
        inputs = Inputs(*self._inputs[size])
        self._table.rows.index_put_((inputs.slots, inputs.columns), inputs.newest)
        batch = KVBatch(
            format=self._format,
            spans=(),
            num_decodes=size,
            positions=inputs.positions,
            block_table=self._table.rows[inputs.slots],
            rows=inputs.rows,
            token_blocks=inputs.blocks,
            tail_slots=inputs.slots,
            visible=inputs.visible,
        )
        hidden = self._step(known(inputs.ids, self._recent), batch, None)
        if len(self._logits) < size:
            self._logits = torch.empty_like(self._head(hidden, None))
        logits = self._head(hidden, self._logits[:size])
        return batch, logits, greedy(logits, self._newest, inputs.targets)


def place(span: ScheduledSpan, width: int) -> int:
    """Stands for the token of a decode, which is in `recent` [1 + K, width]."""
    return -1 - (span.draft * width + span.slot)


def known(ids: Tensor, recent: Tensor) -> Tensor:
    """`ids` [n], with the tokens of `recent` in place of what stands for them."""
    if takes(ids):
        from kvtool.kernels import sampling

        return sampling.known(ids, recent)
    return torch.where(ids < 0, recent.flatten()[(-1 - ids).clamp_(min=0)], ids)


def decode_rows(fmt: KVFormat, spans: Sequence[ScheduledSpan], ends: Integers, nobody: int) -> Integers:
    """[9, T], `Inputs` of each token of `spans`, but for the samples.

    Args:
        spans: decodes first.
        ends: [len(spans)], of each.
        nobody: where what is sampled behind any but the last token of a span goes.
    """
    size, width = fmt.block_size if fmt.packs_on_write else fmt.tail_tokens, nobody + 1
    told = (
        (s.slot, s.start, max(0, len(s.blocks) - 1), s.blocks[-1] if s.blocks else 0, -1 - (s.draft * width + s.slot))
        for s in spans
    )
    of_spans = integers(chain.from_iterable(told), 5 * len(spans)).reshape(-1, 5).T
    rows = np.zeros((9, int((ends - of_spans[1]).sum())), np.int64)
    slots, positions, visible, in_memory, written, columns, newest, ids, targets = rows
    owners: Iterable[int] = range(len(spans))
    if len(ids) == len(spans):
        slots[:], positions[:], columns[:], newest[:], ids[:] = of_spans
        targets[:] = slots
    else:
        of_tokens, positions[:] = each(of_spans[1], ends)
        slots[:], _, columns[:], newest[:], ids[:] = of_spans[:, of_tokens]
        targets[:] = np.where(positions == ends[of_tokens] - 1, slots, nobody)
        owners = of_tokens.tolist()
    num_decodes = sum(not span.token_ids for span in spans)
    ids[num_decodes:] = list(chain.from_iterable(span.token_ids for span in spans[num_decodes:]))
    visible[:], in_memory[:] = fmt.visible(positions), positions % size
    if fmt.packs_on_write:
        indices = (positions // size).tolist()
        written[:] = [spans[owner].blocks[index] for owner, index in zip(owners, indices, strict=True)]
    return rows


def ids_of(spans: Sequence[ScheduledSpan], width: int) -> Integers:
    """Of all tokens, as `known` takes them, `recent` being [1 + K, width]."""
    ids = chain.from_iterable(span.token_ids or (place(span, width),) for span in spans)
    return integers(ids, sum(span.length for span in spans))


def lasts(spans: Sequence[ScheduledSpan]) -> Integers:
    """The last token of each span, counted over all of them."""
    return integers(accumulate(span.length for span in spans), len(spans)) - 1


def has_targets(batch: ScheduledBatch) -> bool:
    """Some of its tokens are scored, so that the hidden states of more than each span's last one are looked at."""
    return any(span.targets for span in batch.spans)


def room_ids(spans: Sequence[ScheduledSpan], decodes: int, rows: int, width: int) -> dict[str, Integers]:
    """What a step in a room takes from the scheduler alone.

    Args:
        spans: decodes first, at least one of them where the room holds any.
        decodes: that it holds; the last one's newest block stands for the missing ones' as well.
        rows: spans that it holds.
        width: of `recent`, whose last column is nobody's.

    Returns:
        ids: [T], `ids_of` them.
        wanted: [len(spans)], the last token of each.
        targets: [rows], the slot of each, where its sample goes.
        newest: [3, decodes], slot, column and block of each decode.
    """
    single = [span for span in spans if span.length == 1]
    newest = [
        (span.slot, len(span.blocks) - 1, span.blocks[-1]) if span.blocks else (span.slot, 0, 0) for span in single
    ]
    nobody = newest[-1:] * (decodes - len(single))
    columns, targets = np.array(newest + nobody, np.int64).reshape(-1, 3).T, np.full(rows, width - 1)
    targets[: len(spans)] = [span.slot for span in spans]
    return {"ids": ids_of(spans, width), "wanted": lasts(spans), "targets": targets, "newest": columns}


class CapturedRoom(NamedTuple):
    """A graph, what it reads, and what it writes.

    Attributes:
        how: its kernels cut prompts.
        logits, greedy: of each span's last token: [rows, vocab_size], and ids as `kvtool.sampler.greedy` gives them.
        inputs: by name, in memory that all rooms share.
        staged: the same on the host, flat.
        sent: all of them behind each other, on the host and on the device.
    """

    graph: torch.cuda.CUDAGraph
    how: Cut
    logits: Tensor
    greedy: Tensor
    inputs: dict[str, Tensor]
    staged: dict[str, Integers]
    sent: tuple[Tensor, Tensor]


class PromptGraphs:
    """Steps with prompts, beside which others may decode.

    A step runs in the smallest room that was captured and holds it; what is left over computes nothing that is stored.
    All inputs go to the device in one transfer, to memory that all graphs read, but for the block table of decodes.

    Args:
        step, head: as those of `DecodeGraphs`.
        fmt: of the KV store.
        recent: [1 + K, max_num_seqs + 1], ids that were sampled last and drafted, by slot, and of a slot that nobody
            reads.
        rooms: the largest last.
    """

    def __init__(
        self, step: Step, head: Head, fmt: KVFormat, recent: Tensor, table: BlockTable, rooms: Sequence[Room]
    ) -> None:
        self._step, self._head, self._format, self._recent, self._table = step, head, fmt, recent, table
        self.rooms = rooms
        length = max((self._length(room) for room in self.rooms), default=0)
        self._memory = torch.zeros(length, dtype=torch.int64, device=recent.device)
        self._staged = torch.zeros(length, dtype=torch.int64).pin_memory()
        self._sent = torch.cuda.Event()
        self._captured: dict[Room, CapturedRoom] = {}
        self._logits = torch.empty(0, device=recent.device)  # of all rooms; the largest makes it

    def capture(self, rooms: Sequence[Room], capturer: Capturer) -> None:
        """Capture some of `rooms`, the largest first, so that the smaller ones find its memory."""
        for room in sorted(rooms, key=lambda room: (room.tokens, room.decodes), reverse=True):
            inputs = self._cleared(room)
            graph, outputs = capturer.capture(partial(self._run, room, inputs))
            staged = {name: piece.view(-1).numpy() for name, piece in self._inputs(room, self._staged).items()}
            sent = self._staged[: self._length(room)], self._memory[: self._length(room)]
            self._captured[room] = CapturedRoom(graph, *outputs, inputs, staged, sent)

    def rehearse(self) -> None:
        """Launch what all graphs would hold; no memory of it stays."""
        for room in reversed(self.rooms):
            self._run(room, self._cleared(room))
        self._logits = self._logits.new_empty(0)

    def room(self, batch: ScheduledBatch) -> Room | None:
        """Where the step runs, None if nowhere."""
        lengths = [span.length for span in batch.spans]
        decodes, tokens = lengths.count(1), sum(lengths)
        fitting = (room for room in self.rooms if decodes <= room.decodes and tokens <= room.tokens)
        smallest = next((room for room in fitting if room in self._captured), None)
        holds = (
            smallest
            and decodes < len(lengths)
            and not has_targets(batch)
            and smallest.holds(self._format, list(map(as_kv_span, batch.spans)))
        )
        return smallest if holds else None

    def launch(self, batch: ScheduledBatch, room: Room) -> tuple[KVBatch, Tensor, Tensor | None]:
        """What ran, logits [n, vocab_size] and, unless there are forks, greedy ids [n] of the n samples; valid until
        the next launch."""
        captured = self._captured[room]
        spans = tuple(map(as_kv_span, batch.spans))
        n = sum(span.length == 1 for span in spans)
        self._table.send(batch.spans[:n])
        arrays = room.lay_out(self._format, spans, captured.how)
        arrays |= room_ids(batch.spans, room.decodes, len(captured.greedy), self._recent.shape[1])
        self._sent.synchronize()  # what is staged has been read
        staged, memory = captured.sent
        staged.numpy().fill(-1)
        for name, piece in captured.staged.items():
            piece[: arrays[name].size] = arrays[name].ravel()
        memory.copy_(staged, non_blocking=True)
        self._sent.record()
        captured.graph.replay()
        self._table.forget(span.slot for span in batch.spans if span.token_ids)
        inputs = captured.inputs
        slots = inputs["newest"][0]
        ran = KVBatch(
            format=self._format,
            spans=spans,
            num_decodes=n,
            positions=inputs["positions"],
            block_table=self._table.rows[slots[:n]],
            rows=inputs["rows"],
            token_blocks=inputs["token_blocks"],
            tail_slots=slots,
            visible=inputs["visible"],
        )
        rows, count = [sample.span for sample in batch.samples], len(batch.samples)
        if rows == list(range(count)):
            logits, ids = captured.logits[:count], captured.greedy[:count]
        else:
            chosen = on_device({"rows": np.array(rows, np.int64)}, self._memory.device)["rows"]
            logits, ids = captured.logits[chosen], captured.greedy[chosen]
        return ran, logits, None if batch.forks else ids

    def _cleared(self, room: Room) -> dict[str, Tensor]:
        """The room's inputs, all of it nobody's."""
        self._memory.fill_(-1)
        inputs = self._inputs(room, self._memory)
        inputs["newest"].zero_()
        inputs["targets"].fill_(self._recent.shape[1] - 1)
        return inputs

    def _shapes(self, room: Room) -> dict[str, tuple[int, ...]]:
        """Of a step's inputs, as `Room.shapes` and `room_ids` have them."""
        shapes, rows = room.shapes(self._format), (min(room.decodes + MOST_PROMPTS, room.tokens),)
        others = {"ids": shapes["positions"], "wanted": rows, "targets": rows, "newest": (3, room.decodes)}
        return shapes | others

    def _length(self, room: Room) -> int:
        """Elements that the inputs take."""
        return sum(map(_aligned, self._shapes(room).values()))

    def _inputs(self, room: Room, memory: Tensor) -> dict[str, Tensor]:
        """The inputs as they lie in `memory`, one behind the other."""
        shapes = self._shapes(room)
        pieces = memory[: self._length(room)].split([_aligned(shape) for shape in shapes.values()])
        named = zip(shapes.items(), pieces, strict=True)
        return {name: piece[: prod(shape)].view(shape) for (name, shape), piece in named}

    def _run(self, room: Room, inputs: dict[str, Tensor]) -> tuple[Cut, Tensor, Tensor]:
        """Compute the step that is in `inputs`; how its kernels cut prompts, logits and greedy ids."""
        slots, columns, newest = inputs["newest"]
        if room.decodes:
            self._table.rows.index_put_((slots, columns), newest)
        batch, prompts = fixed_batch(self._format, room, inputs, slots, self._table.rows)
        rows, targets = len(inputs["targets"]), inputs["targets"]
        hidden = self._step(known(inputs["ids"], self._recent), batch, inputs["wanted"])[:rows]
        if len(self._logits) < rows:
            self._logits = torch.empty_like(self._head(hidden, None))
        logits = self._head(hidden, self._logits[:rows])
        return prompts.how, logits, greedy(logits, self._recent[0], targets)


class StepGraphs:
    """All graphs of an engine, which share their memory.

    Args:
        hidden_states: the model on a batch; head: on its hidden states.
        recent: [1 + K, max_num_seqs + 1], ids that were sampled last and drafted, by slot, and of a slot that nobody
            reads.
        max_blocks: of the longest sequence.
        rooms: for steps with prompts; none where the kernels look at them on the host.
    """

    def __init__(
        self,
        hidden_states: Step,
        head: Head,
        fmt: KVFormat,
        recent: Tensor,
        max_blocks: int,
        rooms: Sequence[Room],
    ) -> None:
        self._table = BlockTable(recent.shape[1] - 1, max_blocks, recent.device)
        self.decodes = DecodeGraphs(hidden_states, head, fmt, recent, self._table)
        self.prompts = PromptGraphs(hidden_states, head, fmt, recent, self._table, rooms)

    def capture(self, *, largest: bool = False) -> None:
        """Capture all of them; `largest`: only those that need most memory."""
        capturer = Capturer()
        self.prompts.capture(self.prompts.rooms[-1:] if largest else self.prompts.rooms, capturer)
        self.decodes.capture(self.decodes.sizes[-1:] if largest else self.decodes.sizes, capturer)

    def rehearse(self) -> None:
        """Launch all steps that can be captured, on nothing."""
        self.prompts.rehearse()
        self.decodes.rehearse()

    def launch(self, batch: ScheduledBatch) -> tuple[KVBatch, Tensor, Tensor | None] | None:
        """What ran, logits [n, vocab_size] and, if it has found them, greedy ids [n] of the n samples, valid until the
        next launch; None where no graph holds the step.

        Beside decodes a short prompt is a few rows more. By itself it is read faster by a kernel for prompts, but for
        the shortest, which the host would lay out for longer than that gains.
        """
        spans = batch.spans
        as_rows = spans[0].length == 1 or sum(span.length for span in spans) <= FEW
        if as_rows and self.decodes.holds(batch):
            return self.decodes.launch(batch)
        if room := self.prompts.room(batch):
            return self.prompts.launch(batch, room)
        return self.decodes.launch(batch) if self.decodes.holds(batch) else None

    def forget(self, slots: Iterable[int]) -> None:
        """The sequences in these slots are new, or have moved."""
        self._table.forget(slots)


def _aligned(shape: tuple[int, ...]) -> int:
    """Elements of an array and of what lies behind it, so that the next one is aligned."""
    return -(-prod(shape) // ALIGNED) * ALIGNED


def as_kv_span(span: ScheduledSpan) -> Span:
    """The span as the KV store knows it."""
    return Span(span.start, span.end, span.blocks, span.slot)
