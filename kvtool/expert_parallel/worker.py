"""One rank's process: it builds its part of the layer, checks that all ways give the same, and times them."""

import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from kvtool.expert_parallel.exchange import (
    DENSE,
    EXPERT,
    PHASES,
    SPREAD,
    Clock,
    Grouped,
    Ranks,
    Variant,
    Work,
    dense_loop,
)
from kvtool.expert_parallel.layer import LayerShape, random_experts
from kvtool.expert_parallel.placement import Placement
from kvtool.expert_parallel.routing import make_routing

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # of the norm
CACHE_BYTES = 256 << 20  # more than any GPU's
SLACK = 8  # packed rows have room for an eighth more than a step before needed
FOUND = "measured.json"
MISSED_SECONDS = 2  # that whoever misses another rank lets it be found first
TRIALS = 5  # runs by which settings are chosen


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What all ranks are told.

    Attributes:
        rank, num_ranks: this process's number, and how many there are.
        folder: of files by which they find each other, and where rank 0 leaves what it measured, in FOUND.
        shape: of the layer.
        num_tokens: of all ranks together.
        routing, seed: as `make_routing` takes them.
        dtype: a torch dtype's name.
        device: "cpu" or "cuda", of which rank r takes the r-th.
        placements: where experts stand; the first with all variants, others with `Grouped` alone.
        warmup, runs: untimed and timed.
        timeout_s: after which a rank that waits for another gives up.
    """

    rank: int
    num_ranks: int
    folder: str
    shape: LayerShape
    num_tokens: int
    routing: str
    seed: int
    dtype: str
    device: str
    placements: tuple[Placement, ...]
    warmup: int
    runs: int
    timeout_s: float


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """What one variant took, over ranks.

    Attributes:
        name: of the variant.
        placement: index of the placement.
        error: of its output, relative to the norm of the dense loop's.
        seconds: of each run, on the rank that took longest.
        phases: seconds of each run by phase, mean over ranks.
        slowest_expert: seconds of each run that the busiest rank computed.
        sent_bytes: in one run, by all ranks.
        workspace: bytes on the rank that needed most; None on a CPU.
        expert_bytes: weights on each rank.
        settings: chosen, for people.
        waits: the host waits for a GPU in it.
    """

    name: str
    placement: int
    error: float
    seconds: list[float]
    phases: dict[str, list[float]]
    slowest_expert: list[float]
    sent_bytes: int
    workspace: int | None
    expert_bytes: int
    settings: str
    waits: bool


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """How `Grouped` was set: by the settings that were tried, and their median seconds.

    Attributes:
        needed: rows that the busiest pair of ranks exchanges, over the tokens of a rank.
        break_even: such a share above which sending all tokens is quicker than packing them; more than 1: never.
    """

    tried: dict[str, float]
    chosen: str
    needed: float
    break_even: float


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 leaves, again after each variant.

    Attributes:
        device: its name.
        total: variants that there will be.
        timings: of those that are done.
        choices: of settings, for each placement that was come to.
    """

    device: str
    total: int
    timings: list[Timing]
    choices: list[Choice]


def main(path: str) -> None:
    """The process: a job in a file; stdin is open as long as its parent lives."""
    job = msgspec.json.decode(Path(path).read_bytes(), type=Job)
    threading.Thread(target=end_with_parent, daemon=True).start()
    status = 0
    try:
        be_rank(job)
    except Exception as error:
        if isinstance(error, RuntimeError):
            time.sleep(MISSED_SECONDS)
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # the group ends with the process: NCCL would wait for ranks that have failed


