"""`kvtool perplexity`: protocols against short references in transformers, statistics against plain formulas."""

import gc
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import torch.nn.functional as F
from checkpoints import make_checkpoint
from conftest import Command, error_line
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvtool.config import EngineConfig, KVOptions
from kvtool.errors import ConfigError
from kvtool.models.resolve import EMBEDDED
from kvtool.perplexity import FormatScore, Interrupted, parse_formats, score_formats
from kvtool.protocols import SAMPLE, make_task, read_documents
from kvtool.scoring import SIXTEEN_BITS, ScoringModel
from kvtool.tokenizer import Tokenizer

TINY = EMBEDDED["tiny"]
TEXT = SAMPLE.read_text("utf-8")
DOCUMENTS = [TEXT[:1500], "", TEXT[3000:3100], TEXT[5000:6500]]


@dataclass(frozen=True)
class Pair:
    """A model here and in transformers, with their tokenizers."""

    model: ScoringModel
    tokenizer: Tokenizer
    hf: Any
    hf_tokenizer: Any


def pair(path: Path) -> Pair:
    model = ScoringModel(EngineConfig(str(path), "float32"))
    hf = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    return Pair(model, Tokenizer.load(path, model.model_config.vocab_size), hf, AutoTokenizer.from_pretrained(path))


@pytest.fixture(scope="module")
def tiny() -> Pair:
    return pair(TINY)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Random weights, and a tokenizer that begins texts with BOS."""
    path = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", path, vocab_size=4096, max_position_embeddings=300)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.bos_token = "<|im_start|>"
    begin = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = begin
    tokenizer.save_pretrained(path)
    assert AutoTokenizer.from_pretrained(path)("a").input_ids[0] == tokenizer.bos_token_id
    return pair(path)


@pytest.fixture(params=["tiny", "llama"])
def both(request: pytest.FixtureRequest) -> Pair:
    found: Pair = request.getfixturevalue(request.param)
    return found


def score(
    models: Pair, protocol: str, documents: list[str], kv: KVOptions = SIXTEEN_BITS, **options: Any
) -> FormatScore:
    task = make_task(protocol, documents, models.tokenizer, models.model.max_model_len, **options)
    (found,) = score_formats(models.model, task, {"asked": kv})
    return found


def nll(models: Pair, ids: list[int]) -> Tensor:
    """Negative log-likelihood of each token but the first, by transformers."""
    with torch.no_grad():
        logits = models.hf(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").double()


# The references: what each tool does, in transformers.


def llamacpp_reference(models: Pair, text: str, n_ctx: int) -> tuple[float, float]:
    """examples/perplexity of llama.cpp: perplexity and its error."""
    ids = models.hf_tokenizer(text).input_ids
    bos = models.hf_tokenizer.bos_token_id
    scored = []
    for start in range(0, len(ids) // n_ctx * n_ctx, n_ctx):
        chunk = ids[start : start + n_ctx]
        if bos is not None:
            chunk[0] = bos
        scored.append(nll(models, chunk)[n_ctx // 2 :])
    values = torch.cat(scored)
    mean, square = values.mean(), values.square().mean()
    error = ((square - mean.square()) / (len(values) - 1)).sqrt()
    return mean.exp().item(), (mean.exp() * error).item()


def hf_stride_reference(models: Pair, text: str, max_length: int, stride: int) -> float:
    """The guide's loop, down to the tokens that it counts."""
    input_ids = models.hf_tokenizer(text, return_tensors="pt").input_ids
    seq_len, nll_sum, n_tokens, prev_end_loc = input_ids.size(1), 0.0, 0, 0
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + max_length, seq_len)
        trg_len = end_loc - prev_end_loc
        window = input_ids[:, begin_loc:end_loc]
        target_ids = window.clone()
        target_ids[:, :-trg_len] = -100
        with torch.no_grad():
            loss = models.hf(window, labels=target_ids).loss.item()
        num_loss_tokens = (target_ids != -100).sum().item() - 1
        nll_sum += loss * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    return math.exp(nll_sum / n_tokens)


def gptq_reference(models: Pair, text: str, seqlen: int) -> float:
    ids = models.hf_tokenizer(text).input_ids
    num_samples = len(ids) // seqlen
    means = [nll(models, ids[i * seqlen : (i + 1) * seqlen]).float().mean() * seqlen for i in range(num_samples)]
    return math.exp(torch.stack(means).sum() / (num_samples * seqlen))


