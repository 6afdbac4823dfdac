"""What the machine and the server say of themselves while a run goes on: memory, power, KV cache."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from time import perf_counter
from typing import Any

from kvtool.bench.target import Target

PERIOD = 0.2  # seconds between looks
MOST_POINTS = 240  # of a timeline; then every other one is left out, and it is looked at half as often
# What servers call the share of their KV cache that requests own, and the requests that run and wait.
GAUGES = {
    "kv_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage"),
    "running": ("vllm:num_requests_running", "sglang:num_running_reqs"),
    "waiting": ("vllm:num_requests_waiting", "sglang:num_queue_reqs"),
}


class Telemetry:
    """Looks at the target, and where it runs on this machine at the GPUs and the memory of our own engine.

    Args:
        local: the target runs on this machine.
    """

    def __init__(self, target: Target, local: bool) -> None:
        self._target = target
        self._gpus = find_gpus() if local else []

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator["Readings"]:
        """Readings that go on until the block ends, and are complete then."""
        readings = Readings(self._gpus, await self._target.metrics())
        watcher = asyncio.create_task(readings.follow(self._target))
        try:
            yield readings
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            readings.end(await self._target.metrics())


class Readings:
    """What was seen during one run."""

    def __init__(self, gpus: list["Gpu"], counters: dict[str, float]) -> None:
        self._gpus, self._before, self._start = gpus, counters, perf_counter()
        self._counted: dict[str, float] = {}
        self._timeline: dict[str, list[float | None]] = {"seconds": [], **{name: [] for name in GAUGES}}
        self._period, self._rss = PERIOD, 0
        for gpu in gpus:
            gpu.begin()

    async def follow(self, target: Target) -> None:
        """Look again and again."""
        while True:
            self._look(await target.metrics())
            await asyncio.sleep(self._period)

    def end(self, counters: dict[str, float]) -> None:
        self._look(counters)
        grown = {name: value - self._before.get(name, 0.0) for name, value in counters.items() if is_counter(name)}
        self._counted = {name: value for name, value in grown.items() if value}
        for gpu in self._gpus:
            gpu.end(perf_counter() - self._start)

    def _look(self, metrics: dict[str, float]) -> None:
        self._timeline["seconds"].append(round(perf_counter() - self._start, 3))
        for name, known in GAUGES.items():
            self._timeline[name].append(next((metrics[metric] for metric in known if metric in metrics), None))
        if len(self._timeline["seconds"]) > MOST_POINTS:
            self._timeline = {name: values[::2] for name, values in self._timeline.items()}
            self._period *= 2
        self._rss = max(self._rss, children_rss())
        for gpu in self._gpus:
            gpu.look()

    def row(self, output_tokens: int) -> dict[str, Any]:
        """As in a result."""
        joules = [gpu.joules for gpu in self._gpus if gpu.joules is not None]
        seen = [value for value in self._timeline["kv_usage"] if value is not None]
        return {
            "gpus": [gpu.row() for gpu in self._gpus],
            "gpu_peak_mib": sum(used) if (used := [gpu.peak_mib for gpu in self._gpus if gpu.peak_mib]) else None,
            "joules_per_token": sum(joules) / output_tokens if joules and output_tokens else None,
            "engine_rss_mib": self._rss / 2**20 if self._rss else None,
            "kv_usage_peak": max(seen, default=None),
            "timeline": self._timeline,
            "server_metrics": self._counted,
        }


def is_counter(name: str) -> bool:
    return name.endswith(("_total", "_sum", "_count"))


# --- GPUs ------------------------------------------------------------------------------------------------------------


def find_gpus() -> list["Gpu"]:
    """Those that CUDA may use; none where there is no driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return list(map(Gpu, handles))
    wanted = {word.strip() for word in visible.split(",")}
    return [
        Gpu(handle)
        for index, handle in enumerate(handles)
        if str(index) in wanted or pynvml.nvmlDeviceGetUUID(handle) in wanted
    ]


class Gpu:
    """One NVIDIA GPU, as its driver sees it; what the driver does not tell stays None.

    Attributes:
        joules: used between `begin` and `end`, by the card's own counter, or else by the power at each look.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def begin(self) -> None:
        self._used: list[float] = []
        self._total = 0.0
        self._utilization: list[float] = []
        self._watts: list[float] = []
        self._energy = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        self.joules: float | None = None

    def look(self) -> None:
        if memory := self._ask("nvmlDeviceGetMemoryInfo"):
            self._used.append(memory.used / 2**20)
            self._total = memory.total / 2**20
        if rates := self._ask("nvmlDeviceGetUtilizationRates"):
            self._utilization.append(rates.gpu / 100)
        if milliwatts := self._ask("nvmlDeviceGetPowerUsage"):
            self._watts.append(milliwatts / 1e3)

    def end(self, seconds: float) -> None:
        energy = self._ask("nvmlDeviceGetTotalEnergyConsumption")  # mJ
        if energy is not None and self._energy is not None:
            self.joules = (energy - self._energy) / 1e3
        elif self._watts:
            self.joules = mean(self._watts) * seconds

    @property
    def peak_mib(self) -> float | None:
        return max(self._used, default=None)

    def row(self) -> dict[str, Any]:
        return {
            "used_mib": self._used[-1] if self._used else None,
            "total_mib": self._total or None,
            "peak_mib": self.peak_mib,
            "utilization": mean(self._utilization) if self._utilization else None,
            "watts": mean(self._watts) if self._watts else None,
        }

    def _ask(self, what: str) -> Any:
        import pynvml

        try:
            return getattr(pynvml, what)(self._handle)
        except pynvml.NVMLError:  # not every card has every sensor
            return None


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# --- this process's children -----------------------------------------------------------------------------------------


def children_rss() -> int:
    """Bytes of memory that the processes we started hold: on a CPU, the engine's. 0 where /proc does not tell."""
    total = 0
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for pid in listed.read_text().split():
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total
