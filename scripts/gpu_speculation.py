"""What speculative decoding gives at batch 1 as a function of the acceptance rate, against the formula.

    python scripts/gpu_speculation.py                       # a GPU of 40 GB or more, about 5 minutes
    python scripts/gpu_speculation.py --model tiny --device cpu --tokens 40    # a dry run

Weights are random, of the models' true shapes, so what the draft model proposes is worth nothing; here each drafted
token is made right with a given probability, between the model's step and the verification, which both run as always.
The formula is that of Leviathan et al. (2023): (1 - a^(k+1)) / ((1 - a) (k c + 1)), c being what a step of the draft
takes of one of the target, both measured here. Prints a table, and JSON on the last line.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from kvtool import runner
from kvtool.config import EngineConfig, KVOptions, SpeculationConfig
from kvtool.engine import Engine
from kvtool.models.resolve import resolve_config
from kvtool.request import Request, SamplingParams
from kvtool.sampler import Drafts, verify

QWEN_HALF_B = {  # what is not as in Qwen2.5-7B
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_window_layers": 24,
    "tie_word_embeddings": True,
}
COUNTS = (2, 4, 6)
RATES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def imposed(rate: float) -> Callable[[Tensor, Drafts, Tensor], Tensor]:
    """`verify` of drafts whose every token is right with this probability."""

    def verify_imposed(token_ids: Tensor, drafts: Drafts, recent: Tensor) -> Tensor:
        steps = torch.arange(len(recent) - 1, device=recent.device)
        sampled = token_ids[drafts.firsts[:, None] + steps.minimum(drafts.counts[:, None])]
        is_right = torch.rand(sampled.shape, device=recent.device) < rate
        recent[1:, drafts.slots] = torch.where(is_right, sampled, -1).T
        return verify(token_ids, drafts, recent)

    return verify_imposed


def write_config(folder: Path, name: str, **others: object) -> None:
    """The config.json of a published or an embedded model, with other fields."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**resolve_config(name).values, **others}))


def seconds_per_token(engine: Engine, options: argparse.Namespace, speculate: bool) -> float:
    """From the first token to the last, the median of trials."""
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True, speculate=speculate)
    times = []
    for trial in range(options.trials + 1):  # the first one is not timed
        prompt = [(17 * i + trial) % 1000 + 3 for i in range(options.prompt)]
        engine.submit(Request(f"{speculate}-{trial}-{time.time()}", prompt, params, cache_salt=str(time.time())))
        first, count = 0.0, 0
        while engine.has_work:
            if news := engine.step():
                first = first or time.perf_counter()
                count += sum(len(tokens.token_ids) for tokens in news)
                last = time.perf_counter()
        times.append((last - first) / (count - 1))
    return median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2.5-7B", help="drafted for by a Qwen2.5-0.5B; any other by its like")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--nbits", default="4", help="of the KV cache")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens")
    parser.add_argument("--tokens", type=int, default=200, help="of an answer")
    parser.add_argument("--trials", type=int, default=3)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        target, draft = Path(folder, "target"), Path(folder, "draft")
        write_config(target, options.model)
        write_config(draft, options.model, **(QWEN_HALF_B if options.model == "Qwen2.5-7B" else {}))
        measure(options, target, draft)


def measure(options: argparse.Namespace, target: Path, draft: Path) -> None:
    shared = {
        "device": options.device,
        "load_format": "dummy",
        "max_model_len": options.prompt + options.tokens,
        "max_num_seqs": 4,
        "kv_cache_memory": 1 << 30,
        "kv": KVOptions(nbits=options.nbits),
    }
    alone = Engine(EngineConfig(model=str(draft), **shared))
    draft_seconds = seconds_per_token(alone, options, speculate=False)
    del alone
    speculation = SpeculationConfig("draft", num_tokens=max(COUNTS), draft_model=str(draft))
    engine = Engine(EngineConfig(model=str(target), speculation=speculation, **shared))
    pace = engine.scheduler.drafting.pace
    pace.observe = lambda *step: None
    plain = seconds_per_token(engine, options, speculate=False)
    share = draft_seconds / plain
    print(f"target {1000 * plain:.2f} ms a token, draft {1000 * draft_seconds:.2f} ms: c = {share:.3f}")
    print("k  acceptance  ms/token  tokens/step  speed-up  formula")
    rows = []
    for count in COUNTS:
        pace.num_tokens = count
        pace.for_sequence = lambda acceptance, count=count: count
        for rate in RATES:
            runner.verify = imposed(rate)
            engine.scheduler.totals.clear()
            seconds = seconds_per_token(engine, options, speculate=True)
            totals = engine.scheduler.totals
            row = {
                "k": count,
                "acceptance": rate,
                "tokens_per_step": 1 + totals["accepted_total"] / totals["verifications_total"],
                "ms_per_token": 1000 * seconds,
                "speed_up": plain / seconds,
                "formula": sum(rate**i for i in range(count + 1)) / (count * share + 1),
            }
            rows.append(row)
            print(
                f"{count}  {rate:10.1f}  {row['ms_per_token']:8.2f}  {row['tokens_per_step']:11.2f}  "
                f"{row['speed_up']:8.2f}  {row['formula']:7.2f}",
                flush=True,
            )
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    about = {"model": options.model, "device": device, "nbits": options.nbits, "c": share}
    print(json.dumps(about | {"target_ms": 1000 * plain, "draft_ms": 1000 * draft_seconds, "rows": rows}))


if __name__ == "__main__":
    main()