def lm_eval_reference(models: Pair, documents: list[str], max_length: int) -> dict[str, float]:
    """loglikelihood_rolling and the three metrics of the wikitext task."""
    total, tokens, words, size = 0.0, 0, 0, 0
    prefix = models.hf_tokenizer.bos_token_id or models.hf_tokenizer.eos_token_id
    for text in documents:
        ids = models.hf_tokenizer(text, add_special_tokens=False).input_ids
        predicted = 0
        while predicted < len(ids):
            if predicted == 0:
                end = min(max_length, len(ids))
                given, num_predicted = [prefix, *ids[: end - 1]], end
            else:
                num_predicted = min(len(ids) - predicted, max_length)
                end = predicted + num_predicted
                given = ids[end - max_length - 1 : end - 1]
            total += nll(models, [*given, ids[end - 1]])[-num_predicted:].sum().item()
            predicted += num_predicted
        tokens += len(ids)
        words += len(re.split(r"\s+", text))
        size += len(text.encode())
    return {
        "perplexity": math.exp(total / tokens),
        "word_perplexity": math.exp(total / words),
        "byte_perplexity": math.exp(total / size),
        "bits_per_byte": total / size / math.log(2),
    }


def close(value: float | None, expected: float) -> bool:
    return value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("n_ctx", [128, 301])
def test_llamacpp(tiny: Pair, llama: Pair, n_ctx: int) -> None:
    for models, window in ((tiny, n_ctx), (llama, min(n_ctx, 299))):
        found = score(models, "llamacpp", [TEXT[:2500]], window=window)
        assert close(found.perplexity, llamacpp_reference(models, TEXT[:2500], window)[0])
        assert close(found.perplexity_error, llamacpp_reference(models, TEXT[:2500], window)[1])


@pytest.mark.parametrize(("window", "stride"), [(200, 64), (200, 200), (128, 127), (300, 90)])
def test_hf_stride(both: Pair, window: int, stride: int) -> None:
    text = TEXT[:1500]
    assert close(
        score(both, "hf-stride", [text], window=window, stride=stride).perplexity,
        hf_stride_reference(both, text, window, stride),
    )


@pytest.mark.parametrize("window", [150, 299])
def test_gptq(both: Pair, window: int) -> None:
    found = score(both, "gptq", DOCUMENTS, window=window)
    assert close(found.perplexity, gptq_reference(both, "\n\n".join(DOCUMENTS), window))


@pytest.mark.parametrize("window", [128, 255])
def test_lm_eval(both: Pair, window: int) -> None:
    documents = [text for text in DOCUMENTS if text]
    found = score(both, "lm-eval", DOCUMENTS, window=window)
    for name, expected in lm_eval_reference(both, documents, window).items():
        assert close(getattr(found, name), expected), name


def test_statistics_are_the_plain_formulas(llama: Pair) -> None:
    task = make_task("gptq", [TEXT[:1500]], llama.tokenizer, 300, window=140)
    formats = {"2": KVOptions(nbits="2", q_group_size=32), "16": SIXTEEN_BITS, "8": KVOptions(nbits="8")}
    found = score_formats(llama.model, task, formats)
    assert [row.format.name for row in found] == ["2", "16", "8"]
    exact, asked = (
        torch.cat([rows for rows, _ in llama.model.log_probs(task.windows, kv)]).double()
        for kv in (SIXTEEN_BITS, formats["2"])
    )
    targets = torch.tensor([token for window in task.windows for token in window.targets])
    exact_nll, asked_nll = (F.nll_loss(x, targets, reduction="none") for x in (exact, asked))
    kld = F.kl_div(asked, exact, log_target=True, reduction="none").sum(-1)
    same, change = (exact.argmax(-1) == asked.argmax(-1)).double(), asked_nll - exact_nll
    n = len(targets)
    assert found[0].tokens == n
    expected = {
        "perplexity": asked_nll.mean().exp(),
        "kld_mean": kld.mean(),
        "kld_error": kld.std() / n**0.5,
        "kld_median": kld.quantile(0.5),
        "kld_p99": kld.quantile(0.99),
        "kld_p999": kld.quantile(0.999),
        "kld_max": kld.max(),
        "top1_agreement": same.mean(),
        "top1_error": (same.mean() * (1 - same.mean()) / (n - 1)) ** 0.5,
        "perplexity_change": change.mean().exp() - 1,
        "perplexity_change_error": change.mean().exp() * change.std() / n**0.5,
    }
    plain = {name: float(value) for name, value in expected.items()}
    assert {name: getattr(found[0], name) for name in plain} == pytest.approx(plain, rel=1e-4)
    assert found[0].kld_mean > 1e-2 > found[2].kld_mean > 0
    nothing = found[1].kld_mean, found[1].kld_max, found[1].perplexity_change, found[1].top1_agreement
    assert nothing == (0, 0, 0, 1)


