"""The model on its device: a scheduled batch goes in, sampled token ids come out."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvtool.attention import PagedAttention
from kvtool.attention.layer import AttentionLayer
from kvtool.config import EngineConfig
from kvtool.cuda_graph import DecodeGraphs, as_kv_span
from kvtool.errors import CapacityError, ConfigError
from kvtool.kv.batch import KVBatch
from kvtool.kv.codecs import check_fits
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore
from kvtool.kv.swap import SwapSpace
from kvtool.models import load_config, load_model, resolve_model
from kvtool.models.config import ModelConfig
from kvtool.request import ScheduledBatch, StepResult, TokenLogprobs
from kvtool.sampler import is_greedy, sample, token_logprobs

SCORED_ROWS = 128  # of logits at a time
CPU_KV_CACHE_MEMORY = 1 << 30
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of tokens [N], and of the most likely ones at their places, ids and values [N, k]."""

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def __len__(self) -> int:
        return len(self.logprobs)

    def rows(self, num_top: Sequence[int]) -> list[TokenLogprobs]:
        """As many of the most likely ones as each row asks for."""
        columns = (self.logprobs.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist())
        return [
            TokenLogprobs(logprob, ids[:k], values[:k])
            for logprob, ids, values, k in zip(*columns, num_top, strict=True)
        ]


@dataclass(frozen=True)
class Handle:
    """A step under way; its tensors may still be computing on the device.

    Attributes:
        token_ids: [len(batch.samples)].
        fault: [1], whether the store met what its format cannot hold.
        scores: of those samples that ask for them.
        prompt_scores: of all spans' targets, in pieces that follow each other.
    """

    batch: ScheduledBatch
    token_ids: Tensor
    fault: Tensor
    scores: Scores | None
    prompt_scores: list[Scores]


