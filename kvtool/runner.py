"""The model on its device: a scheduled batch goes in, sampled token ids come out."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtool.attention import block_size
from kvtool.chosen_model import choose_model
from kvtool.config import EngineConfig
from kvtool.cuda_graph import (
    StepGraphs,
    as_kv_span,
    has_targets,
    ids_of,
    known,
    lasts,
    most_rows,
    prompt_rooms,
    worthwhile_tokens,
)
from kvtool.draft_model import DraftModel, find_draft, share_cache
from kvtool.errors import CapacityError
from kvtool.gpus import find_gpu
from kvtool.kv.batch import KVBatch, on_device, to_host
from kvtool.kv.codecs import check_fits
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.store import KVStore
from kvtool.kv.swap import SwapSpace
from kvtool.layers.moe import ExpertLoad
from kvtool.memory import (
    DeviceMemory,
    MemoryParts,
    allocate,
    cache_memory,
    capacity,
    check_context,
    largest_step,
    size,
)
from kvtool.models import weight_bytes
from kvtool.models.kv import kv_spec
from kvtool.paged_model import PagedModel
from kvtool.parallel import ONE_RANK, Parallel
from kvtool.processes import cpu_threads
from kvtool.profiling import StepProfiler, traces_folder
from kvtool.ranges import Range
from kvtool.request import Draft, Import, Sample, ScheduledBatch, StepResult
from kvtool.sampler import Drafts, Sampler, is_greedy, verify
from kvtool.token_scores import Scores, score_prompts, score_samples


@dataclass(frozen=True)
class Handle:
    """A step under way. Its tensors are on the host, and good once `ready` has happened (None: at once).

    Attributes:
        outcome: [len(batch.samples) + 1] int64, ids, and whether the store met what its format cannot hold.
        scores: of those samples that ask for them.
        prompt_scores: of all spans' targets, in pieces that follow each other.
    """

    batch: ScheduledBatch
    outcome: Tensor
    scores: Scores | None
    prompt_scores: list[Scores]
    ready: torch.cuda.Event | None


class Totals(NamedTuple):
    """What ranks have of a model and its cache: one, or all together.

    Attributes:
        elements: that are stored of a token.
        block_bytes, tail_bytes: of a block, and of a sequence's tail.
        kv_bytes, weight_bytes: of the cache, and of the weights.
        step_bytes: of the weights that a step reads.
    """

    elements: int
    block_bytes: int
    tail_bytes: int
    kv_bytes: int
    weight_bytes: int
    step_bytes: int


class Runner:
    """Model, KV store and sampler of one process. Where several ranks share a model, each has one of these, they are
    made at the same time, and all of them launch every step.

    Attributes:
        parallel: this rank's place among all.
        path: local folder of the model.
        model_config: what the checkpoint is.
        quantization: how weights are kept, as `ChosenModel.method` names it.
        max_model_len: tokens of prompt and answer together, as asked for or as model and cache allow.
        format: of the cache of all layers.
        paged: the model over this rank's part of the cache; all ranks' parts have as many blocks.
        graphs: of its steps; None: each kernel is launched by itself.
        draft: the model that drafts for it, whole on every rank; None: there is none.
        recent: [1 + K, max_num_seqs + 1] int64, by slot: the id sampled last, and K drafted behind it; the last slot is
            nobody's. `newest` is its first row.
        swap_space: for sequences that must make room.
        memory: what a GPU holds beside the store.
        largest_step_seconds: that the largest step took behind its launch, as tried on a GPU.
        compile_seconds: that it took to compile the kernels of all steps, or to find them compiled; 0: each is compiled
            when it is first launched.
        expert_load: of the layers of this rank's stage that have experts, kept by the first rank of its group.
        totals: of all ranks together.
    """

    def __init__(self, config: EngineConfig, parallel: Parallel = ONE_RANK) -> None:
        folder = traces_folder(config.profile) if config.profile else None
        self.parallel, chosen = parallel, choose_model(config)
        self.path, self.model_config, self.device, self.dtype = chosen.path, chosen.config, chosen.device, chosen.dtype
        check_context(config, self.model_config)
        draft_path = find_draft(config, self.path, self.model_config)
        self.quantization = chosen.method
        spec = kv_spec(self.model_config, self.dtype)
        self.format = resolve(config.kv, spec, block_size(config.attention_backend))
        self._layers = parallel.stage.layers(self.model_config.num_layers)
        layout = KVLayout(kv_spec(self.model_config, self.dtype, parallel), self.format.of_layers(self._layers))
        with torch.inference_mode():
            self.model = chosen.load(config, parallel)
            self.draft: Runner | None = None
            if draft_path:
                asked, config = share_cache(draft_path, config, layout, self.dtype, self.device, parallel)
                with parallel.agreeing():
                    self.draft = Runner(asked)
            self.max_model_len = config.max_model_len or self.model_config.max_position
            self.profiler: StepProfiler | None = None
            num_drafted = config.speculation.num_tokens if config.speculation else 0
            shape = (1 + num_drafted, config.max_num_seqs + 1)
            self.recent = torch.zeros(shape, dtype=torch.int64, device=self.device)
            self.newest = self.recent[0]
            self._drafter = None
            if draft := self.draft:
                self._drafter = DraftModel(draft.draw, draft.newest, draft.model_config.vocab_size, self.recent)
            self.sampler = Sampler(self.newest, self.model_config.eos_token_ids)
            self.largest_step_seconds = self.compile_seconds = 0.0
            routers = self.model.routers() if parallel.tp.rank == 0 else {}
            self.expert_load = ExpertLoad(routers, most_rows(config.max_num_batched_tokens)) if routers else None
            self.memory = self._measure(config, layout) if self.device.type == "cuda" else None
            self._allocate(config, layout)
            own = Totals(
                layout.spec.elements,
                layout.block_bytes,
                layout.tail_bytes,
                self.store.nbytes,
                self.model.weight_bytes,
                self.model.step_bytes,
            )
            self.totals = Totals(*parallel.total(*own))
            if self.graphs:
                self._capture(self.graphs)
        if folder:
            name = config.handoff.role if config.handoff else f"rank{parallel.rank}"
            self.profiler = StepProfiler(folder, name, self.device, is_follower=parallel.rank > 0)

    def held(self) -> MemoryParts:
        """What the device holds, of this rank."""
        weights = self.memory.weights if self.memory else weight_bytes(self.model)
        return MemoryParts.of(self.store.layout, self.store.num_blocks, len(self.newest) - 1, weights, self.memory)

    @property
    def store(self) -> KVStore:
        """This rank's part of the cache."""
        return self.paged.store

    @property
    def whole_layout(self) -> KVLayout:
        """Of the cache of all heads and layers, whichever of them are this rank's."""
        return KVLayout(kv_spec(self.model_config, self.dtype), self.format)

    def expert_tokens(self) -> dict[int, list[int]]:
        """Tokens that have chosen each expert so far, by layer, where `expert_load` counts. Waits for the GPU."""
        return self.expert_load.totals() if self.expert_load else {}

    @torch.inference_mode()
    def launch(
        self,
        batch: ScheduledBatch,
        allowed: NDArray[np.int32] | None = None,
        land: Callable[[Import], None] | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> Handle:
        """Start one step.

        Args:
            allowed: [len(batch.samples), ceil(vocab_size / 32)]: bit i % 32 of word i // 32 is set where token i may
                be chosen.
            land: puts what the batch imports into the store.
            on_layer: called with each layer that has written its keys and values, unless the step is a graph.

        Raises:
            UnsupportedError: the cache's format cannot hold what the model makes of these tokens.
            CapacityError: the GPU has no memory left for so large a step.
        """
        if self.profiler:
            self.profiler.begin_step()
        self._move(batch)
        try:
            if batch.drafts:
                self._propose(batch.drafts)
            for imported in batch.imports:
                assert land is not None
                land(imported)
            return self._sample(batch, *self._run(batch, on_layer), allowed)
        except torch.OutOfMemoryError as error:
            self.store.take_fault()  # whoever comes next has nothing to do with it
            raise CapacityError(
                f"{self.device} has no memory left for a step of {sum(span.length for span in batch.spans)} tokens; "
                "lower --gpu-memory-utilization, --max-num-batched-tokens or --max-num-seqs"
            ) from error

    def collect(self, handle: Handle) -> StepResult:
        """What a launched step yielded; nothing on a stage that is not the last.

        Raises:
            UnsupportedError: the cache's format cannot hold what the model made of these tokens.
        """
        if handle.ready:
            handle.ready.synchronize()
        batch = handle.batch
        *token_ids, fault = handle.outcome.tolist()
        if self.profiler:
            self.profiler.end_step(self.held)
        check_fits(not fault)
        if not self.parallel.stage.is_last:
            return StepResult([], [], [])
        num_top = [sample.params.logprobs for sample in batch.samples]
        scores = iter(handle.scores.rows([k for k in num_top if k is not None]) if handle.scores else ())
        logprobs = [None if k is None else next(scores) for k in num_top]
        per_target = (span.num_top for span in batch.spans for _ in span.targets)
        prompt = (row for piece in handle.prompt_scores for row in piece.rows(list(islice(per_target, len(piece)))))
        prompt_logprobs = [list(islice(prompt, len(span.targets))) for span in batch.spans]
        return StepResult(token_ids, logprobs, prompt_logprobs)

    @torch.inference_mode()
    def take_in(self, token_ids: Mapping[int, int]) -> None:
        """Ids that the last stage of a pipeline has sampled, by slot, for the first one to compute."""
        sent = {"slots": np.array([*token_ids], np.int64), "ids": np.array([*token_ids.values()], np.int64)}
        slots, ids = on_device(sent, self.device).values()
        self.newest.index_copy_(0, slots, ids)

    def draw(self, batch: ScheduledBatch) -> Tensor:
        """Compute a step and choose its samples, in `newest`, for another model; the logits they are chosen by."""
        logits, greedy, _ = self._run(batch)
        if batch.samples:
            self._choose(batch.samples, logits, greedy)
        return logits

    # A step, in its order

    def _move(self, batch: ScheduledBatch) -> None:
        """What must happen to the memory of sequences before the step runs."""
        for out in batch.swap_outs:
            self.swap_space.save(out.memory.blocks, out.memory.slot, out.units)
        for memory in batch.wipes:  # NaN would reach those that own the memory next
            self.store.clear(memory.blocks, memory.slot)
        for back in batch.swap_ins:
            self.swap_space.load(back.units, back.memory.blocks, back.memory.slot)

    def _propose(self, drafts: Sequence[Draft]) -> None:
        """Have drafted tokens where the step finds them."""
        if self._drafter:
            self._drafter.propose(drafts)
            return
        slots, places, token_ids = zip(
            *((draft.slot, 1 + index, token) for draft in drafts for index, token in enumerate(draft.token_ids)),
            strict=True,
        )
        arrays = {"places": places, "slots": slots, "token_ids": token_ids}
        sent = on_device({name: np.array(values, np.int64) for name, values in arrays.items()}, self.device)
        self.recent.index_put_((sent["places"], sent["slots"]), sent["token_ids"])

    def _run(
        self, batch: ScheduledBatch, on_layer: Callable[[int], None] | None = None
    ) -> tuple[Tensor, Tensor | None, list[Scores]]:
        """Compute the spans.

        Returns:
            What the samples are chosen by, on the last stage logits; the likeliest tokens, where a graph has found them
            and kept them in `newest`; scores of the spans' targets.
        """
        ran = self.graphs.launch(batch) if self.graphs else None
        kv_batch, computed, greedy = ran or (*self._hidden_states(batch, on_layer), None)
        self._count_experts(sum(span.length for span in batch.spans))
        self.paged.seal(kv_batch)
        for fork in batch.forks:
            self.store.fork(fork.source_block, fork.source_slot, fork.block, fork.slot)
        if self.graphs:
            new = (span.slot for span in batch.spans if span.token_ids and not ran)
            self.graphs.forget([*new, *(fork.slot for fork in batch.forks)])
        if ran or not self.parallel.stage.is_last:
            return computed, greedy, []
        prompt_scores, rows = [], [sample.span for sample in batch.samples]
        if has_targets(batch):
            prompt_scores = score_prompts(batch.spans, computed, self.model.logits)
            ends = list(accumulate(span.length for span in batch.spans))
            rows = [ends[span] - 1 for span in rows]
        if rows != list(range(len(computed))):
            computed = computed[on_device({"rows": np.array(rows, np.int64)}, self.device)["rows"]]
        return self.model.logits(computed), None, prompt_scores

    def _hidden_states(self, batch: ScheduledBatch, on_layer: Callable[[int], None] | None) -> tuple[KVBatch, Tensor]:
        """Where the step's tokens stand, and the hidden states of each span's last one; of all where some of them have
        targets, or the stage is not the last."""
        kv_batch = KVBatch.build(self.store.format, list(map(as_kv_span, batch.spans)), self.device)
        arrays = {"ids": ids_of(batch.spans, self.recent.shape[1]), "wanted": lasts(batch.spans)}
        sent = on_device(arrays, self.device)
        needs_all = has_targets(batch) or len(sent["ids"]) == len(batch.spans)
        wanted = None if needs_all else sent["wanted"]
        return kv_batch, self.paged(known(sent["ids"], self.recent), kv_batch, wanted, on_layer)

    def _count_experts(self, tokens: int) -> None:
        """So many have been computed; what stands behind them fills up a graph."""
        if self.expert_load:
            self.expert_load.count(tokens)

    def _sample(
        self,
        batch: ScheduledBatch,
        logits: Tensor,
        greedy: Tensor | None,
        prompt_scores: list[Scores],
        allowed: NDArray[np.int32] | None,
    ) -> Handle:
        """Choose the tokens of a step that has been computed, on the last stage."""
        fault = self.store.take_fault()
        token_ids, samples = fault[:0], batch.samples if self.parallel.stage.is_last else []
        with Range("kvtool::sampling"):
            if samples:
                token_ids = self._choose(samples, logits, greedy, allowed)
            if samples and batch.drafts:
                if self._drafter:
                    self._drafter.settle(samples, logits, token_ids)
                token_ids = verify(token_ids, Drafts.send(samples, self.device), self.recent)
            scores = score_samples(samples, logits, token_ids)
        return Handle(
            batch,
            outcome=to_host(torch.cat([token_ids, fault])),
            scores=scores and scores.to_host(),
            prompt_scores=[piece.to_host() for piece in prompt_scores],
            ready=torch.cuda.current_stream().record_event() if self.device.type == "cuda" else None,
        )

    def _choose(
        self, samples: Sequence[Sample], logits: Tensor, greedy: Tensor | None, allowed: NDArray[np.int32] | None = None
    ) -> Tensor:
        """The samples' tokens, also in `newest`, where those of a graph are."""
        if greedy is not None and all(is_greedy(sample) for sample in samples):
            return greedy
        return self.sampler.sample(logits, samples, allowed)

    # Starting

    def _measure(self, config: EngineConfig, layout: KVLayout) -> DeviceMemory:
        """Run the largest prompt step, draw for all sequences and capture the largest graphs, on a small store.

        Raises:
            CapacityError: the GPU has too little for that.
        """
        _, total = torch.cuda.mem_get_info(self.device)
        weights = torch.cuda.memory_allocated(self.device)
        largest = largest_step(config, layout.format, self.max_model_len)
        try:
            self._hold(config, layout, sum(len(span.blocks) for span in largest.spans) + 1)
            if self.graphs:
                self._compile(config, self.graphs, largest)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            handle, launched = self.launch(largest), time.perf_counter()
            self.collect(handle)
            self.largest_step_seconds = time.perf_counter() - launched
            if self.store.sealer:
                self.store.sealer.compile()
            step, graphs = torch.cuda.max_memory_reserved(self.device), 0
            if self.graphs:
                torch.cuda.empty_cache()
                before = torch.cuda.memory_reserved(self.device)
                self.graphs.capture(largest=True)
                torch.cuda.empty_cache()
                graphs = torch.cuda.memory_reserved(self.device) - before
                step = max(step, torch.cuda.max_memory_reserved(self.device) - graphs)
            torch.cuda.synchronize(self.device)
        except (torch.OutOfMemoryError, CapacityError) as error:
            raise CapacityError(
                f"{self.device} has no room for a step of {config.max_num_batched_tokens} tokens beside "
                f"{size(weights)} of weights; lower --max-num-batched-tokens or --max-num-seqs"
            ) from error
        workspace = step - weights - self.store.nbytes
        free, _ = torch.cuda.mem_get_info(self.device)
        others = total - free - torch.cuda.memory_reserved(self.device)
        del self.paged, self.graphs
        torch.cuda.empty_cache()
        self.recent.zero_()
        if self.expert_load:
            self.expert_load.reset()
        return DeviceMemory(int(total * config.gpu_memory_utilization), others, weights, workspace, graphs)

    def _compile(self, config: EngineConfig, graphs: StepGraphs, largest: ScheduledBatch) -> None:
        """Compile the kernels of all steps side by side, where each would otherwise be waited for when it is first
        launched.

        Which ones those are the steps themselves tell, launched with none of Triton's kernels run, and so on numbers
        that mean nothing: no step here looks at what it has computed. Of layers that are alike one is launched; the
        first is unlike all others, as nothing stands in the residual stream before it.
        """
        from kvtool.kernels.launch import compiling

        start, layers = time.perf_counter(), self.model.layers
        kinds: dict[tuple[Hashable, ...], str] = {}
        for layer, fmt in zip(self._layers, self.store.format.layers, strict=True):
            weights = ((name, x.shape, x.dtype) for name, x in layers[str(layer)].state_dict().items())
            kinds.setdefault((not kinds, fmt, self.model_config.sliding_window[layer], *weights), str(layer))
        self.model.layers = torch.nn.ModuleDict({name: layers[name] for name in kinds.values()})
        try:
            with compiling(cpu_threads(len(config.ranks_here))):
                graphs.rehearse()
                _, hidden = self._hidden_states(largest, None)
                if self.parallel.stage.is_last:
                    self.sampler.sample(self.model.logits(hidden[: len(largest.samples)]), largest.samples)
                if self.store.sealer:
                    self.store.sealer.compile()
        finally:
            self.model.layers = layers
        self.compile_seconds = time.perf_counter() - start

    def _allocate(self, config: EngineConfig, layout: KVLayout) -> None:
        """Hold a cache, and space to swap to, as large as every rank has room for.

        Raises:
            CapacityError: not even one request fits.
        """
        with self.parallel.agreeing():
            memory = cache_memory(config, layout, self.memory)
            fits = capacity(config, self.model_config, layout, memory)
        num_units = config.swap_space // len(config.ranks_here) // layout.block_bytes
        num_blocks, self.max_model_len, num_units = self.parallel.least(*fits, num_units)
        self._hold(config, layout, num_blocks)
        with self.parallel.agreeing():
            self.swap_space = SwapSpace(self.store, num_units)

    def _hold(self, config: EngineConfig, layout: KVLayout, num_blocks: int) -> None:
        """Put the model over a store of so many blocks, with graphs of its steps, yet to be captured."""
        with self.parallel.agreeing():
            store = allocate(layout, num_blocks, config.max_num_seqs, self.dtype, self.device)
            self.paged = PagedModel(self.model, store, config.attention_backend, self.parallel)
        self.graphs = self._graphs(config)

    def _graphs(self, config: EngineConfig) -> StepGraphs | None:
        """Graphs of steps, yet to be captured; all ranks have the same ones, or none."""
        attention = self.paged.attention
        (is_capturable,) = self.parallel.least(config.cuda_graph and attention.is_capturable)
        if not is_capturable:
            return None
        fmt, captured = self.store.format, attention.captured_tokens
        gpu = find_gpu(torch.cuda.get_device_name(self.device))
        worthwhile = worthwhile_tokens(self.model.products / len(self._layers), gpu[1] if gpu else None)
        (worthwhile,) = self.parallel.least(worthwhile if captured is None else min(worthwhile, captured))
        most_decodes = len(self.recent) * config.max_num_seqs
        # Stages but the last have no logits, and nobody looks at what comes of their hidden states.
        head = self.model.logits if self.parallel.stage.is_last else _kept
        return StepGraphs(
            self.paged,
            head,
            fmt,
            self.recent,
            max_blocks=max(1, fmt.num_blocks(self.max_model_len)),
            rooms=prompt_rooms(most_decodes, worthwhile, config.max_num_batched_tokens),
        )

    def _capture(self, graphs: StepGraphs) -> None:
        """Capture all graphs on the store as it is.

        Raises:
            CapacityError: the GPU has no memory left for them.
        """
        try:
            graphs.capture()
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{self.device} has no memory left for CUDA graphs; "
                "lower --gpu-memory-utilization or --kv-cache-memory, or add --no-cuda-graph"
            ) from error


def _kept(hidden: Tensor, out: Tensor | None) -> Tensor:
    """`hidden` as it is, in `out` if that is given."""
    return hidden if out is None else out.copy_(hidden)
