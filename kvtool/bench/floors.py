"""What no implementation can beat on a machine: bytes that must be read, FLOPs that must be done, at its rates.

The floor of a figure uses rates measured on the machine. Whether a figure is possible at all is judged apart, on the
machine's datasheet and with its last-level cache given away for free, so that nothing true is refused.
"""

import asyncio
import contextlib
import os
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import msgspec

from kvtool.bench.metrics import Figures
from kvtool.errors import ConfigError
from kvtool.gpus import GPUS, find_gpu
from kvtool.request import EngineInfo

if TYPE_CHECKING:
    import torch

    from kvtool.layers.moe import MoEShape
    from kvtool.models.config import ModelConfig

# More than any CPU does: clock; bytes loaded from the first cache and FLOPs a core and cycle (two FMA units of 512
# bits; for 16-bit operands an AMX unit).
CPU_HZ, CPU_LOAD_BYTES = 6e9, 128
CPU_FLOPS = {"float64": 32, "float32": 64, "bfloat16": 2048, "float16": 2048}
EIGHT_BITS = ("w8a8", "fp8")  # ways to keep weights whose products are of 8-bit numbers
TIMES = 7  # the best of so many is a rate
IN_A_ROW = 10  # launches between two looks at the clock


class ModelCost(msgspec.Struct, frozen=True, kw_only=True):
    """What a model must read and compute.

    Attributes:
        weight_bytes: read for every step.
        flops_per_token: of its projections.
        flops_per_sample: of the output projection, once for each token that is chosen.
        flops_per_pair: of attention, for a query and a key.
        kv_token_bytes: of a cached token.
        window: most tokens that a query reads, averaged over layers; None: all.
    """

    weight_bytes: int
    flops_per_token: int
    flops_per_sample: int
    flops_per_pair: int
    kv_token_bytes: float
    window: float | None = None

    def prefill_flops(self, tokens: int, cached: int = 0) -> float:
        """FLOPs to the first token of a prompt of `tokens`, `cached` of which need no work."""
        new = tokens - cached
        read = self._read((cached + 1 + tokens) / 2)
        return new * (self.flops_per_token + read * self.flops_per_pair) + self.flops_per_sample

    def decode_flops(self, context: float) -> float:
        """FLOPs of one more token behind `context`."""
        return self.flops_per_token + self.flops_per_sample + self._read(context) * self.flops_per_pair

    def decode_bytes(self, context: float, sequences: int) -> float:
        """Bytes of one step of so many sequences."""
        return self.weight_bytes + sequences * self._read(context) * self.kv_token_bytes

    def _read(self, tokens: float) -> float:
        return tokens if self.window is None else min(tokens, self.window)


class Rates(msgspec.Struct, frozen=True):
    """How fast a machine is.

    Attributes:
        source: where the numbers come from.
        cache_bytes: that may never leave its last-level cache.
    """

    source: str
    bytes_per_s: float
    flops_per_s: float
    cache_bytes: int = 0

    def seconds(self, nbytes: float, flops: float) -> float:
        """What these take at least."""
        return max(max(0.0, nbytes - self.cache_bytes) / self.bytes_per_s, flops / self.flops_per_s)

    def times(self, devices: int) -> "Rates":
        """Of so many together."""
        if devices == 1:
            return self
        source, n = f"{devices} × {self.source}", devices
        return Rates(source, n * self.bytes_per_s, n * self.flops_per_s, n * self.cache_bytes)


class Floors(msgspec.Struct, frozen=True, kw_only=True):
    """Floors of one model on one machine.

    Attributes:
        rates: that floors are computed with.
        peak: that figures are judged by; None: they are not.
        steps: the target computes one token of a sequence in a step, which reads all weights. One that speculates does
            not, so that of a foreign server only prompts and the sum of its work are judged.
        max_num_seqs: sequences in a step at most.
        least_weight_bytes: that figures are judged by: a foreign server may have quantised what `model` counts.
    """

    model: ModelCost
    rates: Rates
    peak: Rates | None
    steps: bool
    max_num_seqs: int
    least_weight_bytes: int

    def ttft_ms(self, prompt_tokens: int, cached_tokens: int = 0) -> float:
        return self.rates.seconds(self.model.weight_bytes, self.model.prefill_flops(prompt_tokens, cached_tokens)) * 1e3

    def tpot_ms(self, context: float, sequences: int) -> float:
        """Of a step of so many sequences with `context` tokens each."""
        count = min(sequences, self.max_num_seqs)
        flops = count * self.model.decode_flops(context)
        return self.rates.seconds(self.model.decode_bytes(context, count), flops) * 1e3

    def impossible(self, figures: Figures, sequences: int) -> list[str]:
        """What of `figures` of so many requests at once no such machine can do, in words."""
        peak, model = self.peak, self.model
        if peak is None or not figures.ttft.count:
            return []
        count, prompt = figures.ttft.count, figures.least_prompt
        cached = min(figures.most_cached, prompt - 1)
        ttft = peak.seconds(self.least_weight_bytes, model.prefill_flops(prompt, cached)) * 1e3
        flops = float((figures.prompt_tokens - figures.cached_tokens) * model.flops_per_token)
        flops += (figures.output_tokens - count) * model.decode_flops(prompt)
        bounds = [("TTFT", "ms", figures.ttft.least, ttft), ("run", "s", figures.seconds, flops / peak.flops_per_s)]
        if self.steps:
            step = peak.seconds(model.decode_bytes(prompt, 1), model.decode_flops(prompt))
            steps = figures.output_tokens / min(sequences, self.max_num_seqs)
            bounds.append(("run", "s", figures.seconds, steps * step))
            bounds += [("TPOT", "ms", figures.tpot.least, step * 1e3)] if figures.tpot.count else []
        return [
            f"a {what} of {measured:.3g} {unit} is faster than {peak.source} can be, {least:.3g} {unit}"
            for what, unit, measured, least in bounds
            if measured < least
        ]