def test_sizes_are_those_of_a_model_in_16_bits(llama: Pair) -> None:
    task = make_task("gptq", [TEXT[:600]], llama.tokenizer, 300, window=100)
    formats = {"16": SIXTEEN_BITS, "k8v2": KVOptions(nbits_key="8", nbits_value="2"), "fp8": KVOptions(nbits="fp8")}
    found = score_formats(llama.model, task, formats)
    elements = 3 * 2 * 2 * 16  # layers, streams, heads, head_dim
    keys, values = 8 + 2 * 16 / 64, 2 + 2 * 16 / 16  # codes, scale and zero: of 64 tokens, of the 16 elements of a head
    assert [row.bits_per_element for row in found] == [16, (keys + values) / 2, 9]
    assert [row.bytes_per_token for row in found] == [row.bits_per_element * elements / 8 for row in found]
    assert [row.tail_bytes for row in found] == [0, 64 * elements * 2, 0]


def test_a_baseline_is_as_good_as_running_16_bits(llama: Pair, tmp_path: Path) -> None:
    task = make_task("hf-stride", [TEXT[:1500]], llama.tokenizer, 300, window=100, stride=60)
    formats, file = {"4": KVOptions(nbits="4", q_group_size=32), "16": SIXTEEN_BITS}, tmp_path / "base.safetensors"
    saved = score_formats(llama.model, task, formats, save_baseline=file)
    read = score_formats(llama.model, task, formats, baseline=file)
    assert [replace(row, seconds=0) for row in saved] == [replace(row, seconds=0) for row in read]
    assert list(tmp_path.iterdir()) == [file]
    hidden = load_file(file)["hidden_states"]
    assert hidden.shape == (task.num_tokens, 64) and hidden.dtype == torch.float32


def test_a_baseline_of_something_else_is_refused(llama: Pair, tiny: Pair, tmp_path: Path) -> None:
    file, kv = tmp_path / "base.safetensors", {"16": SIXTEEN_BITS}
    task = make_task("gptq", [TEXT[:800]], llama.tokenizer, 300, window=100)
    score_formats(llama.model, task, kv, save_baseline=file)
    other = make_task("gptq", [TEXT[1:800]], llama.tokenizer, 300, window=100)
    half = ScoringModel(replace(llama.model.config, dtype="bfloat16"))
    for model, asked, differs in (
        (llama.model, other, "text, protocol or window"),
        (half, task, "model or dtype"),
        (tiny.model, task, "model or dtype"),
    ):
        with pytest.raises(ConfigError, match=f"another {differs}"):
            score_formats(model, asked, kv, baseline=file)


