"""Asks a server what clients from PyPI ask, and compares with what they should get (run by scripts/check_clients)."""

import json
import math
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from operator import add
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "kvtool/assets/tiny"
TOLERANCE, AGREEMENT = 1e-3, 0.05
SECONDS, STREAMS, OUTPUT_TOKENS = 20, 4, 32
QUESTION = "Remember this: The code of the red door is 4821. What is the code of the red door?"
TASKS: dict[str, dict[str, Any]] = {  # one of each kind that lm_eval has
    "page": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{page}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{end}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "ending": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "ends",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    },
    "question": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


class Door(BaseModel):
    colour: Literal["red", "green"]
    is_open: bool


@dataclass(frozen=True)
class Check:
    what: str
    got: str
    expected: str
    passed: bool


def main() -> None:
    console = Console(markup=False)
    checks: dict[str, list[Check]] = {}
    clients = {
        "lm_eval": [check_lm_eval],
        "guidellm": [check_guidellm, check_agreement],
        "langchain-openai": [check_langchain],
    }
    with TemporaryDirectory() as name, serving() as url:
        folder = Path(name)
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}  # fetch nothing, leave nothing
        card = model_card(url)
        for client, of_client in clients.items():
            checks[client] = []
            with console.status(f"{client} ..."):
                try:
                    for check in of_client:
                        checks[client].extend(check(url, card, folder))
                except Exception as error:  # whatever one client trips over, the others still get their turn
                    checks[client].append(Check("runs to its end", str(error), "no error", False))
    console.print(table(checks))
    sys.exit(not all(check.passed for of_client in checks.values() for check in of_client))


@contextmanager
def serving() -> Iterator[str]:
    """Address of a server on the embedded model, which ends with the block."""
    command = [ROOT / "scripts/kvtool", "serve", "--port", "0", "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = re.search(r"http://\S+", process.stdout.readline())
        if address is None:
            sys.exit("error: the server did not start; its reasons stand above")
        yield address[0]
    finally:
        process.terminate()
        process.communicate()


def model_card(url: str) -> dict[str, str]:
    with urllib.request.urlopen(f"{url}/v1/models") as response:
        return json.load(response)["data"][0]


def run(*command: str | Path) -> None:
    """Runs a client's command, and says what it said if it fails."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1000:] or done.stdout.strip()[-1000:])


# --- lm_eval ---------------------------------------------------------------------------------------------------------


def check_lm_eval(url: str, card: dict[str, str], folder: Path) -> Iterator[Check]:
    """Every kind of task that it has, over HTTP and by transformers in process.

    By ids: four prompts in a body, with the tokenizer that the model card's `root` names. By text: four requests at
    once, with the tokenizer behind /tokenize.
    """
    write_tasks(folder)
    # Without its cache of logits, which mixes up tasks where a document of one ends like one of another.
    transformers = f"pretrained={card['root']},dtype=float32,logits_cache=False"
    server = f"model={card['id']},base_url={url}/v1/completions,max_length={card['max_model_len']}"
    by_ids = f"{server},tokenizer={card['root']},tokenizer_backend=huggingface"
    by_text = f"{server},tokenized_requests=False,num_concurrent=4"

    expected = evaluate(folder, "hf", transformers, batch_size=1)
    ways = {
        "by ids": evaluate(folder, "local-completions", by_ids, batch_size=4),
        "by text": evaluate(folder, "local-completions", by_text, batch_size=1),
    }
    for way, got in ways.items():
        for what, figure in expected.items():
            close = math.isclose(got[what], figure, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
            yield Check(f"{what}, {way}", f"{got[what]:.6f}", f"{figure:.6f}", close)


def evaluate(folder: Path, model: str, arguments: str, batch_size: int) -> dict[str, float]:
    """Figures of all tasks, by task and metric."""
    with TemporaryDirectory(dir=folder) as output:
        tasks = ["--include_path", folder, "--tasks", ",".join(TASKS)]
        options = ["--batch_size", str(batch_size), "--device", "cpu", "--output_path", output]
        run("lm_eval", "run", "--model", model, "--model_args", arguments, *tasks, *options)
        (results,) = Path(output).rglob("results_*.json")
        return {
            f"{task} {metric.removesuffix(',none')}": figure
            for task, figures in json.loads(results.read_text())["results"].items()
            for metric, figure in figures.items()
            if metric.endswith(",none") and "stderr" not in metric
        }


def write_tasks(folder: Path) -> None:
    """Every task's documents, and its YAML, of which JSON is a part."""
    for name, documents in task_documents().items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(document) + "\n" for document in documents))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "target_delimiter": ""} | source | TASKS[name]))


