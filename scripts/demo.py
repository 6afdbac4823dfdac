"""Answers the same prompts with the embedded model at 16, 4 and 2 bits of KV cache (run by scripts/demo)."""

import json
from importlib.resources import files

from rich import box
from rich.console import Console
from rich.table import Table

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Completion, Engine
from kvtool.request import SamplingParams
from kvtool.tokenizer import Tokenizer

BITS = ("16", "4", "2")
PARAMS = SamplingParams(temperature=0, max_tokens=32)


def main() -> None:
    console = Console()
    with console.status("loading the embedded model"):
        engines = [Engine(EngineConfig(dtype="bfloat16", max_num_seqs=4, kv=KVOptions(nbits=b))) for b in BITS]
    tokenizer = Tokenizer.load(engines[0].runner.path, engines[0].info.vocab_size)
    prompts = demo_prompts(tokenizer)
    answers = [engine.generate(list(prompts.values()), PARAMS) for engine in engines]
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, title="One model, one prompt, three caches")
    table.add_column("prompt", ratio=1)
    for bits in BITS:
        table.add_column(f"{bits} bits", ratio=2)
    for row, name in enumerate(prompts):
        cells = [cell(engine, tokenizer, done[row]) for engine, done in zip(engines, answers, strict=True)]
        table.add_row(name, *cells)
    console.print(table)
    console.print("Bytes are packed blocks + the newest tokens at full precision; the model runs in bfloat16.")


def demo_prompts(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """A question about something said 1,800 tokens earlier, a novel to continue, and a chat."""
    assets = files("kvtool") / "assets" / "tiny"
    documents = [json.loads(line) for line in (assets / "retrieval.jsonl").read_text("utf-8").splitlines()]
    asked = next(d for d in documents if d["length"] == 1800)
    novel = tokenizer.encode((assets / "sample.txt").read_text("utf-8"))[11_000:12_200]
    return {
        f"1,800 tokens with a fact to find again (it is {asked['answer'].strip()})": tokenizer.encode(asked["prompt"]),
        "1,200 tokens of a novel to continue": novel,
        "chat: Who are you?": tokenizer.chat([{"role": "user", "content": "Who are you?"}]),
    }


def cell(engine: Engine, tokenizer: Tokenizer, completion: Completion) -> str:
    layout = engine.runner.store.layout
    length = len(completion.prompt_token_ids) + len(completion.token_ids) - 1
    packed = layout.bytes_for([length]) - layout.tail_bytes
    nbytes = f"{packed / 1024:,.0f} + {layout.tail_bytes / 1024:,.0f} KiB"
    return f"{tokenizer.decode(completion.token_ids).strip()}\n\n[bold]{nbytes}[/bold]"


if __name__ == "__main__":
    main()