# --- our own engine, on this machine ---------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def floor_probe() -> AsyncIterator[Callable[[EngineInfo], Awaitable[Floors]]]:
    """What measures the floors of an engine that runs on this machine and has nothing to do just then.

    A process of its own, which leaves no memory of torch's and none of a GPU behind. It starts with the block, so that
    importing torch goes on while the engine does the same.
    """
    code = "import sys; sys.path[0] = sys.argv[1]; from kvtool.bench.floors import main; main()"
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2])]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )

    async def measure(info: EngineInfo) -> Floors:
        answer, complaint = await process.communicate(msgspec.json.encode(info))
        if process.returncode:
            reason = complaint.decode(errors="replace").strip().rpartition("\n")[2]
            raise ConfigError(f"the rates of this machine cannot be measured: {reason}; leave them out with --no-floor")
        return msgspec.json.decode(answer, type=Floors)

    try:
        yield measure
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def main() -> None:
    """The process: read what an engine says of itself, print its floors."""
    import torch

    from kvtool.models import load_config
    from kvtool.processes import cpu_threads

    info = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineInfo)
    torch.set_num_threads(cpu_threads())
    dtype = getattr(torch, info.dtype)
    model = cost(load_config(Path(info.path)), dtype.itemsize, info.block_bytes / info.block_size)
    if info.quantization != "none":
        model = msgspec.structs.replace(model, weight_bytes=info.step_bytes)
    device = torch.device(info.device)
    peak = peak_of(info.device, info.dtype, eight_bit=info.quantization in EIGHT_BITS)
    devices = 1 if device.type == "cpu" else info.num_ranks
    floors = Floors(
        model=model,
        rates=measure_rates(dtype, device, model.weight_bytes, info.quantization).times(devices),
        peak=peak and peak.times(devices),
        steps=True,
        max_num_seqs=info.max_num_seqs,
        least_weight_bytes=model.weight_bytes,
    )
    sys.stdout.buffer.write(msgspec.json.encode(floors))


def cost(config: "ModelConfig", element_size: int, kv_token_bytes: float) -> ModelCost:
    """What a decoder costs, its weights and the two products of attention; norms and such are left out.

    Of experts those of one token count, which every step reads at least.
    """
    projections = config.num_layers * _attention_weights(config)
    projections += sum(_mlp_weights(config, experts) for experts in config.experts)
    output = config.hidden_size * config.vocab_size
    value_dim = config.mla.value_dim if config.mla else config.head_dim
    windows = [min(window or config.max_position, config.max_position) for window in config.sliding_window]
    return ModelCost(
        weight_bytes=(projections + output) * element_size,
        flops_per_token=2 * projections,
        flops_per_sample=2 * output,
        flops_per_pair=2 * config.num_layers * config.num_heads * (config.head_dim + value_dim),
        kv_token_bytes=kv_token_bytes,
        window=sum(windows) / len(windows) if any(config.sliding_window) else None,
    )


def _attention_weights(config: "ModelConfig") -> int:
    """Elements of one layer's attention."""
    hidden, heads = config.hidden_size, config.num_heads * config.head_dim
    mla = config.mla
    if mla is None:
        return 2 * hidden * (heads + config.num_kv_heads * config.head_dim)
    queries = mla.q_lora_rank * (hidden + heads) if mla.q_lora_rank else hidden * heads
    latents = hidden * (mla.kv_lora_rank + mla.rope_dim)
    products = mla.kv_lora_rank * (mla.nope_dim + mla.value_dim)
    return queries + latents + config.num_heads * (products + mla.value_dim * hidden)


def _mlp_weights(config: "ModelConfig", experts: "MoEShape | None") -> int:
    """Elements of one layer's MLP, or of what a token passes of its experts."""
    if experts is None:
        return 3 * config.hidden_size * config.intermediate_size
    width = experts.routing.top_k * experts.intermediate_size + experts.shared_size
    return config.hidden_size * (3 * width + experts.routing.num_experts + experts.shared_gate)


