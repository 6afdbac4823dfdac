"""Teacher-forced scoring through the packed store: every token reads exactly what decoding would let it read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count, islice

import msgspec
import torch
from torch import Tensor

from kvtool.attention import block_size
from kvtool.attention.queries import prepared
from kvtool.chosen_model import choose_model
from kvtool.config import EngineConfig, KVOptions
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.codecs import check_fits
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.memory import MemoryParts, allocate
from kvtool.models import Attend, ModelConfig, weight_bytes
from kvtool.models.kv import attention_layers, kv_spec
from kvtool.models.resolve import fingerprint
from kvtool.paged_model import PagedModel
from kvtool.parallel import ONE_RANK, Parallel, Stage
from kvtool.profiling import StepProfiler, traces_folder
from kvtool.ranks.leader import Ranks
from kvtool.token_scores import SCORED_ROWS

SIXTEEN_BITS = KVOptions()


@dataclass(frozen=True)
class Window:
    """Tokens that the model reads together, from an empty cache.

    Attributes:
        token_ids: [n], n from 2 up; the last one is only predicted, never read.
        first: the first one that is scored, from 1 up; each is predicted from all that come before it.
    """

    token_ids: Sequence[int]
    first: int = 1

    @property
    def num_read(self) -> int:
        return len(self.token_ids) - 1

    @property
    def targets(self) -> Sequence[int]:
        """[n - first], the tokens that are scored."""
        return self.token_ids[self.first :]


class OpenStore(msgspec.Struct, frozen=True, tag="open_store"):
    """Make a store of this format, which goes by `number`."""

    number: int
    kv: KVOptions
    num_blocks: int
    num_tail_slots: int


class Read(msgspec.Struct, frozen=True, tag="read"):
    """Run windows together through a store."""

    number: int
    windows: list[Window]


class Predict(msgspec.Struct, frozen=True, tag="predict"):
    """Compute the logits of so many hidden states, which rank 0 has."""

    num_rows: int


class DropStore(msgspec.Struct, frozen=True, tag="drop_store"):
    """No more windows go through this store."""

    number: int


class Walk(msgspec.Struct, frozen=True, tag="walk"):
    """Run tokens through the layers, whose attention rank 0 computes, of all heads."""

    token_ids: list[int]
    positions: list[int]


ScoringOrder = OpenStore | Read | Predict | DropStore | Walk


@dataclass(frozen=True)
class WholeModel:
    """A model as whoever looks into its layers runs it: called as a `Decoder` is, for what its attention is given. All
    heads of all layers come here, whichever ranks hold them.

    Attributes:
        run: the tokens, their positions, and attention.
    """

    config: ModelConfig
    run: Callable[[Tensor, Tensor, Attend], object]

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> None:
        self.run(ids, positions, attend)


class ScoringModel:
    """A model, loaded once and scored under any number of KV formats, each with a packed store of its own.

    Of `config`, `max_num_batched_tokens` bounds the tokens that are computed together, and its `kv` is not used. Where
    it asks for several ranks, this one starts the others, and each has a `ScoringModel` that carries out its orders.

    Args:
        parallel: the place of a rank that another has started.

    Attributes:
        path: local folder of the model.
        model_config: what the checkpoint is.
        quantization: what became of its weights when they were loaded.
        model: the decoder, on `device` in `dtype`, or this rank's part of it.
        max_model_len: tokens of the longest window.

    Raises:
        KVToolError: the model cannot be loaded, or does not fit the ranks.
    """

    def __init__(self, config: EngineConfig, parallel: Parallel = ONE_RANK) -> None:
        folder = traces_folder(config.profile) if config.profile else None
        self._ranks: Ranks | None = None
        if config.num_ranks * config.ep * config.nnodes > 1 and parallel.size == 1:
            self._ranks = Ranks(config, "scores")
            config, parallel = self._ranks.config, self._ranks.parallel
        self.config, self.parallel = config, parallel
        with self._ranks.starting() if self._ranks else nullcontext():
            chosen = choose_model(config)
            self.model = chosen.load(config, parallel)
            if self._ranks:
                self._ranks.await_ready()
        self.path, self.model_config, self.device, self.dtype = chosen.path, chosen.config, chosen.device, chosen.dtype
        self.quantization = chosen.quantization
        self.max_model_len = min(config.max_model_len or self.model_config.max_position, self.model_config.max_position)
        self._layers = parallel.stage.layers(self.model_config.num_layers)
        self._paged: dict[int, PagedModel] = {}  # by the numbers of their stores
        self._numbers = count()
        name = "scoring" if parallel.size == 1 else f"scoring-rank{parallel.rank}"
        is_follower = parallel.rank > 0
        self._profiler = StepProfiler(folder, name, self.device, is_follower=is_follower) if folder else None

    def close(self) -> None:
        """End the processes of other ranks, if there are any; nothing more can be scored."""
        if self._ranks:
            self._ranks.close()

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def layout(self, kv: KVOptions) -> KVLayout:
        """Where the bytes of a cache of this model lie under `kv`.

        Raises:
            ConfigError: options that contradict each other or do not fit the model.
            UnsupportedError: a head_dim that the bits cannot pack.
        """
        spec = kv_spec(self.model_config, self.dtype)
        return KVLayout(spec, resolve(kv, spec, block_size(self.config.attention_backend)))

    @property
    def whole(self) -> WholeModel:
        return WholeModel(self.model_config, self._walk)

    def fingerprint(self) -> str:
        """Names the weights, however many ranks hold them."""
        config = self.config
        seed = f"seed {config.seed} " if config.load_format == "dummy" else ""
        rounded = f"{config.quantization} {config.quantize_head} {config.keep_layers} {config.calibration} "
        return seed + (rounded if self.quantization else "") + fingerprint(self.path)

    def log_probs(self, windows: Sequence[Window], kv: KVOptions) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-probabilities of all next tokens at the scored places of all windows, in their order.

        They come a few rows at a time, in the same pieces whatever `kv` is: those of several formats can be drawn in
        turn and compared without either being kept.

        Yields:
            Log-probabilities [n, vocab_size] in float32 (float64 if the model is), and the scored tokens [n] int64.

        Raises:
            UnsupportedError: the format cannot hold what the model makes of these tokens.
        """
        for window, hidden in zip(windows, self.hidden_states(windows, kv), strict=True):
            yield from self.log_probs_of(window, hidden)

    def log_probs_of(self, window: Window, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What `log_probs` yields of one window, given what `hidden_states` does."""
        targets = torch.tensor(window.targets, device=self.device)
        for rows, ids in zip(hidden.split(SCORED_ROWS), targets.split(SCORED_ROWS), strict=True):
            with torch.inference_mode():  # not across the yield: it would hold in the caller, too
                (logits,) = self._order(Predict(len(rows)), rows)
                log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            yield log_probs, ids

    def hidden_states(self, windows: Sequence[Window], kv: KVOptions) -> Iterator[Tensor]:
        """Final hidden states at the places that predict a window's scored tokens, [n - first, hidden_size] of each.

        `kv` is checked and its store allocated before the first one comes.

        Raises:
            CapacityError: the store does not fit beside the model.
            UnsupportedError: the format cannot hold what the model makes of these tokens.
        """
        layout, batches = self.layout(kv), _batches(windows, self.config.max_num_batched_tokens)
        num_blocks = max(sum(layout.format.num_blocks(window.num_read) for window in batch) for batch in batches)
        number = next(self._numbers)
        try:
            self._order(OpenStore(number, kv, max(1, num_blocks), max(map(len, batches))))
            for batch in batches:
                yield from self._order(Read(number, batch))
        finally:
            self._order(DropStore(number))

    def _order(self, order: ScoringOrder, rows: Tensor | None = None) -> list[Tensor]:
        """Let all ranks carry out an order, this one among them."""
        if self._ranks is None:
            return self.carry_out(order, rows)
        with self._ranks.waiting():
            self._ranks.tell(order)
            return self.carry_out(order, rows)

    @torch.inference_mode()
    def carry_out(self, order: ScoringOrder, rows: Tensor | None = None) -> list[Tensor]:
        """Do this rank's part of what rank 0 wants of all.

        Args:
            rows: hidden states of a `Predict`, on rank 0.

        Returns:
            On rank 0, of `Read` the final hidden states of each window's scored tokens, of `Predict` the logits.

        Raises:
            CapacityError, UnsupportedError: on all ranks, whichever of them has met it.
        """
        match order:
            case OpenStore():
                self._paged[order.number] = self._opened(order)
            case Read():
                return self._forward(order.windows, self._paged[order.number])
            case Predict():
                return [self._logits(order.num_rows, rows)]
            case DropStore():
                if order.number in self._paged and self._profiler and self.parallel.rank == 0:
                    self._profiler.rest(self._held)
                self._paged.pop(order.number, None)
            case Walk():
                ids, positions = (torch.tensor(x, device=self.device) for x in (order.token_ids, order.positions))
                self.model(ids, positions, prepared(SharedHeads(self.model_config, self.parallel)))
        return []

    @torch.inference_mode()
    def _walk(self, ids: Tensor, positions: Tensor, attend: Attend) -> None:
        """Let all ranks run tokens through their layers, with this one's attention."""
        if self._ranks is None:
            self.model(ids, positions, attend)
            return
        shared = SharedHeads(self.model_config, self.parallel, attend)
        with self._ranks.waiting():
            self._ranks.tell(Walk(ids.tolist(), positions.tolist()))
            self.model(ids, positions, prepared(shared))
            for layer in range(self._layers.stop, self.model_config.num_layers):
                shared.serve(layer, len(ids), self.dtype, self.device)

    def _opened(self, order: OpenStore) -> PagedModel:
        layout = KVLayout(
            kv_spec(self.model_config, self.dtype, self.parallel), self.layout(order.kv).format.of_layers(self._layers)
        )
        with self.parallel.agreeing():
            store = allocate(layout, order.num_blocks, order.num_tail_slots, self.dtype, self.device)
            return PagedModel(self.model, store, self.config.attention_backend, self.parallel)

    def _forward(self, batch: Sequence[Window], paged: PagedModel) -> list[Tensor]:
        """Run windows together, each from its own empty memory; one that is longer than a step goes in pieces."""
        store, step = paged.store, self.config.max_num_batched_tokens
        free = iter(range(store.num_blocks))
        owned = [list(islice(free, store.format.num_blocks(window.num_read))) for window in batch]
        pieces: list[list[Tensor]] = [[] for _ in batch]
        for start in range(0, max(window.num_read for window in batch), step):
            spans = [
                Span(start, min(start + step, window.num_read), blocks, slot)
                for slot, (window, blocks) in enumerate(zip(batch, owned, strict=True))
            ]
            if self._profiler:
                self._profiler.begin_step()
            kv_batch = KVBatch.build(store.format, spans, self.device)
            read = [token for w, span in zip(batch, spans, strict=True) for token in w.token_ids[span.start : span.end]]
            hidden = paged(torch.tensor(read, device=self.device), kv_batch)
            paged.seal(kv_batch)
            if self._profiler:
                self._profiler.end_step(self._held)
            for rows, piece in zip(hidden.split([span.length for span in spans]), pieces, strict=True):
                piece.append(rows)
        (fault,) = self.parallel.total(int(store.take_fault().item()))
        check_fits(not fault)
        scored = [torch.cat(piece)[window.first - 1 :] for window, piece in zip(batch, pieces, strict=True)]
        if self.parallel.stage.count == 1:
            return scored
        whole = self.parallel.broadcast(torch.cat(scored), self.parallel.first_of_last_stage)
        return list(whole.split([len(rows) for rows in scored]))

    def _logits(self, num_rows: int, rows: Tensor | None) -> Tensor:
        """[num_rows, vocab_size] in the model's dtype, of hidden states that rank 0 has; where that is not the last
        stage, they go there and come back."""
        config, parallel = self.model_config, self.parallel
        if rows is None:
            rows = torch.empty(num_rows, config.hidden_size, dtype=self.dtype, device=self.device)
        rows = parallel.broadcast(rows.contiguous(), 0)
        if parallel.stage.is_last:
            logits = self.model.logits(rows)
        else:
            logits = torch.empty(num_rows, config.vocab_size, dtype=self.dtype, device=self.device)
        return logits if parallel.stage.count == 1 else parallel.broadcast(logits, parallel.first_of_last_stage)

    def _held(self) -> MemoryParts:
        """What the device holds for the model and all open stores."""
        parts = [
            MemoryParts.of(store.layout, store.num_blocks, len(store.tails) // max(1, store.layout.tail_bytes), 0, None)
            for store in (paged.store for paged in self._paged.values())
        ]
        return MemoryParts(
            weights=weight_bytes(self.model),
            codes=sum(part.codes for part in parts),
            metadata=sum(part.metadata for part in parts),
            windows=sum(part.windows for part in parts),
            workspace=None,
            graphs=None,
            reserve=None,
        )


class SharedHeads:
    """Attention of layers whose heads several ranks share, computed by rank 0: each gives what its layer made, and
    gets what its heads have gathered.

    Args:
        attend: rank 0's, of all heads.
    """

    def __init__(self, config: ModelConfig, parallel: Parallel, attend: Attend | None = None) -> None:
        self.config, self.parallel, self.attend = config, parallel, attend

    def __call__(self, layer: int, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tp, stage, shapes = self.parallel.tp, self.parallel.stage, attention_layers(self.config)
        whole = [self._whole(q, shapes[layer].num_heads)]
        whole += [self._whole(x, shapes[layer].num_kv_heads) for x in (key, value)]
        heads, dim = shapes[layer].num_heads, shapes[layer].latent_dim or shapes[layer].head_dim
        out = torch.empty(len(q), heads, dim, dtype=q.dtype, device=q.device)
        if self.attend:
            out.copy_(self.attend(layer, *whole))
        elif tp.rank == 0 and not stage.is_first:
            for x in whole:
                self.parallel.send(x, 0)
            self.parallel.receive(out, 0)
        own = tp.shard(heads)
        return tp.broadcast(out)[:, own.start : own.start + own.size]

    def serve(self, layer: int, num_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Compute the attention of another stage's layer, on rank 0."""
        assert self.attend
        shape, spec = attention_layers(self.config)[layer], kv_spec(self.config, dtype)
        there = next(
            index * self.parallel.tp.size
            for index in range(self.parallel.stage.count)
            if layer in Stage(index, self.parallel.stage.count).layers(self.config.num_layers)
        )
        streams = [(shape.num_heads, shape.head_dim)]
        streams += [(stream.heads, stream.dim) for stream in (spec.key, spec.value)]
        q, key, value = (
            self.parallel.receive(torch.empty(num_tokens, *stream, dtype=dtype, device=device), there)
            for stream in streams
        )
        self.parallel.send(self.attend(layer, q, key, value).to(dtype), there)

    def _whole(self, x: Tensor, heads: int) -> Tensor:
        """[T, heads, D] of all ranks of the group; a head that several of them have comes once."""
        if x.shape[1] == heads:
            return x.contiguous()
        gathered = self.parallel.tp.all_gather(x.flatten(1)).view(len(x), -1, x.shape[2])
        return gathered[:, :: gathered.shape[1] // heads].contiguous()


def _batches(windows: Sequence[Window], most: int) -> list[list[Window]]:
    """Windows in their order, as many together as read `most` tokens, or a longer one alone.

    Those of a single token, which the store takes for decodes, stay among themselves.
    """
    batches: list[list[Window]] = []
    room = 0
    for window in windows:
        if window.num_read > room or (window.num_read == 1) != (batches[-1][0].num_read == 1):
            batches.append([])
            room = most
        batches[-1].append(window)
        room -= window.num_read
    return batches
