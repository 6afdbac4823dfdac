"""What spreading a layer of experts over ranks gains: processes that measure it, and what their figures come to."""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO

import msgspec
import numpy as np
import torch
from torch import Tensor

from kvtool.errors import ConfigError, KVToolError
from kvtool.expert_parallel.exchange import PHASES
from kvtool.expert_parallel.layer import LayerShape
from kvtool.expert_parallel.placement import Load, Placement, balanced, in_order, load_of
from kvtool.expert_parallel.routing import make_routing
from kvtool.expert_parallel.worker import FOUND, Choice, Job, Measured, Timing
from kvtool.processes import command

MOST_TOKENS = 1 << 20  # that chances of experts are drawn for, on the host
OnProgress = Callable[[float, float], None]


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        num_tokens: of all ranks together, a multiple of them.
        routing: as `make_routing` takes it.
        dtype: a torch dtype's name; "auto": float16 on GPUs, float32 on a CPU, whose 16-bit products take a hundred
            times as long.
        device: "auto": GPUs where there are as many as ranks.
        balance: measure a placement by load, too.
        replicas: slots that it has beside one for each expert; None: an eighth of the experts, as many on each rank.
        timeout_s: for all of it.
    """

    shape: LayerShape
    num_tokens: int
    num_ranks: int = 2
    routing: str = "uniform"
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    warmup: int = 5
    runs: int = 20
    balance: bool = False
    replicas: int | None = None
    timeout_s: float = 600.0


@dataclass(frozen=True)
class Row:
    """One variant, and the layer around it.

    Attributes:
        variant, placement: which; placements are "in order" or "balanced".
        equal: its output is that of the dense loop, within the dtype's tolerance; what is not has no times.
        error: relative to the norm of that.
        tokens_per_s: from the median run, on the rank that took longest.
        vs_dense_loop, vs_dense_grouped: how many times as fast as those on one rank.
        ms, dispatch_ms, expert_ms, combine_ms, control_ms: p50 and p99 of runs.
        communication_share, control_share: of the time of all runs.
        rows_over_needed: that experts computed, over pairs of token and expert.
        wire_bytes: sent by all ranks in a run.
        wire_over_least: that, over each token once to each rank that wants it and back.
        shard_ratio: bytes of experts on a rank over those of all.
        workspace: bytes beside them, on the rank that needs most; None on a CPU.
        host_waits: the host must wait for a GPU in it; what it need not wait in runs on GPUs as one CUDA graph.
        settings: chosen for this layer.
    """

    variant: str
    placement: str
    equal: bool
    error: float
    tokens_per_s: float | None
    vs_dense_loop: float | None
    vs_dense_grouped: float | None
    ms: dict[str, float] | None
    dispatch_ms: dict[str, float] | None
    expert_ms: dict[str, float] | None
    combine_ms: dict[str, float] | None
    control_ms: dict[str, float] | None
    communication_share: float | None
    control_share: float | None
    rows_over_needed: float | None
    wire_bytes: int
    wire_over_least: float | None
    shard_ratio: float
    workspace: int | None
    host_waits: bool
    settings: str


@dataclass(frozen=True)
class LoadRow:
    """How a routing spreads over the ranks, by `placement`."""

    routing: str
    placement: str
    load: Load


@dataclass(frozen=True)
class Gain:
    """What placing experts by load gains, times as fast: of the busiest rank's expert phase, and of the whole layer.

    Attributes:
        num_slots: of all ranks together, replicas among them.
        predicted: from the load of other tokens of the same kind, where time follows the busiest rank's pairs.
        expected: as `predicted`, from the tokens that are timed.
        experts, layer: measured.
    """

    num_slots: int
    predicted: float
    expected: float
    experts: float | None
    layer: float | None


@dataclass(frozen=True)
class Findings:
    """What a layer was found to do.

    Attributes:
        settings: with all that was left open decided.
        hardware: the device's name, of each rank.
        choice: of how tokens are exchanged; None: it was not come to.
        gain: of `Settings.balance`, where that was asked for.
    """

    settings: Settings
    hardware: str
    rows: list[Row]
    loads: list[LoadRow]
    choice: Choice | None
    gain: Gain | None

    @property
    def equal(self) -> bool:
        return all(row.equal for row in self.rows)


def decided(settings: Settings) -> Settings:
    """`settings`, with a device, a dtype and a number of replicas.

    Raises:
        ConfigError: experts or tokens that the ranks cannot share, or a device that is not there.
    """
    shape, size = settings.shape, settings.num_ranks
    if shape.top_k > shape.num_experts:
        raise ConfigError(f"--top-k {shape.top_k}: there are {shape.num_experts} experts; ask for fewer of them")
    if shape.num_experts % size:
        raise ConfigError(f"--num-experts {shape.num_experts}: {size} ranks cannot share them; choose a multiple")
    if settings.num_tokens > MOST_TOKENS:
        raise ConfigError(
            f"--batch-size times --seq-len is {settings.num_tokens} tokens; at most {MOST_TOKENS} are run"
        )
    if settings.num_tokens % size:
        raise ConfigError(f"--batch-size times --seq-len is {settings.num_tokens} tokens; {size} ranks need a multiple")
    gpus = torch.cuda.device_count()
    if settings.device == "cuda" and gpus < size:
        raise ConfigError(f"--device cuda: {size} ranks need as many GPUs, and there are {gpus}; use cpu")
    device = settings.device if settings.device != "auto" else "cuda" if gpus >= size else "cpu"
    dtype = settings.dtype if settings.dtype != "auto" else "float16" if device == "cuda" else "float32"
    replicas = settings.replicas
    if replicas is None:
        replicas = -(-shape.num_experts // 8 // size) * size
    if replicas % size:
        raise ConfigError(f"--replicas {replicas}: each of {size} ranks holds as many slots; choose a multiple")
    return replace(settings, device=device, dtype=dtype, replicas=replicas)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while variants are measured.

    Attributes:
        findings: of those that were done by then.
    """

    def __init__(self, findings: Findings) -> None:
        super().__init__()
        self.findings = findings


