"""Where the time of steps goes: traces of some of them, as torch's profiler writes them, and what each comes to."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from kvtool.errors import ConfigError
from kvtool.memory import MemoryParts, size

# What a step's time goes to, and how that is told: by the names of kernels, ours and others', and of torch's operators
# on a CPU; names that begin with "kvtool::" are parts of our own code. The first that matches counts.
OURS = "kvtool::"
CLASSES: dict[str, str] = {
    "communication": r"nccl|all_reduce|all_gather|^kvtool::communication$",
    "sampling": r"^_(survey|choose|largest|first_largest|verify|known)$|^kvtool::sampling$",
    "seal": r"^_(seal|write_blocks)$|^kvtool::seal$",
    "attention": r"^_(decode|merge|prefill|latent_prefill|unpack|latent|expanded)_kernel$|^(paged|latent)_decode$"
    r"|flash|fmha|^kvtool::attention$",
    "norm, rope, write": r"^_(add_rms_norm|norm_rotate|rotate_and_(norm|write)|silu_mul|read_near|write_tokens)$"
    r"|^kvtool::(rope|write)$|^aten::(rms_norm|silu|mul_|add_)$",
    "routing of experts": r"^_(route|group|count|offsets|place|combine)_kernel$",
    "GEMM": r"^_(multiply|dot|grouped|product|finish|quantize|encode)_kernel$|^w4a16(_gemv|_decode)?$"
    r"|gemm|gemv|cutlass|nvjet|xmma|cublas|split_?k|^aten::(linear|addmm|mm|bmm|matmul|einsum)$",
}
OTHER, GAPS = "other", "host gaps"
NAMED = 3  # of what is other

MOST_STEPS = 8  # of a trace
ON_GPU, ON_CPU = {"kernel", "gpu_memcpy", "gpu_memset"}, {"cpu_op", "user_annotation"}  # categories of a trace
Event = Mapping[str, Any]  # of a trace, times in µs


@dataclass(frozen=True)
class StepTimes:
    """What some steps came to, in seconds, from the first event to the end of the last.

    Attributes:
        total: which is the sum of all parts.
        parts: by the names of `CLASSES`, `OTHER` and `GAPS`, when nothing ran: a GPU waited for the host, or a CPU ran
            what is no operator of torch's.
        others: what matches nothing, the longest first.
    """

    total: float
    parts: dict[str, float]
    others: dict[str, float]


def step_times(events: Sequence[Event]) -> StepTimes:
    """Times of the events of a Chrome trace: of a GPU's if it has any, else of torch's operators."""
    on_gpu = _intervals(events, ON_GPU)
    intervals = on_gpu or _intervals(events, ON_CPU)
    if not intervals:
        return StepTimes(0.0, {}, {})
    parts, others = Counter[str](), Counter[str]()
    for name, kind, time in (_in_turn if on_gpu else _innermost)(intervals):
        parts[kind] += time
        if kind == OTHER:
            others[name] += time
    total = max(interval.end for interval in intervals) - intervals[0].start
    parts[GAPS] = total - parts.total()
    in_order = {kind: parts[kind] / 1e9 for kind in (*CLASSES, OTHER, GAPS) if parts[kind]}
    return StepTimes(total / 1e9, in_order, {name: time / 1e9 for name, time in others.most_common()})


@cache
def kind_of(name: str) -> str:
    """The class that an event of this name belongs to."""
    return next((kind for kind, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


class Interval(NamedTuple):
    """When something ran, in ns."""

    start: int
    end: int
    name: str


def _intervals(events: Sequence[Event], categories: Set[str]) -> list[Interval]:
    """Those of some categories, as they began; of those that began together, the longest first."""
    found = [event for event in events if event.get("ph") == "X" and event.get("cat") in categories]
    ends = ((round(event["ts"] * 1e3), round((event["ts"] + event["dur"]) * 1e3), event["name"]) for event in found)
    return sorted((Interval(*each) for each in ends), key=lambda each: (each.start, -each.end))


def _in_turn(intervals: Sequence[Interval]) -> Iterator[tuple[str, str, int]]:
    """Name, class and time of each, of which none counts twice: a kernel that starts early only waits for the one
    before it."""
    until = intervals[0].start
    for start, end, name in intervals:
        if end > until:
            yield name, kind_of(name), end - max(until, start)
            until = end


def _innermost(intervals: Sequence[Interval]) -> Iterator[tuple[str, str, int]]:
    """Name, class and own time of each, without those inside it, which belong to its class, if it has one and they are
    no parts of ours."""
    around: list[tuple[int, str, str]] = []  # end, name and class of those that the next one may be in
    for start, end, name in intervals:
        while around and around[-1][0] <= start:
            around.pop()
        kind = around[-1][2] if around else OTHER
        if kind == OTHER or name.startswith(OURS):
            kind = kind_of(name)
        yield name, kind, end - start
        if around:
            _, outer, outer_kind = around[-1]
            yield outer, outer_kind, start - end
        around.append((end, name, kind))


class StepProfiler:
    """Traces steps 1 to 3, 4 to 11, 16 to 23, 64 to 71, … of a model, or fewer where there is nothing more to do: a
    short run is seen, a long one under its load, and few of the steps are slowed down by it. Each trace is a file for
    chrome://tracing or Perfetto, and a table on stderr. Step 0, in which whatever is lazy is made, is in none.

    Args:
        folder: where traces go, as `traces_folder` gives it.
        name: of this process in the files' names.
        is_follower: another process prints the table; here, steps end in another thread than they begin in.
    """

    def __init__(self, folder: Path, name: str, device: torch.device, *, is_follower: bool = False) -> None:
        self._folder, self._name, self._device, self._is_follower = folder, name, device, is_follower
        self._begun = self._done = 0  # steps
        self._steps = range(1, 4)  # that are traced, or will be
        self._trace: profile | None = None
        self._untold: tuple[range, Path] | None = None  # a trace that is written, and no table yet

    def begin_step(self) -> None:
        """A step is about to be launched."""
        if self._begun == self._steps.stop:
            self._stop()
        if self._begun == self._steps.start:
            self._start()
        self._begun += 1

    def end_step(self, held: Callable[[], MemoryParts]) -> None:
        """What the oldest step under way has yielded is here.

        Args:
            held: tells what the device holds.
        """
        if self._is_follower:
            return
        self._done += 1
        if self._done == self._steps.stop:
            self._stop()
        if self._untold and self._done >= self._untold[0].stop:
            self._tell(held)

    def rest(self, held: Callable[[], MemoryParts]) -> None:
        """There is nothing to do: a trace ends here, or waiting would count as a step's time."""
        self._stop()
        self._tell(held)

    def _start(self) -> None:
        # What torch writes on stderr of its own doings; and with CUDA graphs, its profiler must not be torn down.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        os.environ.setdefault("TEARDOWN_CUPTI", "0")
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            activities.append(ProfilerActivity.CUDA)
        self._trace = profile(activities=activities)
        self._trace.start()

    def _stop(self) -> None:
        if self._trace is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._trace.stop()
        path = _new_file(self._folder, f"{self._name}-step{self._steps.start}")
        self._trace.export_chrome_trace(str(path))
        self._trace, self._untold = None, (range(self._steps.start, self._begun), path)
        self._steps = range(4 * self._steps.start, 4 * self._steps.start + MOST_STEPS)

    def _tell(self, held: Callable[[], MemoryParts]) -> None:
        if self._untold:
            steps, path = self._untold
            times = step_times(json.loads(path.read_bytes())["traceEvents"])
            print(_table(times, held(), steps, self._device, path), file=sys.stderr, flush=True)
            self._untold = None