def be_rank(job: Job) -> None:
    """Measure, and leave what is found."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # new names for collectives, which older torches lack
    device = torch.device(f"cuda:{job.rank}" if job.device == "cuda" else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks of one host need no other
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // job.num_ranks))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{job.folder}/store",
        rank=job.rank,
        world_size=job.num_ranks,
        timeout=timedelta(seconds=job.timeout_s),
        device_id=device if device.type == "cuda" else None,
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    measured = Measured(device=name, total=len(DENSE) + len(SPREAD) + len(job.placements), timings=[], choices=[])
    with torch.inference_mode():
        for found in measure(job, device):
            if isinstance(found, Timing):
                measured.timings.append(found)
            else:
                measured.choices.append(found)
            if job.rank == 0:
                part = Path(job.folder) / "part"
                part.write_bytes(msgspec.json.encode(measured))
                part.replace(Path(job.folder) / FOUND)


def end_with_parent() -> None:
    """End this process, whatever it waits for, when its parent is gone."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def measure(job: Job, device: torch.device) -> Iterator[Timing | Choice]:
    """All variants, checked and timed."""
    rank, size, dtype = job.rank, job.num_ranks, getattr(torch, job.dtype)
    routing = make_routing(job.routing, job.num_tokens, job.shape, job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    x = torch.randn(job.num_tokens, job.shape.hidden_size, generator=generator).to(dtype).to(device)
    own = slice(rank * job.num_tokens // size, (rank + 1) * job.num_tokens // size)
    weights = routing.weights.to(device)
    expected = torch.empty_like(x)
    if rank == 0:
        everything = random_experts(job.shape, range(job.shape.num_experts), job.seed, dtype, device)
        dense = Work.of(x, routing.ids.to(device), weights, everything, Ranks(0, 1))
        expected = dense_loop(dense, Clock(device))
        for variant in DENSE:
            yield timed(job, variant, dense, expected, 0)
        del everything, dense
    dist.broadcast(expected, 0)
    for index, placement in enumerate(job.placements):
        experts = random_experts(job.shape, placement.of_rank(rank), job.seed, dtype, device)
        slots = placement.slots(routing.ids)[own].to(device)
        work = Work.of(x[own], slots, weights[own], experts, Ranks(rank, size))
        grouped, choice = choose(work, device)
        yield choice
        for variant in (*(SPREAD if index == 0 else ()), Variant("EP grouped", grouped)):
            yield timed(job, variant, work, expected[own], index)


def choose(work: Work, device: torch.device) -> tuple[Grouped, Choice]:
    """The settings of `Grouped` that take least on the rank that takes longest: all of them are tried."""
    num_tokens, ranks = len(work.x), work.ranks
    visits = work.visits()
    visits[:, ranks.rank] = False
    most = visits.sum(0).max()
    dist.all_reduce(most, dist.ReduceOp.MAX)
    needed = int(most)
    capacity = min(num_tokens, needed + -(-needed // SLACK))
    candidates = [Grouped(c, meanwhile) for c in (None, max(1, capacity)) for meanwhile in (False, True)]
    seconds, moving = [], []
    for candidate in candidates:
        runs = run(Variant("EP grouped", candidate), work, warmup=2, runs=TRIALS)
        phases = torch.tensor([list(phases.values()) for phases in runs]).median(0).values.to(device)
        dist.all_reduce(phases, dist.ReduceOp.MAX)
        seconds.append(float(phases.sum()))
        moving.append(float(phases.sum() - phases[PHASES.index(EXPERT)]))
    best = min(range(len(candidates)), key=seconds.__getitem__)
    whole, packed = moving[0], moving[2]  # one after the other, so that all of their time is seen
    overhead = packed - whole * capacity / num_tokens
    choice = Choice(
        tried={c.describe(): s for c, s in zip(candidates, seconds, strict=True)},
        chosen=candidates[best].describe(),
        needed=needed / num_tokens,
        break_even=1 - overhead / whole,
    )
    return candidates[best], choice


def run(variant: Variant, work: Work, *, warmup: int, runs: int) -> list[dict[str, float]]:
    """Seconds of each phase of each run, on this rank. Ranks begin each run together; on GPUs, with caches that hold
    nothing of the layer, as a model's other layers would leave them."""
    device, found = work.x.device, []
    once = captured(variant, work) if device.type == "cuda" and not variant.waits else partial(run_once, variant, work)
    start = torch.zeros(1, device=device)
    others = torch.empty(CACHE_BYTES if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    for _ in range(warmup + runs):
        others.zero_()
        if work.ranks.size > 1:
            dist.all_reduce(start)
        found.append(once())
    return found[warmup:]


def run_once(variant: Variant, work: Work) -> dict[str, float]:
    """Seconds of each phase."""
    clock = Clock(work.x.device)
    variant.run(work, clock)
    clock("")
    return clock.seconds()


def captured(variant: Variant, work: Work) -> Callable[[], dict[str, float]]:
    """`run_once` as a CUDA graph, which a served model's steps are: what the host needs for launches is in no phase."""
    variant.run(work, Clock(work.x.device))  # kernels are loaded, and ranks connected, on first use
    torch.cuda.synchronize()
    graph, clock = torch.cuda.CUDAGraph(), Clock(work.x.device, in_graph=True)
    # thread_local: NCCL's watchdog may ask for the state of earlier events meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        variant.run(work, clock)
        clock("")

    def replay() -> dict[str, float]:
        graph.replay()
        return clock.seconds()

    return replay


def timed(job: Job, variant: Variant, work: Work, expected: Tensor, placement: int) -> Timing:
    """One variant: its output against `expected`, then its times. What differs is not timed."""
    device, ranks = work.x.device, work.ranks
    sent_before, held = ranks.sent_bytes, 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    out = variant.run(work, Clock(device))
    workspace = torch.cuda.max_memory_allocated() - held if device.type == "cuda" else 0
    error = float((out.double() - expected.double()).norm() / expected.double().norm())
    seen = torch.tensor([ranks.sent_bytes - sent_before, workspace, error], dtype=torch.float64, device=device)
    sent, workspaces, errors = gathered(seen, ranks).t().tolist()
    is_equal = max(errors) <= TOLERANCE[work.x.dtype]
    runs = run(variant, work, warmup=job.warmup, runs=job.runs) if is_equal else []
    times = gathered(torch.tensor([list(phases.values()) for phases in runs], device=device), ranks).double()
    return Timing(
        name=variant.name,
        placement=placement,
        error=max(errors),
        seconds=times.sum(-1).amax(0).tolist() if runs else [],
        phases={phase: times[..., i].mean(0).tolist() if runs else [] for i, phase in enumerate(PHASES)},
        slowest_expert=times[..., PHASES.index(EXPERT)].amax(0).tolist() if runs else [],
        sent_bytes=int(sum(sent)),
        workspace=int(max(workspaces)) if device.type == "cuda" else None,
        expert_bytes=work.experts.gate_up.nbytes + work.experts.down.nbytes,
        settings=variant.run.describe() if isinstance(variant.run, Grouped) else "",
        waits=variant.waits,
    )


def gathered(x: Tensor, ranks: Ranks) -> Tensor:
    """`x` of all ranks: [ranks, ...]."""
    if ranks.size == 1:
        return x[None]
    found = torch.empty(ranks.size * len(x), *x.shape[1:], dtype=x.dtype, device=x.device)
    dist.all_gather_into_tensor(found, x)
    return found.view(ranks.size, *x.shape)
