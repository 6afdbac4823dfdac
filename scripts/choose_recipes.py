#!/usr/bin/env python3
"""What the default recipes and the preflight's limit rest on: formats on the embedded model, its twins, random layers.

usage: scripts/choose_recipes.py novels/valid/*.txt [--windows 4] [--questions 24]

1. Formats, on the model and on its outlier twins, against 16 bits: change of perplexity over windows of 2,048 tokens
   of each text, KL divergence, honest bits, and the error of the worst layer's attention as the preflight measures it.
2. Twins whose outliers grow: where perplexity breaks, beside the error that the preflight sees.
3. Random layers of Qwen2.5-7B's shape, whose keys have biases up to 100: the error of the attention's output.
4. Retrieval by the default recipes.

Prints Markdown tables.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from kvtool.attention.layer import AttentionLayer
from kvtool.config import EngineConfig, KVOptions
from kvtool.kernels.rotary_heads import rotate
from kvtool.kv.format import StreamFormat, resolve
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.layers.rotary import Rope, Rotary
from kvtool.models.resolve import EMBEDDED
from kvtool.perplexity import score_formats
from kvtool.protocols import Task, make_task, read_documents
from kvtool.quantize.layer_errors import LayerActivations, attend_packed, layer_errors
from kvtool.quantize.preflight import LIMIT, examine
from kvtool.quantize.tasks import RETRIEVAL, answer_all, load_task
from kvtool.scoring import ScoringModel
from kvtool.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from twins import outlier_twin

FORMATS = {
    "8 (default)": KVOptions(nbits="8"),
    "8 token/token": KVOptions(nbits="8", axis_key="token"),
    "8 token/token, symmetric": KVOptions(nbits="8", axis_key="token", symmetric=True),
    "fp8": KVOptions(nbits="fp8"),
    "4 (default)": KVOptions(nbits="4"),
    "4 in groups of 32": KVOptions(nbits="4", q_group_size=32),
    "4, window 32": KVOptions(nbits="4", residual_length=32),
    "4 token/token": KVOptions(nbits="4", axis_key="token"),
    "4 token/token, rotated": KVOptions(nbits="4", axis_key="token", rotate=True),
    "K4 V2": KVOptions(nbits_key="4", nbits_value="2"),
    "K2 V4": KVOptions(nbits_key="2", nbits_value="4"),
    "2 (default)": KVOptions(nbits="2"),
    "2, no window": KVOptions(nbits="2", residual_length=0),
    "2, no window, in groups of 32": KVOptions(nbits="2", residual_length=0, q_group_size=32),
    "2, window 64": KVOptions(nbits="2", residual_length=64),
    "2, window 128": KVOptions(nbits="2", residual_length=128),
}
TWINS = {
    "keys × 64": {},
    "keys × 64, value biases": {"value_bias": 0.5},
}
PER_TOKEN = {f"{bits} token/token": KVOptions(nbits=bits, axis_key="token") for bits in ("8", "4")}
QWEN_LAYERS, QWEN_TOKENS = 4, 1024  # of Qwen2.5-7B: 28 query and 4 KV heads of 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--windows", type=int, default=4, help="of 2,048 tokens, of each text")
    parser.add_argument("--questions", type=int, default=24, help="of retrieval, at each format")
    arguments = parser.parse_args()
    texts = ["\n".join(read_documents(path)) for path in arguments.texts]
    tiny = EMBEDDED["tiny"]
    with TemporaryDirectory() as folder:
        models = {"tiny": tiny}
        models |= {name: outlier_twin(tiny, Path(folder, name), **options) for name, options in TWINS.items()}
        for name, path in models.items():
            print_formats(name, path, texts, arguments.windows)
        print_growing_outliers(tiny, Path(folder), texts[:1])
    print_random_layers()
    print_retrieval(arguments.questions)


def print_formats(name: str, path: Path, texts: Sequence[str], num_windows: int) -> None:
    model, task = opened(path, texts, num_windows)
    windows = torch.tensor(task.windows[0].token_ids)[None]
    scores = score_formats(model, task, {"16": KVOptions(), **FORMATS})[1:]
    rows = []
    for score, kv in zip(scores, FORMATS.values(), strict=True):
        worst = examine(model.model, windows, model.layout(kv).spec, kv).worst
        rows.append(
            (
                str(score.format.name),
                f"{score.bits_per_element:.2f}",
                str(model.layout(kv).format.tail_tokens),
                f"{score.perplexity_change:+.3%} ± {score.perplexity_change_error:.3%}",
                f"{score.kld_mean:.2e}",
                f"{score.top1_agreement:.2%}",
                f"{worst:.1%}",
            )
        )
    title = f"{name}: {task.num_tokens:,} tokens"
    print_table(title, ("format", "bits", "tail", "perplexity", "KLD", "same top-1", "worst layer"), rows)


def print_growing_outliers(source: Path, folder: Path, texts: Sequence[str]) -> None:
    rows = []
    for scale in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0):
        model, task = opened(outlier_twin(source, folder / f"x{scale:g}", scale=scale), texts, 1)
        windows = torch.tensor(task.windows[0].token_ids)[None]
        for score, kv in zip(score_formats(model, task, PER_TOKEN), PER_TOKEN.values(), strict=True):
            worst = examine(model.model, windows, model.layout(kv).spec, kv).worst
            found = "collapses" if worst > LIMIT else ""
            rows.append(
                (f"× {scale:g}", str(score.format.name), f"{score.perplexity_change:+.1%}", f"{worst:.1%}", found)
            )
    print_table("Keys whose outliers grow", ("outliers", "format", "perplexity", "worst layer", "preflight"), rows)


def print_random_layers() -> None:
    spec = KVSpec(QWEN_LAYERS, StreamSpec(4, 128), StreamSpec(4, 128), 4)
    layers = [random_layer(seed) for seed in range(QWEN_LAYERS)]
    rows = []
    for name, kv in FORMATS.items():
        errors = layer_errors(layers, resolve(kv, spec))
        rows.append((name, *(f"{getattr(max(errors, key=by), field):.1%}" for field, by in WORST.items())))
    print_table(
        f"Random layers like Qwen2.5-7B's, worst of {QWEN_LAYERS}", ("format", "keys", "values", "output"), rows
    )


WORST = {
    "key": lambda errors: errors.key,
    "value": lambda errors: errors.value,
    "output": lambda errors: errors.output,
}


def random_layer(seed: int) -> LayerActivations:
    """Normal queries, keys and values; three RoPE pairs of each key head have biases of 10 to 100."""
    generator = torch.Generator().manual_seed(seed)
    layer = AttentionLayer(28, 4, 128, 128**-0.5)
    q, k, v = (torch.randn(QWEN_TOKENS, heads, 128, generator=generator) for heads in (28, 4, 4))
    for head in range(4):
        pairs = torch.randperm(64, generator=generator)[:3]
        size = 10 * 10 ** torch.rand(3, generator=generator)
        k[:, head, pairs] += size
        k[:, head, pairs + 64] -= size
        q[:, head * 7 : head * 7 + 7, pairs] /= size[None, None]  # or one token would take all attention
        q[:, head * 7 : head * 7 + 7, pairs + 64] /= size[None, None]
    cos, sin = Rotary(Rope(128, 1e6), QWEN_TOKENS, dtype=torch.float32, device=torch.device("cpu"))(
        torch.arange(QWEN_TOKENS)
    )
    query, key, value = (x[None] for x in (rotate(q, cos, sin), rotate(k, cos, sin), v))
    exact = StreamFormat()
    everything = resolve(KVOptions(), KVSpec(1, StreamSpec(4, 128), StreamSpec(4, 128), 4))
    return LayerActivations(layer, query, key, value, attend_packed(query, key, value, exact, exact, everything, layer))


def print_retrieval(count: int) -> None:
    questions = load_task(RETRIEVAL)[:count]
    rows = []
    for bits in ("16", "8", "4", "2"):
        config = EngineConfig(kv=KVOptions(nbits=bits), kv_cache_memory=1 << 28)
        answers = answer_all(config, questions, max_tokens=8)
        rows.append((bits, f"{sum(answer.is_right for answer in answers)} of {len(answers)}"))
    print_table("Retrieval", ("bits", "right"), rows)


def opened(path: Path, texts: Sequence[str], num_windows: int) -> tuple[ScoringModel, Task]:
    """A model, and `num_windows` windows of each text, from its middle on."""
    model = ScoringModel(EngineConfig(model=str(path), dtype="float32"))
    tokenizer = Tokenizer.load(path, model.model_config.vocab_size)
    tasks = [
        make_task("gptq", [text[len(text) // 2 :]], tokenizer, 2048, max_tokens=2048 * num_windows) for text in texts
    ]
    windows = [window for task in tasks for window in task.windows]
    return model, replace(tasks[0], windows=windows, weights=[1.0] * len(windows))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n## {title}\n")
    for row in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
