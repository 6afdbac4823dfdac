"""What an engine holds of this GPU beside what `kvtool mla-size --fit` says, and where the time of its steps goes.

  python scripts/gpu_memory.py --output memory.json

Random weights of true shape. Each case runs in a process of its own, with --profile: prompts that fill the cache, and
some steps of decoding; tables of the steps go to stderr. Fails where prediction and peak are more than 3 % apart.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_report import model_folder
from rich.console import Console
from rich.table import Table

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.request import SamplingParams
from kvtool.sizing.fit import fit

ANSWER = 80  # tokens, of which steps 64 to 71 are traced
MOST_APART = 0.03
CASES = [  # model, KV bits, sequences, tokens of each, tokens of a step
    ("Qwen2.5-7B", "16", 16, 8192, 2048),
    ("Qwen2.5-7B", "4", 16, 32768, 2048),
    ("Qwen2.5-7B", "4", 64, 2048, 8192),
    ("Qwen2.5-1.5B", "16", 64, 2048, 2048),
    ("Qwen3-0.6B", "2", 256, 1024, 8192),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", default=",".join(map(str, range(len(CASES)))), help="numbers of cases, from 0; 0,0 starts twice"
    )
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file for all rows")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this needs an NVIDIA GPU")
    if args.one is not None:
        print(json.dumps(measure(*CASES[args.one])))
        return  # what runs the cases leaves the GPU alone, or it would hold some of it itself
    rows: list[dict[str, Any]] = []
    for number in args.cases.split(","):
        ran = subprocess.run([sys.executable, __file__, "--one", number], stdout=subprocess.PIPE, text=True)
        if ran.returncode:
            sys.exit(f"error: case {number} ended with status {ran.returncode}")
        rows.append(json.loads(ran.stdout))
        if args.output:
            args.output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    show(rows)
    if any(abs(row["predicted"]["total"] / row["measured"]["total"] - 1) > MOST_APART for row in rows):
        sys.exit(1)


def measure(model: str, nbits: str, batch: int, context: int, step: int) -> dict[str, Any]:
    """Predicted and measured bytes of one case, by part."""
    _, total = torch.cuda.mem_get_info()
    with model_folder(model) as folder, tempfile.TemporaryDirectory() as traces:
        config = EngineConfig(
            model=folder,
            load_format="dummy",
            max_model_len=context,
            max_num_seqs=batch,
            max_num_batched_tokens=step,
            swap_space=0,
            prefix_caching=False,
            profile=traces,
            kv=KVOptions(nbits=nbits),  # type: ignore[arg-type]
        )
        predicted = fit(folder, config, "H200", total, "16").parts  # or whatever has so much memory
        cache = predicted.codes + predicted.metadata + predicted.windows
        engine = Engine(EngineConfig(**{**vars(config), "kv_cache_memory": cache}))
        rng = random.Random(0)
        prompts = [[rng.randrange(10, engine.info.vocab_size) for _ in range(context - ANSWER)] for _ in range(batch)]
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True))
        costly = SamplingParams(temperature=1, repetition_penalty=1.1, logprobs=1, prompt_logprobs=1, max_tokens=4)
        engine.generate([prompt[:64] for prompt in prompts], costly)
        free, _ = torch.cuda.mem_get_info()  # torch gives nothing back, so this is the peak
        held = engine.runner.held()
    case = f"{model}, {nbits} bits, {batch} × {context:,} tokens, {step:,} a step"
    return {
        "gpu": torch.cuda.get_device_name(),
        "case": case,
        "start_s": round(engine.info.start_seconds, 1),
        "predicted": {**asdict(predicted), "total": predicted.total},
        "measured": {**asdict(held), "total": total - free},
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table("MiB", *rows[0]["predicted"], "apart", "start s", box=None, title=rows[0]["gpu"])
    for row in rows:
        apart = row["predicted"]["total"] / row["measured"]["total"] - 1
        for which in ("predicted", "measured"):
            parts = [f"{nbytes / 2**20:,.0f}" for nbytes in row[which].values()]
            ends = [f"{apart:+.2%}", f"{row['start_s']}"] if which == "measured" else []
            table.add_row(f"{row['case']}: {which}", *parts, *ends)
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