def task_documents() -> dict[str, list[dict[str, Any]]]:
    """From the texts that travel with the embedded model.

    Pages fit into its context with tokens to spare: lm_eval keeps one for an answer, and cuts longer ones accordingly.
    """
    text = (ASSETS / "sample.txt").read_text("utf-8")
    words = [f" {word}" for word in text.split()]
    passages = [words[start : start + 100] for start in range(0, 4000, 100)]
    endings = ["".join(passage[90:]) for passage in passages]
    questions = (ASSETS / "retrieval.jsonl").read_text("utf-8").splitlines()
    return {
        "page": [{"page": text[start : start + 5000]} for start in range(0, 40_000, 5000)],
        "last_word": [{"start": "".join(passage[:-1]), "end": passage[-1]} for passage in passages],
        "ending": [
            {"start": "".join(passage[:90]), "ends": endings[n // 4 * 4 :][:4], "right": n % 4}
            for n, passage in enumerate(passages)
        ],
        "question": [json.loads(line) for line in questions[:12]],
    }


# --- guidellm --------------------------------------------------------------------------------------------------------


def check_guidellm(url: str, card: dict[str, str], folder: Path) -> Iterator[Check]:
    """Streams of chats for a while; those that the end of that while cuts off are neither failed nor counted."""
    report = folder / "load.json"
    run(
        *("guidellm", "run", "--disable-console", "--backend", f"kind=openai_http,target={url}"),
        *("--profile", f"kind=concurrent,streams={STREAMS}", "--constraint", f"kind=max_duration,seconds={SECONDS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={card['root']}"),
        *("--data", f"kind=synthetic_text,prompt_tokens=128,output_tokens={OUTPUT_TOKENS}"),
        *("--output", f"kind=json,path={report}"),
    )
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    done, failed = (metrics["request_totals"][state] for state in ("successful", "errored"))
    yield Check(f"failed, of {done + failed} requests", f"{failed}", "0", failed == 0 < done)

    tokens = metrics["output_token_count"]["successful"]
    exact = tokens["min"] == tokens["max"] == OUTPUT_TOKENS
    yield Check("tokens of an answer", f"{tokens['mean']:g}", f"{OUTPUT_TOKENS}", exact)

    ttft, itl, latency = (
        metrics[name]["successful"]["mean"]
        for name in ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency")
    )
    sane = min(ttft, itl) > 0 and math.isclose(1000 * latency, ttft + (OUTPUT_TOKENS - 1) * itl, rel_tol=0.05)
    parts = f"TTFT {ttft:.0f} ms + {OUTPUT_TOKENS - 1} × ITL {itl:.1f} ms"
    yield Check("time of an answer", f"{1000 * latency:.0f} ms", parts, sane)


def check_agreement(url: str, card: dict[str, str], folder: Path) -> Iterator[Check]:
    """guidellm beside `kvtool bench-throughput` under its definitions, on a server whose times are known.

    It computes nothing, so that neither of them takes the other's processor from under the server.
    """
    report, events = folder / "agreement.json", folder / "ours.json"
    with null_server() as null:
        run(
            *("guidellm", "run", "--disable-console", "--backend"),
            f"kind=openai_http,target={null},request_format=/v1/completions,validate_backend=false,model=nothing",
            *(
                "--profile",
                f"kind=concurrent,streams={STREAMS}",
                "--constraint",
                f"kind=max_duration,seconds={SECONDS}",
            ),
            *("--tokenizer", f"kind=huggingface_auto,model={card['root']}"),
            *("--data", f"kind=synthetic_text,prompt_tokens=128,output_tokens={OUTPUT_TOKENS}"),
            *("--output", f"kind=json,path={report}"),
        )
        load = ["--concurrency", str(STREAMS), "--duration", str(SECONDS), "--output-tokens", str(OUTPUT_TOKENS)]
        ours = [
            ROOT / "scripts/kvtool",
            "bench-throughput",
            "--url",
            null,
            "--metric-defs",
            "guidellm",
            "--trials",
            "1",
        ]
        subprocess.run([*ours, *load, "--output", events], check=True, stdout=subprocess.DEVNULL)
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    (row,) = json.loads(events.read_text())["rows"]
    names = {
        "time_to_first_token_ms": "ttft_ms",
        "inter_token_latency_ms": "itl_ms",
        "time_per_output_token_ms": "tpot_ms",
    }
    for theirs, name in names.items():
        figure, expected = row[name]["mean"], benchmark["metrics"][theirs]["successful"]["mean"]
        close = math.isclose(figure, expected, rel_tol=AGREEMENT)
        yield Check(f"{name} of kvtool bench-throughput", f"{figure:.2f}", f"{expected:.2f} ± {AGREEMENT:.0%}", close)


@contextmanager
def null_server() -> Iterator[str]:
    """Address of a server that answers after 0.2 s, and then every 30 ms."""
    command = [ROOT / ".venv/bin/python", "-m", "kvtool.bench.null_server", "0.2", "0.03"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


# --- LangChain -------------------------------------------------------------------------------------------------------


def check_langchain(url: str, card: dict[str, str], folder: Path) -> Iterator[Check]:
    """A chat, streamed and whole, and one that must answer in JSON."""
    server = {"base_url": f"{url}/v1", "api_key": SecretStr("any"), "model": card["id"]}
    chat = ChatOpenAI(**server, temperature=0, stream_usage=True)
    whole = chat.invoke(QUESTION)
    streamed = reduce(add, chat.stream(QUESTION))
    yield Check("a chat, streamed", streamed.text, whole.text, streamed.text == whole.text != "")
    used, expected = (answer.usage_metadata["total_tokens"] for answer in (streamed, whole))
    yield Check("tokens that it used", f"{used}", f"{expected}", used == expected)
    door = chat.with_structured_output(Door, method="json_schema").invoke(QUESTION)
    yield Check("a chat that keeps to a schema", repr(door), "a Door", isinstance(door, Door))


# --- the report ------------------------------------------------------------------------------------------------------


def table(checks: dict[str, list[Check]]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, title="kvtool serve, as its clients see it")
    for heading in ("client", "got", "expected", ""):
        shown.add_column(heading)
    for client, of_client in checks.items():
        shown.add_row(f"{client} {version(client)}", style="bold")
        for check in of_client:
            verdict, style = ("ok", None) if check.passed else ("FAILED", "red")
            shown.add_row(check.what, check.got, check.expected, verdict, style=style)
        shown.add_section()
    return shown


if __name__ == "__main__":
    main()
