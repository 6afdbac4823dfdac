"""What each part of the engine is worth on this GPU: the same work with and without it, random weights, one table.

  python scripts/gpu_effects.py --output effects.json

graphs        one request: ms a step with CUDA graphs and without
run ahead     64 requests: ms a step when the next one is launched while it computes, and when not
chunks        the longest gap between tokens of 8 running requests when a prompt of 4,000 tokens comes, by chunk size
prefix        ms to the first token of a prompt of 5,000 tokens, of which a share has been computed before
transformers  8 requests, 128 tokens in and out: tokens/s beside transformers' generate
24 GiB        tokens that fit beside Qwen2.5-7B in a process limited to a 24 GiB card, by bits, each of them used
"""

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_report import model_folder, seconds
from rich.console import Console
from rich.table import Table

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.request import Request, SamplingParams

CARD = 24 << 30
FILLING = 64  # requests that fill the cache of such a card
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(EFFECTS), help=f"of {', '.join(EFFECTS)}")
    parser.add_argument("--output", type=Path, help="JSON file for all rows")
    args = parser.parse_args()
    if unknown := set(args.only.split(",")) - set(EFFECTS):
        parser.error(f"--only {min(unknown)}: must be of {', '.join(EFFECTS)}")
    if not torch.cuda.is_available():
        sys.exit("error: this needs an NVIDIA GPU")
    rows = []
    for name in args.only.split(","):
        for row in EFFECTS[name]():
            rows.append({"effect": name} | row)
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if args.output:
        report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        args.output.write_text(json.dumps(report, indent=1) + "\n")
    table = Table("effect", "model", "case", "value", "× the first", box=None, title=torch.cuda.get_device_name())
    first: dict[str, float] = {}
    for row in rows:
        ratio = row["value"] / first.setdefault(row["effect"], row["value"])
        table.add_row(row["effect"], row["model"], row["case"], f"{row['value']:,.2f} {row['unit']}", f"{ratio:.2f}")
    Console().print(table)


def engine(folder: str, nbits: str = "16", **settings: Any) -> Engine:
    gc.collect()  # what was measured before has cycles, and memory
    torch.cuda.empty_cache()
    kv = KVOptions(nbits=nbits)  # type: ignore[arg-type]
    settings = {"max_model_len": 8192, "max_num_seqs": 64, "swap_space": 0, "kv_cache_memory": 8 << 30} | settings
    made = Engine(EngineConfig(model=folder, load_format="dummy", device="cuda", kv=kv, **settings))
    seconds(made, [16] * 4, [8] * 4)  # what is loaded on first use
    return made


def step_ms(tested: Engine, count: int) -> float:
    whole, prefill = (seconds(tested, [128] * count, [n] * count, 2) for n in (129, 1))
    return (whole - prefill) / 128 * 1e3


def graphs() -> Iterator[Row]:
    yield from _steps("Qwen2.5-1.5B", 1, "cuda_graph")


def run_ahead() -> Iterator[Row]:
    yield from _steps("Qwen3-0.6B", 64, "run_ahead")


def _steps(model: str, count: int, option: str) -> Iterator[Row]:
    for value in (False, True):
        with model_folder(model) as folder:
            case = f"{count} requests, {'with' if value else 'without'}"
            yield {
                "model": model,
                "case": case,
                "unit": "ms",
                "value": step_ms(engine(folder, **{option: value}), count),
            }


def chunks() -> Iterator[Row]:
    for size in (8192, 512, 256, 128):
        with model_folder("Qwen2.5-1.5B") as folder:
            tested = engine(folder, max_num_batched_tokens=size, prefix_caching=False)
        _gaps(tested, 4000)
        (quiet, _), (gaps, taken) = _gaps(tested, None), _gaps(tested, 4000)
        case = f"{'whole' if size > 4000 else f'{size} tokens'}: {4000 / taken:,.0f} prompt tok/s"
        case += f", p99 {gaps[int(0.99 * len(gaps))]:.1f} ms, quiet {quiet[-1]:.1f} ms"
        yield {"model": "Qwen2.5-1.5B", "case": case, "unit": "ms", "value": gaps[-1]}