@pytest.mark.parametrize(
    "damaged",
    [
        lambda x: x[:-1],
        lambda x: x.flatten(),
        lambda x: x[:, :-1],
        lambda x: x.int(),
    ],
)
def test_a_damaged_baseline_is_refused(llama: Pair, tmp_path: Path, damaged: Callable[[Tensor], Tensor]) -> None:
    file, kv = tmp_path / "base.safetensors", {"16": SIXTEEN_BITS}
    task = make_task("gptq", [TEXT[:800]], llama.tokenizer, 300, window=100)
    score_formats(llama.model, task, kv, save_baseline=file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    hidden = load_file(file)["hidden_states"]
    save_file({"hidden_states": damaged(hidden).contiguous()}, file, metadata)
    with pytest.raises(ConfigError, match=r"--baseline .*: is damaged"):
        score_formats(llama.model, task, kv, baseline=file)


def test_an_interrupt_leaves_what_is_done_and_no_baseline(llama: Pair, tmp_path: Path) -> None:
    formats = {"2": KVOptions(nbits="2", q_group_size=32), "16": SIXTEEN_BITS}
    task = make_task("gptq", [TEXT[:1500]], llama.tokenizer, 300, window=100)
    first = replace(task, windows=task.windows[:1], weights=[1])

    def interrupt(done: float, total: float) -> None:
        if done == 99:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        score_formats(llama.model, task, formats, save_baseline=tmp_path / "b", on_progress=interrupt)
    expected = score_formats(llama.model, first, formats)
    assert [replace(row, seconds=0) for row in caught.value.scores] == [replace(row, seconds=0) for row in expected]
    del caught
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_max_tokens_is_where_the_text_ends(tiny: Pair) -> None:
    task = make_task("lm-eval", [TEXT[:900], TEXT], tiny.tokenizer, 2048, max_tokens=500)
    assert task.num_tokens == 500
    read = tiny.tokenizer.decode([token for window in task.windows for token in window.targets])
    second = read.removeprefix(TEXT[:900])
    assert TEXT.startswith(second) and second
    assert task.num_bytes == len(read.encode())


def test_files_of_every_kind(tmp_path: Path) -> None:
    texts = ["One.\r\ntwo\u2028three", "", "vier é"]
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", "utf-8")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.raw").write_bytes(b"\xef\xbb\xbfOne.\r\ntwo")
    assert read_documents(tmp_path / "a.jsonl") == read_documents(tmp_path / "a.parquet", "text") == texts
    assert read_documents(tmp_path / "a.raw") == ["One.\ntwo"]


