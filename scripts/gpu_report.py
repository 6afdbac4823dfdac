"""kvtool's speed on this GPU: fixed workloads on models of true shape with random weights, as a table and one file.

    python scripts/gpu_report.py --output report.json
    python scripts/gpu_report.py --models Qwen2.5-7B --workloads bs1,long16 --nbits 16,4 --peer vllm.jsonl
    python scripts/gpu_report.py --models Qwen2.5-7B --workloads bs1,bs64,ttft --nbits 16 --quantization none,w4a16,fp8

Greedy, end of text ignored, prefix caching off. A row holds the figure, its floor on this GPU (bytes of weights and KV,
and FLOPs, over the rates measured first) and, where a peer's figures are given as JSON lines, theirs. What does not fit
the GPU is left out with the reason.

  bsN       N requests, 128 tokens in, 129 out: ms a step in which all decode
  ttft      one request of 10, 100, 500, 1,000, 4,000 tokens, 1 out: ms
  mixed256  256 requests, in and out each uniform in 100..1,024: output tokens/s
  long16    16 requests of 32,000 tokens, 257 out: ms a step in which all decode
  cap512    512 requests, 512 in, 1,024 out, within 6 GiB of KV cache: output tokens/s
"""

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from kvtool.bench.floors import ModelCost, Rates, cost, measure_rates
from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import KVToolError
from kvtool.models import load_config
from kvtool.request import Request, SamplingParams

QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "num_hidden_layers": 28, "dtype": "bfloat16"}
QWEN25 = QWEN | {"model_type": "qwen2", "max_position_embeddings": 32768}
MODELS: dict[str, dict[str, Any]] = {
    "Qwen2.5-7B": QWEN25
    | {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    | {"tie_word_embeddings": False, "vocab_size": 152064},
    "Qwen2.5-1.5B": QWEN25
    | {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
    | {"tie_word_embeddings": True, "vocab_size": 151936},
    "Qwen3-0.6B": QWEN
    | {"model_type": "qwen3", "max_position_embeddings": 40960, "head_dim": 128, "hidden_size": 1024}
    | {"intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    | {"tie_word_embeddings": True, "vocab_size": 151936},
}
# By name alone: its weights take 57 GiB.
MIXTURES: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": QWEN
    | {"model_type": "qwen3_moe", "max_position_embeddings": 40960, "head_dim": 128, "hidden_size": 2048}
    | {"intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
    | {"tie_word_embeddings": False, "vocab_size": 151936},
}
KNOWN = MODELS | MIXTURES
WORKLOADS = ("bs1", "bs8", "bs64", "bs128", "ttft", "mixed256", "long16", "cap512")
PROMPTS = (10, 100, 500, 1000, 4000)  # of ttft
CAP_MEMORY = 6 << 30
MIXED = random.Random(0)
MIXED_IN, MIXED_OUT = ([MIXED.randint(100, 1024) for _ in range(256)] for _ in range(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", default=",".join(MODELS), help=f"of {', '.join(KNOWN)}, or folders with a config.json"
    )
    parser.add_argument("--workloads", default="bs1,bs8,bs64,ttft,mixed256,long16,cap512", help=f"of {WORKLOADS}")
    parser.add_argument("--nbits", default="16,8,4,2", help="KV formats: the default recipes")
    parser.add_argument("--quantization", default="none", help="of the weights: none, w4a16, w8a8, fp8")
    parser.add_argument("--peer", type=Path, help="JSON lines of peer_vllm.py")
    parser.add_argument("--output", type=Path, help="JSON file for all rows")
    args = parser.parse_args()
    if unknown := set(args.workloads.split(",")) - set(WORKLOADS):
        parser.error(f"--workloads {min(unknown)}: must be of {', '.join(WORKLOADS)}")
    if not torch.cuda.is_available():
        sys.exit("error: this needs an NVIDIA GPU")
    rates = {
        weights: measure_rates(torch.bfloat16, torch.device("cuda"), 2 << 30, weights)
        for weights in dict.fromkeys(["none", *args.quantization.split(",")])
    }
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "read_tb_s": round(rates["none"].bytes_per_s / 1e12, 2),
        "bf16_tflop_s": round(rates["none"].flops_per_s / 1e12),
        "tflop_s": {weights: round(of.flops_per_s / 1e12) for weights, of in rates.items()},
        "rows": [],
    }
    print(json.dumps({name: value for name, value in report.items() if name != "rows"}), file=sys.stderr, flush=True)
    peer = read_peer(args.peer) if args.peer else {}
    for name in args.models.split(","):
        with model_folder(name) as folder:
            asked = product(args.nbits.split(","), args.quantization.split(","))
            for row in measure(name, folder, asked, args.workloads.split(","), rates):
                row["peer"] = peer.get((Path(name).name.split("-Instruct")[0], row["nbits"], row["workload"]))
                report["rows"].append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                if args.output:
                    args.output.write_text(json.dumps(report, indent=1) + "\n")
    show(report)


class model_folder(tempfile.TemporaryDirectory[str]):
    """A folder with the model's config.json: the user's, or one made for a name of `KNOWN`."""

    def __init__(self, name: str) -> None:
        super().__init__(prefix="kvtool-")
        self.folder = Path(self.name) if name in KNOWN else Path(name)
        if name in KNOWN:
            (self.folder / "config.json").write_text(json.dumps(KNOWN[name]))

    def __enter__(self) -> str:
        return str(self.folder)


def measure(
    name: str,
    folder: str,
    formats: Iterable[tuple[str, str]],
    workloads: Sequence[str],
    rates: Mapping[str, Rates],
) -> Iterator[dict[str, Any]]:
    """A row for each figure, by bits of KV and the way that weights are kept. Workloads that can share an engine do.

    Args:
        rates: of this GPU, by the way that weights are kept.
    """
    capped = {"max_model_len": 2048, "max_num_seqs": 512, "kv_cache_memory": CAP_MEMORY}
    groups: tuple[tuple[list[str], dict[str, Any]], ...] = (
        ([w for w in workloads if w not in ("long16", "cap512")], {"max_model_len": 8192, "max_num_seqs": 256}),
        ([w for w in workloads if w == "long16"], {"max_model_len": 32768, "max_num_seqs": 16}),
        ([w for w in workloads if w == "cap512"], capped),
    )
    for nbits, weights in formats:
        what = f"{name}, {nbits} bits, weights {weights}"
        for group, settings in groups:
            if not group:
                continue
            start = time.perf_counter()
            try:
                engine = make_engine(folder, nbits, weights, **settings)
            except KVToolError as error:
                print(f"{what}, {', '.join(group)}: left out: {error}", file=sys.stderr, flush=True)
                continue
            seconds(engine, [16] * 4, [8] * 4)  # what is loaded on first use
            print(f"{what}: {memory_line(engine)}", file=sys.stderr, flush=True)
            common = {"model": name, "nbits": nbits, "weights": weights, "weight_bytes": engine.info.weight_bytes}
            common |= {"start_s": round(time.perf_counter() - start, 1)}
            model = cost(load_config(Path(folder)), 2, engine.info.block_bytes / engine.info.block_size)
            if weights != "none":
                model = msgspec.structs.replace(model, weight_bytes=engine.info.step_bytes)
            for workload in group:
                for figure in FIGURES[workload.rstrip("0123456789")](engine, workload, model, rates[weights]):
                    yield common | figure
            del engine
            gc.collect()
            torch.cuda.empty_cache()


def make_engine(folder: str, nbits: str, weights: str, **settings: Any) -> Engine:
    return Engine(
        EngineConfig(
            model=folder,
            load_format="dummy",
            device="cuda",
            quantization="auto" if weights == "none" else weights,  # type: ignore[arg-type]
            kv=KVOptions(nbits=nbits),  # type: ignore[arg-type]
            max_num_batched_tokens=8192,
            swap_space=0 if "kv_cache_memory" not in settings else 4 << 30,
            prefix_caching=False,
            **settings,
        )
    )


def memory_line(engine: Engine) -> str:
    """What was predicted, and what is held."""
    free, total = torch.cuda.mem_get_info()
    memory, held = engine.runner.memory, (total - free) / 2**30
    assert memory is not None
    predicted = (memory.others + memory.weights + memory.workspace + memory.graphs + engine.info.kv_bytes) / 2**30
    return f"{engine.info.kv_tokens:,} tokens fit; {predicted:.2f} GiB predicted, {held:.2f} GiB held"


def seconds(engine: Engine, ins: Sequence[int], outs: Sequence[int], repeats: int = 1) -> float:
    """Least time to answer prompts of so many random ids with so many tokens, all at once."""
    rng, best = random.Random(0), float("inf")
    for _ in range(repeats):
        prompts = [[rng.randrange(10, engine.info.vocab_size) for _ in range(n)] for n in ins]
        requests = [
            Request(str(i), prompt, SamplingParams(temperature=0, max_tokens=n, ignore_eos=True))
            for i, (prompt, n) in enumerate(zip(prompts, outs, strict=True))
        ]
        torch.cuda.synchronize()
        start, got = time.perf_counter(), 0
        for request in requests:
            engine.submit(request)
        while engine.has_work:
            for tokens in engine.step():
                assert tokens.error is None, tokens.error
                got += len(tokens.token_ids)
        best = min(best, time.perf_counter() - start)
        assert got == sum(outs)
    return best


def figure(workload: str, unit: str, value: float, floor: float) -> dict[str, Any]:
    """`floor` is the best possible value; the share tells how near it is, whichever way is better."""
    share = floor / value if unit == "ms" else value / floor
    return {
        "workload": workload,
        "unit": unit,
        "value": round(value, 3),
        "floor": round(floor, 3),
        "share": round(share, 3),
    }


def step_figures(engine: Engine, workload: str, model: ModelCost, rates: Rates) -> Iterator[dict[str, Any]]:
    count, length, out = (16, 32000, 257) if workload == "long16" else (int(workload[2:]), 128, 129)
    best = min(step_seconds(engine, count, length, out) for _ in range(1 if workload == "long16" else 3))
    floor = rates.seconds(model.decode_bytes(length + out // 2, count), count * model.decode_flops(length + out // 2))
    yield figure(workload, "ms", best * 1e3, floor * 1e3)


def step_seconds(engine: Engine, count: int, length: int, out: int) -> float:
    """Mean time of a step in which all of `count` prompts of `length` tokens decode: from the first token of the last
    to just before one ends. (A difference of two whole runs would have the noise of long prompts in it.)"""
    rng, params = random.Random(0), SamplingParams(temperature=0, max_tokens=out, ignore_eos=True)
    for i in range(count):
        engine.submit(Request(str(i), [rng.randrange(10, engine.info.vocab_size) for _ in range(length)], params))
    got, first, last = [0] * count, None, None
    while engine.has_work:
        news = engine.step()
        for tokens in news:
            assert tokens.error is None, tokens.error
            got[int(tokens.id)] += len(tokens.token_ids)
        if news and min(got) > 0 and max(got) < out:
            last = time.perf_counter(), sum(got)
            first = first or last
    assert first and last
    return (last[0] - first[0]) * count / (last[1] - first[1])


def ttft_figures(engine: Engine, workload: str, model: ModelCost, rates: Rates) -> Iterator[dict[str, Any]]:
    for length in PROMPTS:
        floor = rates.seconds(model.weight_bytes, model.prefill_flops(length))
        yield figure(f"ttft{length}", "ms", seconds(engine, [length], [1], 5) * 1e3, floor * 1e3)


def rate_figures(engine: Engine, workload: str, model: ModelCost, rates: Rates) -> Iterator[dict[str, Any]]:
    ins, outs = (MIXED_IN, MIXED_OUT) if workload == "mixed256" else ([512] * 512, [1024] * 512)
    seconds(engine, ins[:16], [8] * 16)
    before = engine.stats()
    taken = seconds(engine, ins, outs)
    floor = rate_floor(ins, outs, model, rates, engine.info.kv_tokens)
    stats = engine.stats()
    yield figure(workload, "tok/s", sum(outs) / taken, sum(outs) / floor) | {
        "preemptions": stats.preemptions_total - before.preemptions_total
    }


def rate_floor(ins: Sequence[int], outs: Sequence[int], model: ModelCost, rates: Rates, kv_tokens: int) -> float:
    """Least seconds: all FLOPs of the prompts, all KV that decoding reads, and the weights once for each step, of
    which there are as many as the longest answer has tokens, or as the cache's room makes of it."""
    flops = sum(model.prefill_flops(n) for n in ins)
    room = max(max(outs), sum(n * (length + n / 2) for length, n in zip(ins, outs, strict=True)) / kv_tokens)
    kv = sum(n * (length + n / 2) for length, n in zip(ins, outs, strict=True)) * model.kv_token_bytes
    return rates.seconds(0, flops) + rates.seconds(kv + room * model.weight_bytes, 0)


FIGURES = {
    "bs": step_figures,
    "long": step_figures,
    "ttft": ttft_figures,
    "mixed": rate_figures,
    "cap": rate_figures,
}


def read_peer(path: Path) -> dict[tuple[str, str, str], float]:
    """Figures by model, bits and workload. Of a process that prints its results one by one, the last line counts."""
    names = {"auto": "16", "fp8": "8", "int4_per_token_head": "4"}
    found = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        model, nbits = values["config"].split("-Instruct")[0], names.get(values["kv"], values["kv"])
        for key, value in values.items():
            workload = key.split("_")[0]
            if key.endswith(("step_ms", "out_tok_s")) or key.startswith("ttft"):
                found[model, nbits, workload] = value
    return found


def show(report: dict[str, Any]) -> None:
    rates = f"{report['read_tb_s']} TB/s read, {report['bf16_tflop_s']} TFLOP/s"
    title = f"{report['gpu']}, torch {report['torch']}: {rates}"
    table = Table(title=title, box=None)
    for heading in ("model", "KV bits", "weights", "workload", "", "value", "floor", "share", "peer", "× peer"):
        table.add_column(heading, justify="left" if heading in ("model", "weights", "workload", "") else "right")
    for row in report["rows"]:
        value, peer = row["value"], row["peer"]
        ratio = "" if peer is None else f"{peer / value if row['unit'] == 'ms' else value / peer:.2f}"
        cells = (
            row["model"],
            row["nbits"],
            row["weights"],
            row["workload"],
            row["unit"],
            f"{value:,.2f}",
            f"{row['floor']:,.2f}",
        )
        table.add_row(*cells, f"{row['share']:.0%}", "" if peer is None else f"{peer:,.2f}", ratio)
    Console(width=None if os.isatty(1) else 110).print(table)


if __name__ == "__main__":
    main()