def _gaps(tested: Engine, prompt: int | None) -> tuple[list[float], float]:
    """ms between tokens of running requests, sorted, and seconds to the first token of `prompt` tokens that come."""
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
    for i in range(8):
        tested.submit(Request(f"running {i}", [5 + i] * 100, params))
    last, gaps, arrived, first = dict[str, float](), list[float](), 0.0, 0.0
    count = 0
    while tested.has_work:
        news, now = tested.step(), time.perf_counter()
        for tokens in news:
            if tokens.id == "new":
                first = first or now
                continue
            count += 1
            if count > 8 * 20:  # all of them run
                gaps.append(now - last[tokens.id])
            last[tokens.id] = now
        if count >= 8 * 40 and not arrived:
            arrived = now
            if prompt:
                tested.submit(Request("new", list(range(5, 5 + prompt)), SamplingParams(max_tokens=1)))
    return [gap * 1e3 for gap in sorted(gaps)], (first or now) - arrived


def prefix() -> Iterator[Row]:
    with model_folder("Qwen2.5-7B") as folder:
        tested = engine(folder, nbits="4", max_num_batched_tokens=8192)
    rng = random.Random(0)
    for share in (0, 0.5, 0.8, 0.95):
        times = []
        for _ in range(3):
            tested.flush_cache()
            prompt = [rng.randrange(10, 150000) for _ in range(5000)]
            for ids in (prompt[: int(5000 * share)], prompt):
                if ids:
                    start, params = time.perf_counter(), SamplingParams(temperature=0, max_tokens=1)
                    tested.submit(Request("prompt", ids, params))
                    while tested.has_work:
                        tested.step()
                    taken = time.perf_counter() - start
            times.append(taken)
        case = f"{share:.0%} of 5,000 tokens computed before"
        yield {"model": "Qwen2.5-7B, 4 bits", "case": case, "unit": "ms", "value": min(times) * 1e3}


def transformers() -> Iterator[Row]:
    from transformers import AutoConfig, AutoModelForCausalLM

    with model_folder("Qwen2.5-1.5B") as folder:
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").cuda().eval()
        ids = torch.randint(10, 150000, (8, 128), device="cuda")
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        times = []
        for new in (8, 128):
            torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(ids, max_new_tokens=new, **options)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        del model
        torch.cuda.empty_cache()
        common = {"model": "Qwen2.5-1.5B", "unit": "tok/s"}
        yield common | {"case": "transformers", "value": 8 * 128 / times[-1]}
        yield common | {"case": "kvtool", "value": 8 * 128 / seconds(engine(folder), [128] * 8, [128] * 8, 3)}


def card() -> Iterator[Row]:
    _, total = torch.cuda.mem_get_info()
    torch.cuda.memory.set_per_process_memory_fraction(min(1.0, CARD / total))
    for weights, nbits in (("auto", "16"), ("auto", "8"), ("auto", "4"), ("auto", "2"), ("w4a16", "4")):
        with model_folder("Qwen2.5-7B") as folder:
            share = {"gpu_memory_utilization": min(0.95, 0.95 * CARD / total), "kv_cache_memory": None}
            share |= {"quantization": weights, "max_model_len": 16384}
            tested = engine(folder, nbits, max_num_seqs=FILLING, prefix_caching=False, **share)
            held = tested.info.kv_tokens
            room = tested.info.num_blocks * tested.info.block_size // FILLING // 64 * 64
            length = room - 200  # as many tokens at once as there is room for
            taken = seconds(tested, [length] * FILLING, [32] * FILLING)
            free, _ = torch.cuda.mem_get_info()
            bits = f"{nbits} bits" if weights == "auto" else f"{nbits} bits, weights {weights}"
            case = f"{bits}; {FILLING} × {length:,} tokens in {taken:.1f} s, {(total - free) / 2**30:.2f} GiB held"
            yield {"model": "Qwen2.5-7B", "case": case, "unit": "tokens", "value": held}
            del tested
            gc.collect()
            torch.cuda.empty_cache()
    torch.cuda.memory.set_per_process_memory_fraction(1.0)


EFFECTS = {
    "graphs": graphs,
    "run ahead": run_ahead,
    "chunks": chunks,
    "prefix": prefix,
    "transformers": transformers,
    "24 GiB": card,
}


if __name__ == "__main__":
    main()
