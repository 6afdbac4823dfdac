"""How a device's memory is shared out: weights, what a step needs beside them, and the KV cache."""

from dataclasses import astuple, dataclass
from itertools import accumulate

import torch

from kvtool.config import EngineConfig
from kvtool.errors import CapacityError, ConfigError
from kvtool.kv.format import KVFormat
from kvtool.kv.layout import KVLayout
from kvtool.kv.store import KVStore
from kvtool.models.config import ModelConfig
from kvtool.request import Sample, SamplingParams, ScheduledBatch, ScheduledSpan
from kvtool.token_scores import SCORED_ROWS

CPU_KV_CACHE_MEMORY = 1 << 30


@dataclass(frozen=True)
class DeviceMemory:
    """What a GPU's memory is needed for beside the KV cache, in bytes: as measured by running the largest step, or as
    `kvtool.sizing.fit` counts it beforehand.

    Attributes:
        usable: of the whole GPU, what --gpu-memory-utilization allows.
        others: of other processes, CUDA itself and the kernels' code.
        weights: of the model.
        workspace: of a step.
        graphs: of what CUDA graphs hold beside that.
    """

    usable: int
    others: int
    weights: int
    workspace: int
    graphs: int

    @property
    def for_cache(self) -> int:
        return self.usable - self.others - self.weights - self.workspace - self.graphs

    def __str__(self) -> str:
        parts = (
            f"others {size(self.others)}, weights {size(self.weights)}, workspace {size(self.workspace)}, "
            f"CUDA graphs {size(self.graphs)}"
        )
        return f"{size(self.usable)} may be used: {parts}, which leaves {size(max(0, self.for_cache))}"


@dataclass(frozen=True)
class MemoryParts:
    """The bytes of a device that serves a model, by what they are for.

    Attributes:
        weights: of the model, with its table of rotations.
        codes: of packed blocks; at 16 bits, keys and values as they are.
        metadata: of packed blocks: scales, zeros and padding.
        windows: tails, the newest tokens of each sequence at full precision.
        workspace: what a step needs; None: not known (a CPU's).
        graphs: of CUDA graphs, likewise.
        reserve: other processes, CUDA itself and the kernels' code, likewise.
    """

    weights: int
    codes: int
    metadata: int
    windows: int
    workspace: int | None
    graphs: int | None
    reserve: int | None

    @classmethod
    def of(
        cls, layout: KVLayout, num_blocks: int, num_tail_slots: int, weights: int, device: DeviceMemory | None
    ) -> "MemoryParts":
        """Of a cache beside a model; `device` is None on a CPU."""
        codes, blocks = num_blocks * layout.code_bytes, num_blocks * layout.block_bytes
        beside = (device.workspace, device.graphs, device.others) if device else (None, None, None)
        return cls(weights, codes, blocks - codes, num_tail_slots * layout.tail_bytes, *beside)

    @property
    def total(self) -> int:
        return sum(part or 0 for part in astuple(self))

    def named(self) -> dict[str, int | None]:
        """Parts by their names for people."""
        names = ("weights", "KV codes", "scales and zeros", "windows", "workspace", "CUDA graphs", "reserve")
        return dict(zip(names, astuple(self), strict=True))


def cache_memory(config: EngineConfig, layout: KVLayout, device: DeviceMemory | None) -> int:
    """Bytes of KV cache; `device` is None on CPU.

    Raises:
        CapacityError: the GPU has less than what was asked for.
    """
    asked = config.kv_cache_memory
    if device is None:
        return CPU_KV_CACHE_MEMORY if asked is None else asked
    if asked is None and device.for_cache <= 0:
        raise CapacityError(f"no room for a KV cache: {device}; raise --gpu-memory-utilization or lower --max-num-seqs")
    if asked is not None and asked > device.for_cache:
        fits = max(0, layout.num_blocks_within(device.for_cache, config.max_num_seqs)) * layout.format.block_size
        raise CapacityError(
            f"--kv-cache-memory {size(asked)}: {device} ({fits:,} tokens in this format); "
            "lower it, raise --gpu-memory-utilization or use fewer --nbits"
        )
    return device.for_cache if asked is None else asked


def capacity(config: EngineConfig, model: ModelConfig, layout: KVLayout, memory: int) -> tuple[int, int]:
    """Blocks that fit in `memory` beside the tails, and the longest request that may run.

    Raises:
        CapacityError: not even one request fits.
    """
    longest = config.max_model_len or model.max_position
    fmt, tails = layout.format, config.max_num_seqs * layout.tail_bytes
    num_blocks = layout.num_blocks_within(memory, config.max_num_seqs)
    asked = f"--kv-cache-memory {size(memory)}"
    if num_blocks < 1:
        raise CapacityError(
            f"{asked} is too small: {config.max_num_seqs} tails take {size(tails)} and a block "
            f"{size(layout.block_bytes)}; raise it or lower --max-num-seqs"
        )
    held = num_blocks * fmt.block_size + fmt.tail_tokens
    if config.max_model_len and held < longest:
        needed = tails + fmt.num_blocks(longest) * layout.block_bytes
        raise CapacityError(
            f"{asked} holds {held} tokens, fewer than one request of --max-model-len {longest}; "
            f"raise it to {size(needed)} or lower --max-model-len"
        )
    return num_blocks, min(longest, held)


def check_context(config: EngineConfig, model: ModelConfig) -> None:
    """Raises ConfigError where --max-model-len is beyond the model."""
    if config.max_model_len and config.max_model_len > model.max_position:
        raise ConfigError(f"--max-model-len {config.max_model_len}: the model's context is {model.max_position} tokens")


def allocate(
    layout: KVLayout, num_blocks: int, num_tail_slots: int, dtype: torch.dtype, device: torch.device
) -> KVStore:
    """The store.

    Raises:
        CapacityError: the device has not so much.
    """
    try:
        return KVStore(layout, num_blocks, num_tail_slots, dtype, device)
    except RuntimeError as error:  # torch's word for a failed allocation
        nbytes = num_blocks * layout.block_bytes + num_tail_slots * layout.tail_bytes
        raise CapacityError(
            f"{device} has no {size(nbytes)} for the KV cache; ask for less with --kv-cache-memory"
        ) from error


def size(nbytes: int) -> str:
    """`nbytes` as a size that --kv-cache-memory takes, rounded up."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{-(-nbytes * 10 >> shift) / 10:g}{unit}"
    return str(nbytes)


def largest_step(config: EngineConfig, fmt: KVFormat, max_model_len: int) -> ScheduledBatch:
    """Prompts of as many tokens as a step may have, none longer than `max_model_len`, and as many draws, all scored."""
    total = min(config.max_num_batched_tokens, config.max_num_seqs * max_model_len)
    ends = sorted(min(max_model_len, total - first) for first in range(0, total, max_model_len))
    lasts = list(accumulate(map(fmt.num_blocks, ends), initial=0))
    spans = [
        ScheduledSpan(
            id="",
            slot=slot,
            start=0,
            end=end,
            token_ids=[0] * end,
            blocks=list(range(lasts[slot], lasts[slot + 1])),
            targets=[0] * min(end - 1, SCORED_ROWS),
            num_top=1,
        )
        for slot, end in enumerate(ends)
    ]
    params = SamplingParams(temperature=1, top_p=0.9, repetition_penalty=1.1, logprobs=1)
    samples = [
        Sample(id="", span=0, slot=slot, position=ends[0], params=params, seed=0, num_generated=0, history=[0])
        for slot in range(config.max_num_seqs)
    ]
    return ScheduledBatch(spans=spans, samples=samples)