def measure_layer(settings: Settings, on_progress: OnProgress = lambda done, total: None) -> Findings:
    """Run the layer on as many processes as there are ranks.

    Args:
        on_progress: is told how many variants are done, of how many.

    Raises:
        ConfigError: settings that do not fit together.
        KVToolError: a process failed, or all of them took too long.
        Interrupted: by Ctrl-C, with the figures so far, if there are any.
    """
    settings = decided(settings)
    make_routing(settings.routing, settings.num_tokens, settings.shape, settings.seed)  # or each rank would refuse it
    with TemporaryDirectory(prefix="kvtool-ranks-") as folder:
        left = Path(folder) / FOUND

        def told() -> Measured | None:
            return msgspec.json.decode(left.read_bytes(), type=Measured) if left.exists() else None

        def tell() -> None:
            if measured := told():
                on_progress(len(measured.timings), measured.total)

        try:
            run_ranks(settings, tuple(placements_for(settings, settings.routing).values()), folder, tell)
        except KeyboardInterrupt as interrupt:
            measured = told()
            raise (Interrupted(findings(settings, measured)) if measured else interrupt) from None
        measured = told()
        assert measured
        return findings(settings, measured)


def findings(settings: Settings, measured: Measured) -> Findings:
    """What measurements come to."""
    kinds = dict.fromkeys(("uniform", "zipf", settings.routing))
    placements = {kind: placements_for(settings, kind) for kind in kinds}
    ids = {kind: make_routing(kind, settings.num_tokens, settings.shape, settings.seed).ids for kind in kinds}
    own, wanted = placements[settings.routing], ids[settings.routing]
    names = list(own.items())
    loads = [
        LoadRow(kind, name, load_of(placement.slots(ids[kind]), placement))
        for kind in kinds
        for name, placement in placements[kind].items()
    ]
    grouped = [timing for timing in measured.timings if timing.name == "EP grouped"]
    gain = None
    if len(grouped) == 2:
        old, new = grouped
        gain = Gain(
            num_slots=len(own["balanced"].experts),
            predicted=imbalance_ratio(history(settings, settings.routing), own),
            expected=imbalance_ratio(wanted, own),
            experts=_ratio(old.slowest_expert, new.slowest_expert),
            layer=_ratio(old.seconds, new.seconds),
        )
    return Findings(
        settings=settings,
        hardware=measured.device,
        rows=[_row(settings, timing, names[timing.placement], measured, wanted) for timing in measured.timings],
        loads=loads,
        choice=measured.choices[0] if measured.choices else None,
        gain=gain,
    )


def placements_for(settings: Settings, kind: str) -> dict[str, Placement]:
    """Where experts stand: in order, and with `Settings.balance` as what was seen of this kind of routing asks for."""
    num_experts, size = settings.shape.num_experts, settings.num_ranks
    placements = {"in order": in_order(num_experts, size)}
    if settings.balance:
        loads = history(settings, kind).flatten().bincount(minlength=num_experts).tolist()
        placements["balanced"] = balanced(loads, num_experts + (settings.replicas or 0), size)
    return placements


def history(settings: Settings, kind: str) -> Tensor:
    """What tokens wanted before those that are timed: [T, top_k] expert ids."""
    return make_routing(kind, settings.num_tokens, settings.shape, settings.seed, draw=1).ids


def imbalance_ratio(ids: Tensor, placements: Mapping[str, Placement]) -> float:
    """How many times as much the busiest rank has to do in order as it has balanced."""
    old, new = (load_of(p.slots(ids), p).rank_imbalance for p in (placements["in order"], placements["balanced"]))
    return old / new