def traces_folder(name: str) -> Path:
    """The folder of --profile, made if it is not there.

    Raises:
        ConfigError: it cannot be made, or nothing can be written there.
    """
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(None, "it cannot be written to")
    except OSError as error:
        raise ConfigError(f"--profile {name}: {error.strerror}; give a folder that can be written to") from error
    return folder


def _new_file(folder: Path, name: str) -> Path:
    """An empty file of a name that nobody has taken: models of one process, or of several, may share a folder."""
    number = 1
    while True:
        path = folder / f"{name}{'' if number == 1 else f'-{number}'}.json"
        try:
            path.touch(exist_ok=False)
            return path
        except FileExistsError:
            number += 1


def _table(times: StepTimes, memory: MemoryParts, steps: range, device: torch.device, path: Path) -> str:
    """For people."""
    which = f"steps {steps.start} to {steps.stop - 1}" if len(steps) > 1 else f"step {steps.start}"
    lines = [f"profile of {which} on {device}: {path}"]
    rows = {**times.parts, "in all": times.total}
    for name, seconds in rows.items():
        share = seconds / times.total if times.total else 0.0
        named = ", ".join(f"{other} {s / len(steps) * 1e3:.3f}" for other, s in [*times.others.items()][:NAMED])
        what = f"  {named}" if name == OTHER else ""
        lines.append(f"  {name:<19}{seconds / len(steps) * 1e3:>10,.3f} ms a step{share:>8.1%}{what}")
    held = ", ".join(f"{name} {size(nbytes)}" for name, nbytes in memory.named().items() if nbytes is not None)
    return "\n".join([*lines, f"  bytes: {held}"])