class Runner:
    """Model, KV store and sampler of one process.

    Attributes:
        path: local folder of the model.
        model_config: what the checkpoint is.
        max_model_len: tokens of prompt and answer together, as asked for or as model and cache allow.
        store: the KV cache, sized from the configuration.
        swap_space: for sequences that must make room.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.device = choose_device(config.device)
        self.path = resolve_model(config.model)
        self.model_config = load_config(self.path)
        self.dtype = choose_dtype(config, self.model_config, self.device)
        spec = kv_spec(self.model_config, self.dtype)
        layout = KVLayout(spec, resolve(config.kv, spec))
        with torch.inference_mode():
            self.model = load_model(
                self.path,
                self.model_config,
                dtype=self.dtype,
                device=self.device,
                load_format=config.load_format,
                seed=config.seed,
                max_model_len=config.max_model_len,
            )
            memory = _kv_cache_memory(config, self.device)
            num_blocks, self.max_model_len = _capacity(config, self.model_config, layout, memory)
            self.store = allocate(layout, num_blocks, config.max_num_seqs, self.dtype, self.device)
            self.swap_space = SwapSpace(self.store, config.swap_space // layout.block_bytes)
            self.newest = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=self.device)
        self.attention = PagedAttention(self.store, attention_layers(self.model_config), config.attention_backend)
        self.graphs = self._capture() if config.cuda_graph and self.attention.is_capturable else None

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch, allowed: NDArray[np.int32] | None = None) -> Handle:
        """Start one step.

        Args:
            allowed: [len(batch.samples), ceil(vocab_size / 32)]: bit i % 32 of word i // 32 is set where token i may
                be chosen.

        Raises:
            UnsupportedError: the cache's format cannot hold what the model makes of these tokens.
        """
        self._move(batch)
        if self.graphs and self.graphs.holds(batch.spans):
            kv_batch, logits, greedy = self.graphs.launch(batch.spans)
            self.store.seal(kv_batch)
            return self._sample(batch, logits, greedy, allowed, [])
        kv_batch = KVBatch.build(self.store.format, list(map(as_kv_span, batch.spans)), self.device)
        hidden = self.model(self._input_ids(batch, kv_batch), kv_batch.positions, partial(self._attend, kv_batch))
        self.store.seal(kv_batch)
        for fork in batch.forks:
            self.store.fork(fork.source_block, fork.source_slot, fork.block, fork.slot)
        if self.graphs:
            self.graphs.forget([*(span.slot for span in batch.spans), *(fork.slot for fork in batch.forks)])
        prompt_scores = self._score_prompts(batch, hidden)
        ends = list(accumulate(span.length for span in batch.spans))
        rows = [ends[sample.span] - 1 for sample in batch.samples]
        logits = self.model.logits(hidden if rows == list(range(len(hidden))) else hidden[rows])
        return self._sample(batch, logits, None, allowed, prompt_scores)

    def _sample(
        self,
        batch: ScheduledBatch,
        logits: Tensor,
        greedy: Tensor | None,
        allowed: NDArray[np.int32] | None,
        prompt_scores: list[Scores],
    ) -> Handle:
        """Choose the tokens of a step; `greedy` are the likeliest ones, where a graph has found them."""
        fault = self.store.take_fault()
        if not batch.samples:
            return Handle(batch, torch.empty(0, dtype=torch.int64), fault, None, prompt_scores)
        if greedy is not None and all(is_greedy(sample) for sample in batch.samples):
            token_ids = greedy.clone()
        else:
            mask = None if allowed is None else torch.from_numpy(allowed).to(self.device)
            token_ids = sample(logits, batch.samples, self.model_config.eos_token_ids, mask)
            self.newest[[sample.slot for sample in batch.samples]] = token_ids.clamp(min=0)
        return Handle(batch, token_ids, fault, _score_samples(batch, logits, token_ids), prompt_scores)

    def collect(self, handle: Handle) -> StepResult:
        """What a launched step yielded.

        Raises:
            UnsupportedError: the cache's format cannot hold what the model made of these tokens.
        """
        batch = handle.batch
        check_fits(not handle.fault.item())
        num_top = [sample.params.logprobs for sample in batch.samples]
        scores = iter(handle.scores.rows([k for k in num_top if k is not None]) if handle.scores else ())
        logprobs = [None if k is None else next(scores) for k in num_top]
        per_target = (span.num_top for span in batch.spans for _ in span.targets)
        prompt = (row for piece in handle.prompt_scores for row in piece.rows(list(islice(per_target, len(piece)))))
        prompt_logprobs = [list(islice(prompt, len(span.targets))) for span in batch.spans]
        return StepResult(handle.token_ids.tolist(), logprobs, prompt_logprobs)

    def _move(self, batch: ScheduledBatch) -> None:
        """What must happen to the memory of sequences before the step runs."""
        for out in batch.swap_outs:
            self.swap_space.save(out.memory.blocks, out.memory.slot, out.units)
        for memory in batch.wipes:  # NaN would reach those that own the memory next
            self.store.clear(memory.blocks, memory.slot)
        for back in batch.swap_ins:
            self.swap_space.load(back.units, back.memory.blocks, back.memory.slot)

    def _score_prompts(self, batch: ScheduledBatch, hidden: Tensor) -> list[Scores]:
        """Scores of all spans' targets; a few rows of logits at a time, as a whole prompt's fill the memory."""
        starts = accumulate((span.length for span in batch.spans), initial=0)
        rows = [start + i for start, span in zip(starts, batch.spans, strict=False) for i in range(len(span.targets))]
        targets = [target for span in batch.spans for target in span.targets]
        num_top = max((span.num_top for span in batch.spans), default=0)
        return [
            Scores(
                *token_logprobs(
                    self.model.logits(hidden[rows[i : i + SCORED_ROWS]]),
                    torch.tensor(targets[i : i + SCORED_ROWS], device=self.device),
                    num_top,
                )
            )
            for i in range(0, len(rows), SCORED_ROWS)
        ]

    @torch.inference_mode()
    def _capture(self) -> DecodeGraphs:
        """Capture decode steps of all sizes."""

        def step(ids: Tensor, kv_batch: KVBatch) -> Tensor:
            return self.model.logits(self.model(ids, kv_batch.positions, partial(self._attend, kv_batch)))

        fmt = self.store.format
        graphs = DecodeGraphs(step, fmt, self.newest, max(1, fmt.num_blocks(self.max_model_len)))
        graphs.capture()
        return graphs

    def _input_ids(self, batch: ScheduledBatch, kv_batch: KVBatch) -> Tensor:
        """Ids of a step's tokens: first the decodes', from what was sampled last, then those that the host knows."""
        num_decodes = sum(not span.token_ids for span in batch.spans)
        sampled = self.newest[kv_batch.tail_slots[:num_decodes]]
        known = [token for span in batch.spans[num_decodes:] for token in span.token_ids]
        return torch.cat([sampled, torch.tensor(known, device=self.device)]) if known else sampled

    def _attend(self, batch: KVBatch, layer: int, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(layer, q, key, value, batch)


def _score_samples(batch: ScheduledBatch, logits: Tensor, token_ids: Tensor) -> Scores | None:
    wanted = [(row, s.params.logprobs) for row, s in enumerate(batch.samples) if s.params.logprobs is not None]
    if not wanted:
        return None
    rows = [row for row, _ in wanted]
    return Scores(*token_logprobs(logits[rows], token_ids[rows].clamp(min=0), max(k for _, k in wanted)))


def choose_device(asked: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("no model runs there")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(":")[0]
        raise ConfigError(f"--device {asked}: {reason}; choose auto, cpu, cuda or cuda:N") from error
    return device


def choose_dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype not in DTYPES:
        raise ConfigError(f"--dtype {config.dtype}: must be one of {', '.join(DTYPES)}")
    auto = "float32" if device.type == "cpu" else model.dtype
    dtype: torch.dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    return dtype


def kv_spec(model: ModelConfig, dtype: torch.dtype) -> KVSpec:
    """What a model caches for each token."""
    stream = StreamSpec(model.num_kv_heads, model.head_dim)
    return KVSpec(model.num_layers, stream, stream, dtype.itemsize)


def attention_layers(model: ModelConfig) -> list[AttentionLayer]:
    return [
        AttentionLayer(model.num_heads, model.num_kv_heads, model.head_dim, model.softmax_scale, window)
        for window in model.sliding_window
    ]


def _kv_cache_memory(config: EngineConfig, device: torch.device) -> int:
    if config.kv_cache_memory is not None:
        return config.kv_cache_memory
    if device.type == "cpu":
        return CPU_KV_CACHE_MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * 0.8)


def _capacity(config: EngineConfig, model: ModelConfig, layout: KVLayout, memory: int) -> tuple[int, int]:
    """Blocks that fit in `memory` beside the tails, and the longest request that may run.

    Raises:
        CapacityError: not even one request fits.
        ConfigError: --max-model-len is beyond the model.
    """
    longest = config.max_model_len or model.max_position
    if longest > model.max_position:
        raise ConfigError(f"--max-model-len {longest}: the model's context is {model.max_position} tokens")
    fmt, tails = layout.format, config.max_num_seqs * layout.tail_bytes
    num_blocks = layout.num_blocks_within(memory, config.max_num_seqs)
    asked = f"--kv-cache-memory {_size(memory)}"
    if num_blocks < 1:
        raise CapacityError(
            f"{asked} is too small: {config.max_num_seqs} tails take {_size(tails)} and a block "
            f"{_size(layout.block_bytes)}; raise it or lower --max-num-seqs"
        )
    held = num_blocks * fmt.block_size + fmt.tail_tokens
    if config.max_model_len and held < longest:
        needed = tails + fmt.num_blocks(longest) * layout.block_bytes
        raise CapacityError(
            f"{asked} holds {held} tokens, fewer than one request of --max-model-len {longest}; "
            f"raise it to {_size(needed)} or lower --max-model-len"
        )
    return num_blocks, min(longest, held)


def allocate(
    layout: KVLayout, num_blocks: int, num_tail_slots: int, dtype: torch.dtype, device: torch.device
) -> KVStore:
    try:
        return KVStore(layout, num_blocks, num_tail_slots, dtype, device)
    except RuntimeError as error:  # torch's word for a failed allocation
        nbytes = num_blocks * layout.block_bytes + num_tail_slots * layout.tail_bytes
        raise CapacityError(
            f"{device} has no {_size(nbytes)} for the KV cache; ask for less with --kv-cache-memory"
        ) from error


def _size(nbytes: int) -> str:
    """`nbytes` as a size that --kv-cache-memory takes, rounded up."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{-(-nbytes * 10 >> shift) / 10:g}{unit}"
    return str(nbytes)