def measure_rates(dtype: "torch.dtype", device: "torch.device", nbytes: int, quantization: str = "none") -> Rates:
    """Rates of this machine: reading a memory of `nbytes` over and over, so that what fits a cache comes from there as
    a model's weights do, and multiplying square matrices of random numbers, of which a GPU multiplies fewer a second
    than of ones. A GPU reads fastest where it sums up, a CPU where it multiplies with a vector.

    Args:
        quantization: how weights are kept; with 8 bits a GPU multiplies such numbers.
    """
    import torch

    gpu = device.type == "cuda"
    width, most = (8192, 2 << 30) if gpu else (1024, 1 << 30)
    rows = max(1, min(nbytes, most) // (width * (4 if gpu else dtype.itemsize)))
    weights = torch.ones(rows, width, dtype=torch.float32 if gpu else dtype, device=device)
    vector = torch.ones(width, dtype=weights.dtype, device=device)
    square = torch.randn(width, width, dtype=dtype, device=device)
    streamed = best_seconds(weights.sum if gpu else lambda: torch.mv(weights, vector), device)
    multiplied = best_seconds(_product(square, quantization if gpu else "none"), device)
    name = torch.cuda.get_device_name(device) if gpu else cpu_name()
    return Rates(f"measured on {name}", weights.nbytes / streamed, 2 * width**3 / multiplied)


def _product(square: "torch.Tensor", quantization: str) -> Callable[[], object]:
    """A product of square matrices, of 8-bit numbers where weights are such."""
    import torch

    if quantization in EIGHT_BITS:
        from kvtool.kernels.quantized_rows import FP8, quantize_rows
        from kvtool.kernels.w8a8 import w8a8_linear

        rows = quantize_rows(square, torch.int8 if quantization == "w8a8" else FP8)
        return lambda: w8a8_linear(rows, rows.codes, rows.scales)
    return lambda: torch.mm(square, square)


def best_seconds(work: Callable[[], object], device: "torch.device") -> float:
    """Least time that `work` took, of a few times; on a GPU, whose launches take time too, of a few in a row each."""
    import torch

    in_a_row = IN_A_ROW if device.type == "cuda" else 1

    def timed() -> float:
        start = perf_counter()
        for _ in range(in_a_row):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (perf_counter() - start) / in_a_row

    return min(timed() for _ in range(TIMES + 1))


def peak_of(device: str, dtype: str, eight_bit: bool) -> Rates | None:
    """What the datasheet of this machine's device promises; None for a GPU that is not known."""
    import torch

    if device != "cpu":
        return datasheet(torch.cuda.get_device_name(device), eight_bit)
    cores = os.cpu_count() or 1
    source = f"any CPU of {cores} cores"
    return Rates(source, cores * CPU_HZ * CPU_LOAD_BYTES, cores * CPU_HZ * CPU_FLOPS[dtype], last_level_cache())


def last_level_cache() -> int:
    """Bytes of the CPU's caches that are shared last, all of them together."""
    sizes = {}
    for cpu in Path("/sys/devices/system/cpu").glob("cpu[0-9]*"):
        levels = sorted(cpu.glob("cache/index[0-9]*"))
        if levels:
            shared = (levels[-1] / "shared_cpu_list").read_text()
            sizes[shared] = int((levels[-1] / "size").read_text().strip().removesuffix("K")) << 10
    return sum(sizes.values())


def cpu_name() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else "this CPU"


# --- a server elsewhere ----------------------------------------------------------------------------------------------


def foreign_floors(config: Path, gpu: str) -> Floors:
    """Floors of a server of which only the user knows what it runs, and on what: both by the datasheet.

    The floor is that of 16-bit weights; a figure is judged by 8-bit ones and 8-bit FLOPs.

    Args:
        config: the model's folder or its config.json.
        gpu: a name from `GPUS`, or `NAME:COUNT`.

    Raises:
        ConfigError: the GPU is not known.
        ModelError: the config cannot be read.
    """
    from kvtool.models import load_config

    name, _, count = gpu.partition(":")
    peak = datasheet(name, eight_bit=True)
    if peak is None or (count and not (count.isdecimal() and int(count) > 0)):
        raise ConfigError(f"--gpu {gpu}: write NAME or NAME:COUNT, with a NAME of {', '.join(GPUS)}")
    rates = peak.times(int(count or 1))
    model = load_config(config if config.is_dir() else config.parent)
    mla = model.mla
    elements = mla.kv_lora_rank + mla.rope_dim if mla else 2 * model.num_kv_heads * model.head_dim
    kv_token_bytes = 2 * model.num_layers * elements
    return Floors(
        model=cost(model, 2, kv_token_bytes),
        rates=rates,
        peak=rates,
        steps=False,
        max_num_seqs=1 << 30,
        least_weight_bytes=cost(model, 1, kv_token_bytes).weight_bytes,
    )


def datasheet(name: str, eight_bit: bool) -> Rates | None:
    """Peaks of a GPU by its name as NVIDIA writes it, or part of that; None where it is not known."""
    if (found := find_gpu(name)) is None:
        return None
    known, gpu = found
    flops = gpu.flops8 if eight_bit else gpu.flops16
    return Rates(f"the datasheet of {known}", gpu.bytes_per_s, flops, gpu.cache_bytes)