def test_json_rows_come_in_the_order_asked(command: Command, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("".join(f"{layer}: {{nbits_key: 8, nbits_value: {2 + 2 * (layer % 2)}}}\n" for layer in range(4)))
    page = tmp_path / "result.html"
    asked = ["2", "k4v2", f"plan:{plan}", "16"]
    status, out, err = command(
        *("perplexity", "--max-tokens", "400", "--window", "128", "--formats", ",".join(asked)),
        *("--json", "--output", str(page)),
    )
    assert (status, err) == (0, "")
    document = json.loads(out)
    assert document["schema"] == "kvtool.perplexity/1"
    assert document["config"]["window"] == 128
    rows = document["rows"]
    assert [row["format"]["name"] for row in rows] == asked
    assert rows[2]["format"]["nbits_value"] == ["2", "4", "2", "4"]
    first = ["format", "perplexity", "tokens", "kld_mean", "top1_agreement", "bits_per_element", "bytes_per_token"]
    assert list(rows[0])[:8] == [*first, "tail_bytes"]
    assert [row["tokens"] for row in rows] == [3 * 127] * 4
    assert rows[0]["kld_mean"] > rows[2]["kld_mean"] > rows[3]["kld_mean"] == 0
    assert page.read_text().count("<svg") == 2


def test_bits_given_as_for_serving_are_set_beside_16(command: Command) -> None:
    arguments = ["--nbits-key", "8", "--nbits-value", "2", "--max-tokens", "200", "--window", "100", "--csv"]
    status, out, _ = command("perplexity", *arguments)
    assert status == 0
    assert [line.split(",")[0] for line in out.splitlines()] == ["format.name", "16", "k8v2"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--protocol", "bla"], "--protocol bla: must be one of llamacpp, hf-stride, gptq, lm-eval"),
        (["--formats", "16,3"], "--formats '3'"),
        (["--formats", "4", "--nbits", "2"], "leave out --nbits"),
        (["--formats", "plan:FOLDER/deep.yaml"], "one entry for each layer, 0 to 3"),
        (["--formats", "plan:FOLDER/bits.yaml"], "layer 0: nbits_key is '3'"),
        (["--formats", "plan:FOLDER/none.yaml"], "none.yaml"),
        (["--data", "FOLDER/none.txt"], "none.txt: No such file"),
        (["--data", "FOLDER"], "Is a directory"),
        (["--data", "FOLDER/short.txt"], "tokens are too short for one window of 2048"),
        (["--data", "FOLDER/empty.txt"], "0 tokens are too short"),
        (["--data", "FOLDER/empty.txt", "--protocol", "lm-eval"], "0 tokens are too short"),
        (["--data", "FOLDER/empty.txt", "--protocol", "hf-stride"], "0 tokens are too short"),
        (["--data", "FOLDER/short.txt", "--field", "x"], "--field x"),
        (["--data", "FOLDER/latin.txt"], "no UTF-8"),
        (["--data", "FOLDER/bad.jsonl"], "bad.jsonl: line 2 is no JSON"),
        (["--data", "FOLDER/good.jsonl", "--field", "body"], "line 1 has no field 'body', but 'text'"),
        (["--data", "FOLDER/number.jsonl"], "line 1: 'text' is no text"),
        (["--data", "FOLDER/half.jsonl"], "line 1: 'text' is no text"),
        (["--data", "FOLDER/deep.jsonl"], "line 1 is no JSON"),
        (["--data", "FOLDER/short.parquet"], "no parquet file"),
        (["--window", "4096"], "--window 4096: the model's context is 2048"),
        (["--window", "3"], "--window"),
        (["--stride", "64"], "--stride is for hf-stride"),
        (["--protocol", "hf-stride", "--window", "64", "--stride", "65"], "--stride 65"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--baseline", "FOLDER/short.txt"], "--baseline"),
        (["--baseline", "a", "--save-baseline", "b"], "--save-baseline"),
        (["--save-baseline", "FOLDER/none/base.safetensors"], "--save-baseline"),
        (["--output", "FOLDER/result.xlsx"], "--output"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(
    command: Command,
    tmp_path: Path,
    arguments: list[str],
    said: str,
) -> None:
    layer = "{nbits_key: 4, nbits_value: 4}"
    files = {
        "deep.yaml": "".join(f"{i}: {layer}\n" for i in range(5)),
        "bits.yaml": "0: {nbits_key: 3, nbits_value: 4}\n" + "".join(f"{i}: {layer}\n" for i in (1, 2, 3)),
        "short.txt": TEXT[:1000],
        "empty.txt": "",
        "latin.txt": "caf\xe9",
        "bad.jsonl": '{"text": "a"}\n{"text": \n',
        "good.jsonl": '{"text": "a"}\n',
        "half.jsonl": '{"text": "\\ud800"}',
        "deep.jsonl": "[" * 100_000,
        "number.jsonl": '{"text": 1}\n',
        "short.parquet": "PAR1",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content, "latin-1" if name == "latin.txt" else "utf-8")
    error = error_line(command("perplexity", *(word.replace("FOLDER", str(tmp_path)) for word in arguments)))
    assert said in error and "bug" not in error


def test_windows_follow_the_model(llama: Pair, tiny: Pair) -> None:
    for protocol, of_tiny in (("llamacpp", 512), ("gptq", 2048), ("hf-stride", 2048), ("lm-eval", 2048)):
        assert make_task(protocol, [TEXT], tiny.tokenizer, 2048).window == of_tiny
        assert make_task(protocol, [TEXT], llama.tokenizer, 300).window == 300
    with pytest.raises(ConfigError, match="--window 301: the model's context is 300"):
        score(llama, "gptq", [TEXT], window=301)


def test_format_words() -> None:
    base = KVOptions(axis_key="token", q_group_size=32, rotate=True)
    formats = parse_formats("16, 4,fp8,K8V2,kfp8v4,plan:a/plan.yaml", base)
    four = KVOptions(nbits_key="4", nbits_value="4", axis_key="token", q_group_size=32, rotate=True)
    assert list(formats) == ["16", "4", "fp8", "K8V2", "kfp8v4", "plan:a/plan.yaml"]
    assert list(formats.values()) == [
        SIXTEEN_BITS,
        four,
        KVOptions(nbits_key="fp8", nbits_value="fp8"),
        KVOptions(nbits_key="8", nbits_value="2", axis_key="token", q_group_size=32, rotate=True),
        KVOptions(nbits_key="fp8", nbits_value="4", q_group_size=32, rotate=True),
        KVOptions(plan="a/plan.yaml", axis_key="token", q_group_size=32, rotate=True),
    ]


@pytest.mark.parametrize("text", ["3", "", "4,,2", "k4", "k4v3", "v4k4", "4 bits", "k4v4v4"])
def test_words_that_name_no_bits(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--formats .*k8v4"):
        parse_formats(text, KVOptions())


def test_bits_are_named_once() -> None:
    with pytest.raises(ConfigError, match="twice"):
        parse_formats("4,2,4", KVOptions())
    for base in (KVOptions(nbits="4"), KVOptions(plan="plan.yaml")):
        with pytest.raises(ConfigError, match="--nbits"):
            parse_formats("4,2", base)
