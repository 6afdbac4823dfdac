"""KV from one GPU to another: a long prompt of a model of true shape with random weights, sent and served.

    python scripts/gpu_disagg.py --output disagg.json
    python scripts/gpu_disagg.py --devices cuda:0,cuda:0 --transfers tcp --tokens 8000

First the packed KV alone, for each transfer and format; then a prefill and a decode engine with --serve transfers: what
the transfer adds to the time to the first token, behind the last layer's compute.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import torch
from gpu_report import MODELS, model_folder

sys.path.insert(0, str(Path(__file__).parents[1]))
from kvtool.config import EngineConfig, KVOptions
from kvtool.disagg.link import Case, OtherEnd, layout_of
from kvtool.disagg.measure import Found, Load, measure, percentiles
from kvtool.errors import KVToolError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-7B", help=f"of {', '.join(MODELS)}, or a folder with a config.json")
    parser.add_argument("--tokens", type=int, default=32000, help="of the prompt")
    parser.add_argument("--nbits", default="16,4", help="KV formats")
    parser.add_argument("--transfers", default="nccl,tcp", help="to measure alone; empty: none")
    parser.add_argument("--serve", default="nccl", help="transfers to serve with; empty: none")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="of prefill and decode")
    parser.add_argument("--requests", type=int, default=3)
    parser.add_argument("--decodes", type=int, default=8, help="answers that are being written all the while")
    parser.add_argument("--output", type=Path, help="JSON file for all rows")
    args = parser.parse_args()
    source, target = args.devices.split(",")
    rows: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if args.output:
            args.output.write_text(json.dumps(rows, indent=1) + "\n")

    with model_folder(args.model) as folder:
        for nbits in args.nbits.split(","):
            kv = KVOptions(nbits=nbits)
            engine = EngineConfig(
                model=folder,
                load_format="dummy",
                max_model_len=args.tokens + 512,
                max_num_seqs=16,
                kv_cache_memory=8 << 30,
                swap_space=8 << 30,
                kv=kv,
            )
            dtype = "bfloat16" if source.startswith("cuda") else "float32"
            layout = layout_of(engine, kv, dtype)
            with OtherEnd() as other:
                for transfer in filter(None, args.transfers.split(",")):
                    try:
                        speed = other.speed(Case(layout, dtype, args.tokens, source, target, transfer))
                    except KVToolError as error:
                        keep({"what": "transfer", "nbits": nbits, "transfer": transfer, "error": str(error)})
                        continue
                    row = {"what": "transfer", "nbits": nbits, "transfer": transfer, "bytes": speed.num_bytes}
                    row |= {"predicted": speed.predicted_bytes, "gb_s": round(speed.gb_s, 2)}
                    stored = speed.num_bytes / speed.seconds / 1e9
                    keep(row | {"gb_s_into_store": round(stored, 2), "ms": round(1e3 * speed.seconds, 2)})
            torch.cuda.empty_cache()
            for transfer in filter(None, args.serve.split(",")):
                keep({"what": "served", "nbits": nbits} | served(engine, args, (source, target), transfer))


def served(engine: EngineConfig, args: argparse.Namespace, devices: tuple[str, str], transfer: str) -> dict[str, Any]:
    """Long prompts through a prefill and a decode engine, among answers that are being written."""
    found = Found()
    load = Load((args.tokens,), 16, args.requests, args.decodes)
    try:
        asyncio.run(measure(engine, load, found, devices=devices, transfer=transfer))
    except KVToolError as error:
        return {"transfer": transfer, "error": str(error)}
    staged = [(outcome.ttft, outcome.stages) for outcome in found.shared.outcomes if outcome.stages and outcome.ttft]

    def itl(gaps: list[tuple[float, float]]) -> dict[str, float]:
        return {name: round(1e3 * gap, 2) for name, gap in percentiles([gap for _, gap in gaps]).items()}

    return {
        "transfer": transfer,
        "ttft_ms": [round(1e3 * ttft, 1) for ttft, _ in staged],
        "stages_ms": [{name: round(1e3 * seconds, 2) for name, seconds in stages.items()} for _, stages in staged],
        "transfer_share": [round(stages["transfer"] / ttft, 4) for ttft, stages in staged],
        "residual": found.residual,
        "outputs_match": [found.matches(outcome) for outcome in found.shared.outcomes],
        "itl_ms": {"colocated": itl(found.colocated.gaps), "disaggregated": itl(found.shared.gaps)},
        "losses": found.losses,
    }


if __name__ == "__main__":
    main()