def run_ranks(settings: Settings, placements: tuple[Placement, ...], folder: str, tell: Callable[[], None]) -> None:
    """Start a process for each rank, and call `tell` until all are done. However this ends, they end with it."""
    with ExitStack() as stack:
        complaints = [stack.enter_context(TemporaryFile()) for _ in range(settings.num_ranks)]
        processes: list[subprocess.Popen[bytes]] = []
        stack.callback(end, processes)
        for rank, complaint in enumerate(complaints):
            job = Job(
                rank=rank,
                num_ranks=settings.num_ranks,
                folder=folder,
                shape=settings.shape,
                num_tokens=settings.num_tokens,
                routing=settings.routing,
                seed=settings.seed,
                dtype=settings.dtype,
                device=settings.device,
                placements=placements,
                warmup=settings.warmup,
                runs=settings.runs,
                timeout_s=settings.timeout_s,
            )
            path = Path(folder) / f"job-{rank}.json"
            path.write_bytes(msgspec.json.encode(job))
            process = subprocess.Popen(
                command("kvtool.expert_parallel.worker", str(path)),
                stdin=subprocess.PIPE,  # is never written to: a rank is wanted as long as it is open
                stdout=complaint,  # libraries may print
                stderr=complaint,
                start_new_session=True,  # Ctrl-C is for this process, which then ends those
            )
            processes.append(process)
        wait_for_all(processes, complaints, settings.timeout_s, tell)


def wait_for_all(
    processes: Sequence["subprocess.Popen[bytes]"],
    complaints: Sequence[IO[bytes]],
    timeout_s: float,
    tell: Callable[[], None],
) -> None:
    """Until all have ended well.

    Raises:
        KVToolError: one has not, or time is out.
    """
    deadline = time.monotonic() + timeout_s
    while None in (statuses := [process.poll() for process in processes]) and not any(statuses):
        if time.monotonic() > deadline:
            raise KVToolError(f"--timeout {timeout_s:g}: the ranks are not done; raise it, or measure a smaller layer")
        tell()
        time.sleep(0.05)
    failed = {status: rank for rank, status in enumerate(statuses) if status}
    if failed:
        status = min(failed)  # of a rank that was killed, before those that missed it
        complaints[failed[status]].seek(0)
        said = complaints[failed[status]].read().decode(errors="replace").strip().rpartition("\n")[2]
        raise KVToolError(f"rank {failed[status]} ended with status {status}: {said or 'it said nothing'}")


def end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdin is not None
        process.stdin.close()


def _row(settings: Settings, timing: Timing, placed: tuple[str, Placement], found: Measured, ids: Tensor) -> Row:
    name, placement = placed
    slots, dtype = placement.slots(ids), getattr(torch, settings.dtype)
    all_bytes = settings.shape.num_experts * settings.shape.expert_elements * dtype.itemsize
    least = 2 * load_of(slots, placement).remote_rows * settings.shape.hidden_size * dtype.itemsize
    times = {timing.name: timing.seconds for timing in found.timings if timing.placement == 0}
    phases, total = timing.phases, sum(timing.seconds)
    shares = {phase: sum(seconds) / total for phase, seconds in phases.items()} if total else {}
    return Row(
        variant=timing.name,
        placement=name,
        equal=bool(timing.seconds),
        error=timing.error,
        tokens_per_s=settings.num_tokens / median(timing.seconds) if timing.seconds else None,
        vs_dense_loop=_ratio(times.get("dense loop", []), timing.seconds),
        vs_dense_grouped=_ratio(times.get("dense grouped", []), timing.seconds),
        ms=_quantiles(timing.seconds),
        **{f"{phase}_ms": _quantiles(phases[phase]) for phase in PHASES},
        communication_share=shares["dispatch"] + shares["combine"] if shares else None,
        control_share=shares.get("control"),
        rows_over_needed=padded_rows(slots, placement) / slots.numel() if timing.name == "EP padded" else 1.0,
        wire_bytes=timing.sent_bytes,
        wire_over_least=timing.sent_bytes / least if timing.sent_bytes and least else None,
        shard_ratio=timing.expert_bytes / all_bytes,
        workspace=timing.workspace,
        host_waits=timing.waits,
        settings=timing.settings,
    )


def padded_rows(slots: Tensor, placement: Placement) -> int:
    """Rows that `padded` computes on all ranks: each rank sends each slot as many as the fullest one gets from any."""
    size, total = placement.num_ranks, len(placement.experts)
    most = max(int(part.flatten().bincount(minlength=total).max()) for part in slots.chunk(size))
    return size * total * most


def _quantiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    return {"p50": float(p50) * 1e3, "p99": float(p99) * 1e3}


def _ratio(before: Sequence[float], after: Sequence[float]) -> float | None:
    """How many times as fast, by medians."""
    return median(before) / median(after) if before and after and median(after) else None
