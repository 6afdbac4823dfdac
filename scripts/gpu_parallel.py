"""What two GPUs make of a model: tensor parallel by NCCL and by symmetric memory, experts shared out whole in the same
two ways, and a pipeline, beside one GPU.

    python scripts/gpu_parallel.py --output parallel.json
    python scripts/gpu_parallel.py --model Qwen2.5-1.5B --runs one,tp2-nccl --nbits 4
    python scripts/gpu_parallel.py --model Qwen3-30B-A3B --runs one,tp2-nccl,ep2-nccl

Random weights of true shape, greedy, end of text ignored, prefix caching off; see gpu_report.py for the workloads. Each
run is a process of its own, on GPUs 0 and 1; its log-probabilities of one prompt are held against the first run's. One
that fails leaves its place in the table empty, and the last that it printed below.
"load": what the experts of the busier rank had to do in each layer, over what those of both had to on average. Then the
collectives by themselves, as CUDA graphs hold them: microseconds of one call, and what a step of the model spends on
all of its calls.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from gpu_report import KNOWN, MIXED_IN, MIXED_OUT, MIXTURES, make_engine, model_folder, seconds

from kvtool.engine import Engine
from kvtool.parallel import Parallel, join, use_one_shot
from kvtool.ranks.rendezvous import open_store, use_interface
from kvtool.request import Request, SamplingParams

RUNS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2-nccl": {"tp": 2, "all_reduce": "nccl"},
    "tp2-symmetric": {"tp": 2, "all_reduce": "symmetric-memory"},
    "ep2-nccl": {"tp": 2, "ep": 2, "all_reduce": "nccl"},
    "ep2-symmetric": {"tp": 2, "ep": 2, "all_reduce": "symmetric-memory"},
    "pp2": {"pp": 2},
}
ROWS = (1, 8, 64, 256, 2048)  # tokens of a step
CALLS = 50  # of a collective in one graph
RUN_SECONDS = 180
LAST_LINES = 15  # of what a run that failed has printed
PROBE = 256  # tokens of the prompt whose log-probabilities are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-7B", help=f"of {', '.join(KNOWN)}")
    parser.add_argument("--runs", help=f"of {', '.join(RUNS)} (default: all, ep2 of mixtures alone)")
    parser.add_argument("--nbits", default="16", help="KV format: a default recipe")
    parser.add_argument("--workloads", default="bs1,bs64,mixed256", help="bsN and mixed256")
    parser.add_argument("--output", type=Path, help="JSON file for all figures")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # what a process of this script is for
    parser.add_argument("--address", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.runs = args.runs or ",".join(run for run in RUNS if args.model in MIXTURES or "ep" not in RUNS[run])
    if args.run in RUNS:
        print(json.dumps(measure_run(args.model, RUNS[args.run], args.nbits, args.workloads.split(","))), flush=True)
        os._exit(0)  # the other rank ends with this one, and nothing can hang on the way
    elif args.run:
        rank = int(args.run)
        if rows := measure_collectives(rank, args.address, KNOWN[args.model]):
            print(json.dumps(rows), flush=True)
        os._exit(0)
    else:
        report(args)


def report(args: argparse.Namespace) -> None:
    if torch.cuda.device_count() < 2:
        sys.exit("error: this needs two NVIDIA GPUs")
    common = [sys.executable, __file__, "--model", args.model, "--nbits", args.nbits, "--workloads", args.workloads]
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "model": args.model}
    figures |= {"nbits": args.nbits, "runs": {}, "collectives": []}

    def keep() -> None:
        if args.output:
            args.output.write_text(json.dumps(figures, indent=1) + "\n")

    for name in args.runs.split(","):
        start = time.perf_counter()
        run = json_of([*common, "--run", name])
        figures["runs"][name] = run
        brief = {key: value for key, value in run.items() if key != "logprobs"}
        print(f"{name}: {time.perf_counter() - start:.0f} s, {json.dumps(brief)}", file=sys.stderr, flush=True)
        keep()
    with subprocess.Popen([*common, "--run", "0", "--address", "-"], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        address = first.stdout.readline().strip()
        with subprocess.Popen([*common, "--run", "1", "--address", address]) as second:
            try:
                figures["collectives"] = json.loads(first.communicate(timeout=RUN_SECONDS)[0] or "[]")
            except (subprocess.TimeoutExpired, ValueError) as error:
                print(f"collectives: left out: {error}", file=sys.stderr, flush=True)
            finally:
                first.kill()
                second.kill()
    keep()
    show(figures)


def json_of(argv: list[str]) -> dict[str, Any]:
    """What a process prints last on stdout, or what became of it and the last that it and its ranks have said."""
    with TemporaryFile("w+", errors="replace") as said:
        try:
            done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=said, timeout=RUN_SECONDS, text=True)
            if done.returncode == 0:
                figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
                return figures
            error = f"ended with status {done.returncode}"
        except subprocess.TimeoutExpired:
            error = f"took more than {RUN_SECONDS} s"
        except (ValueError, IndexError):
            error = "printed no figures"
        said.seek(0)
        return {"error": error, "said": said.read().splitlines()[-LAST_LINES:]}


def measure_run(name: str, ranks: dict[str, Any], nbits: str, workloads: list[str]) -> dict[str, Any]:
    """Milliseconds a step and tokens a second of one engine; its log-probabilities of a prompt, to compare."""
    start = time.perf_counter()
    with model_folder(name) as folder:
        engine = make_engine(folder, nbits, "none", max_model_len=2048, max_num_seqs=256, **ranks)
        seconds(engine, [16] * 4, [8] * 4)  # what is loaded on first use
        figures: dict[str, Any] = {"start_s": round(time.perf_counter() - start, 1), "kv_tokens": engine.info.kv_tokens}
        figures["logprobs"] = logprobs(engine, [(7919 * i) % engine.info.vocab_size for i in range(PROBE)])
        for workload in workloads:
            if workload == "mixed256":
                seconds(engine, MIXED_IN[:16], [8] * 16)
                figures[workload] = round(sum(MIXED_OUT) / seconds(engine, MIXED_IN, MIXED_OUT))
            else:
                count = int(workload[2:])
                whole, prefill = (seconds(engine, [128] * count, [n] * count, 3) for n in (129, 1))
                figures[workload] = round((whole - prefill) / 128 * 1e3, 3)
        if counts := engine.expert_tokens():
            figures["load"] = rank_load(counts, engine.info.ep)
    return figures


def logprobs(engine: Engine, prompt: list[int]) -> list[float]:
    """Of each token of the prompt but the first."""
    engine.submit(Request("probe", prompt, SamplingParams(max_tokens=1, prompt_logprobs=0)))
    found: list[float] = []
    while engine.has_work:
        for tokens in engine.step():
            found += [place.logprob for place in tokens.prompt_logprobs or ()]
    return found


def rank_load(counts: dict[int, list[int]], ep: int) -> float:
    """Pairs of token and expert of the busiest of `ep` ranks in each layer, all layers together, over the mean."""
    size = len(next(iter(counts.values()))) // ep
    busiest = sum(max(sum(of[first : first + size]) for first in range(0, ep * size, size)) for of in counts.values())
    return round(busiest * ep / sum(map(sum, counts.values())), 3)


def measure_collectives(rank: int, address: str, model: dict[str, Any]) -> list[dict[str, Any]]:
    """Microseconds of each collective that a model's step calls, by rows; on rank 0."""
    store, found = open_store("127.0.0.1:0" if address == "-" else address, 2, 60, rank)
    if rank == 0:
        print(found, flush=True)
    use_interface("127.0.0.1")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    parallel = join(store, rank, 2, 1, 1, device)
    hidden, vocab = model["hidden_size"], model["vocab_size"]
    rows = []
    for count in ROWS:
        x = torch.zeros(count, hidden, dtype=torch.bfloat16, device=device)
        part = torch.zeros(min(count, 256), vocab // 2, dtype=torch.bfloat16, device=device)
        row = {"rows": count, "bytes": x.nbytes, "nccl_us": timed(lambda x=x: parallel.tp.all_reduce(x))}
        row["gather_bytes"], row["gather_us"] = part.nbytes, timed(lambda part=part: parallel.tp.all_gather(part))
        row["send_us"] = timed(lambda x=x: hand_over(parallel, x))
        rows.append(row)
    refusal = use_one_shot(parallel, device)
    for row in rows:
        x = torch.zeros(row["rows"], hidden, dtype=torch.bfloat16, device=device)
        one_shot = parallel.tp.one_shot
        if one_shot and one_shot.takes(x):
            row["symmetric_us"] = timed(lambda x=x, one_shot=one_shot: one_shot.sum(x))
        row["refusal"] = refusal
    return rows if rank == 0 else []


def hand_over(parallel: Parallel, x: Tensor) -> None:
    """From one stage of a pipeline to the other."""
    dist.send(x, 1) if parallel.rank == 0 else dist.recv(x, 0)


def timed(call: Callable[[], object]) -> float:
    """Microseconds of a call, of many in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    best = float("inf")
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        dist.barrier()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / CALLS * 1e3)
    return round(best, 2)


def show(figures: dict[str, Any]) -> None:
    console = Console(width=None if os.isatty(1) else 110)
    console.print(runs_table(figures))
    for name, run in figures["runs"].items():
        if "error" in run:
            print(f"{name} {run['error']}:", *run["said"], sep="\n  ")
    console.print(collectives_table(figures["collectives"], KNOWN[figures["model"]]["num_hidden_layers"]))
    if figures["collectives"] and (refusal := figures["collectives"][0]["refusal"]):
        print(f"symmetric memory was refused: {refusal}")


def runs_table(figures: dict[str, Any]) -> Table:
    """Each run beside that of one GPU."""
    one = figures["runs"].get("one", {})
    first: list[float] = next((run["logprobs"] for run in figures["runs"].values() if "logprobs" in run), [])
    title = f"{figures['model']}, {figures['nbits']} bits, {figures['gpu']}, torch {figures['torch']}"
    table = Table(title=title, box=None)
    headings = ["run", "bs1 ms", "× one", "bs64 ms", "× one", "mixed256 tok/s", "× one", "KV tokens", "load"]
    for heading in (*headings, "Δ logprob", "start s"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name, run in figures["runs"].items():
        cells = [name]
        for workload, digits in (("bs1", 2), ("bs64", 2), ("mixed256", 0)):
            value, base = run.get(workload), one.get(workload)
            cells.append("" if value is None else f"{value:,.{digits}f}")
            cells.append(f"{value / base:.2f}" if value and base else "")
        gaps = [abs(a - b) for a, b in zip(run.get("logprobs", ()), first, strict=False)]
        cells += [
            f"{run['kv_tokens']:,}" if "kv_tokens" in run else "",
            str(run.get("load", "")),
            f"{sum(gaps) / len(gaps):.4f}" if gaps else "",
        ]
        table.add_row(*cells, str(run.get("start_s", "")))
    return table


def collectives_table(rows: list[dict[str, Any]], num_layers: int) -> Table:
    """What ranks say to each other, once, and in a step of all layers."""
    calls = 2 * num_layers + 1
    table = Table(title=f"A step: {calls} all-reduces and 1 gather (tensor parallel), 1 hand-over (pipeline)", box=None)
    for heading in (
        "rows",
        "KiB each",
        "NCCL µs",
        "symmetric µs",
        "gather µs",
        "hand-over µs",
        "MiB",
        "NCCL ms",
        "symm. ms",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        symmetric = row.get("symmetric_us")
        table.add_row(
            f"{row['rows']:,}",
            f"{row['bytes'] / 1024:,.0f}",
            f"{row['nccl_us']:,.1f}",
            "" if symmetric is None else f"{symmetric:,.1f}",
            f"{row['gather_us']:,.1f}",
            f"{row['send_us']:,.1f}",
            f"{(calls * row['bytes'] + row['gather_bytes']) / 2**20:,.1f}",
            f"{(calls * row['nccl_us'] + row['gather_us']) / 1e3:,.2f}",
            "" if symmetric is None else f"{(calls * symmetric + row['gather_us']) / 1e3:,.2f}",
        )
    return table


if __name__ == "__main__":
    main()
