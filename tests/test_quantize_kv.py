"""`kvtool quantize-kv`: memory as the layout has it, quality as the scorer; ablations, resuming, dumping, refusing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error_line
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kvtool.config import EngineConfig, KVOptions
from kvtool.errors import ConfigError, KVToolError
from kvtool.kv.codecs import CODECS
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.perplexity import score_formats
from kvtool.protocols import SAMPLE, make_task
from kvtool.quantize.ablate import ABLATIONS, ablate, variants
from kvtool.quantize.cache_file import read_cache
from kvtool.quantize.decode_speed import step_bytes
from kvtool.quantize.journal import Journal
from kvtool.quantize.memory import Memory, layer_memory, nominal_saved
from kvtool.quantize.report import Exam, examine
from kvtool.scoring import SIXTEEN_BITS, ScoringModel
from kvtool.tokenizer import Tokenizer

SMALL = Exam(window=128, max_tokens=256, context=1024, num_seqs=3)
SMALL_OPTIONS = ("--window", "128", "--max-tokens", "256", "--no-preflight")


def quiet(stage: str) -> Any:
    """Progress for nobody."""
    from contextlib import nullcontext

    return nullcontext(lambda done, total: None)


OPTIONS = st.builds(
    KVOptions,
    nbits_key=st.sampled_from(["16", "8", "4", "2", "fp8"]),
    nbits_value=st.sampled_from(["8", "4", "2"]),
    axis_value=st.sampled_from(["token", "channel", None]),
    symmetric=st.booleans(),
    q_group_size=st.sampled_from([32, 64, 128, None]),
    residual_length=st.sampled_from([0, 1, 100, None]),
)


@settings(deadline=None)
@given(OPTIONS, st.integers(1, 5000), st.integers(1, 9), st.sampled_from([(2, 64, 3, 80), (1, 128, 1, 128)]))
def test_memory_adds_up_to_what_a_cache_allocates(kv, context, num_seqs, shape):
    key, value = StreamSpec(*shape[:2]), StreamSpec(*shape[2:])
    spec = KVSpec(3, key, value, 2)
    layout = KVLayout(spec, resolve(kv, spec))
    parts = [memory for layer in range(3) for memory in layer_memory(layout, layer, num_seqs, context)]
    total = Memory.sum(parts)
    assert total.total == layout.bytes_for([context] * num_seqs)
    assert total.exact == 2 * spec.elements * context * num_seqs
    assert total.saved == pytest.approx(1 - total.total / total.exact)


@pytest.mark.parametrize(
    ("kv", "share"),
    [
        (KVOptions(nbits="8"), 0.5),
        (KVOptions(nbits="4"), 0.75),
        (KVOptions(nbits="2"), 0.875),
        (KVOptions(nbits_key="8", nbits_value="4"), 0.625),
        (KVOptions(nbits="fp8"), 0.5),
        (KVOptions(), 0),
    ],
)
def test_nominal_savings(kv, share):
    spec = KVSpec(2, StreamSpec(2, 64), StreamSpec(2, 64), 4)
    assert nominal_saved(KVLayout(spec, resolve(kv, spec))) == share


def test_a_format_costs_what_the_scorer_and_the_layout_say():
    config = EngineConfig(kv=KVOptions(nbits="2"))
    exact, packed = examine(config, SMALL, quiet)
    model = ScoringModel(config)
    tokenizer = Tokenizer.load(model.path, model.model_config.vocab_size)
    task = make_task("gptq", [SAMPLE.read_text("utf-8")], tokenizer, 2048, window=128)
    task = replace(task, windows=task.windows[:2], weights=task.weights[:2])
    scores = score_formats(model, task, {"16 bits": SIXTEEN_BITS, "2 bits": config.kv})
    for cost, score in zip((exact, packed), scores, strict=True):
        for name in ("perplexity", "tokens", "kld_mean", "top1_agreement", "bits_per_element", "tail_bytes"):
            assert getattr(cost.score, name) == pytest.approx(getattr(score, name), rel=1e-5, abs=1e-9), name
    assert exact.memory.saved == 0 and exact.row()["output_error"] == {"mean": 0, "max": 0}
    assert [layer.layer for layer in packed.layers] == [0, 1, 2, 3]
    assert all(0.05 < layer.key.error < layer.value.error < 0.6 for layer in packed.layers)
    assert all(0 < layer.output_error <= 1.1 * layer.propagated_error for layer in packed.layers)
    assert packed.task is None and packed.decode is None, "nobody asked, and there is no GPU"


@settings(deadline=None)
@given(OPTIONS, st.integers(1, 2000))
def test_a_step_reads_every_position_once(kv, context):
    """Packed below v(t), in 16 bits from there on; a position's share of its block counts."""
    spec = KVSpec(3, StreamSpec(2, 64), StreamSpec(3, 80), 2)
    layout = KVLayout(spec, resolve(kv, spec))
    packed = [position < layout.format.visible(context - 1) for position in range(context)]
    share = layout.block_bytes / layout.format.block_size
    expected = sum(share if far else 2 * spec.elements for far in packed)
    assert step_bytes(layout, context) == pytest.approx(expected, abs=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_decode_time_on_a_gpu():
    """Fewer bits take fewer bytes; nobody reads faster than memory and what its last-level cache may hold."""
    exam = replace(SMALL, num_seqs=16, context=8192)
    exact, packed = examine(EngineConfig(kv=KVOptions(nbits="4")), exam, quiet)
    assert exact.decode is not None and packed.decode is not None
    assert packed.decode.nbytes < 0.35 * exact.decode.nbytes
    for speed in (exact.decode, packed.decode):
        assert 0 < speed.nbytes / speed.seconds < 1.5 * speed.bandwidth
    fast = exact.row()["decode"]
    assert fast["bytes_per_second"] == fast["nbytes"] / fast["seconds"]


def test_one_format_as_json(command, tmp_path):
    dump = tmp_path / "cache.safetensors"
    code, out, err = command(
        *("quantize-kv", *SMALL_OPTIONS, "--nbits", "4", "--questions", "1", "--show-answers", "1", "--json"),
        *("--dump", str(dump)),
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["schema"] == "kvtool.quantize-kv/1"
    exact, packed = document["rows"]
    assert (exact["format"]["name"], packed["format"]["name"]) == ("16 bits", "4 bits")
    assert exact["task"]["accuracy"] == packed["task"]["accuracy"] == 1
    assert packed["answers"][0]["text"] == exact["answers"][0]["expected"]
    assert packed["kld_mean"] > 0 and 0.9 < packed["top1_agreement"] < 1
    assert packed["memory"]["saved"] < packed["nominal_saved"] == 0.75
    assert packed["context"] == 2048 and document["config"]["engine"]["kv"]["nbits"] == "4"
    check_dump(dump)


def check_dump(path: Path) -> None:
    """The file holds, in plain safetensors, what packing the keys of the default prompt gives."""
    tensors, cached = load_file(path), read_cache(path)
    codes = tensors["layers.0.key.codes"]
    tokens, blocks = len(cached.token_ids), codes.shape[0]
    assert blocks == cached.first_near // 64 == tokens // 64 and codes.shape[1:] == (2, 64, 32)
    assert tensors["layers.3.value.tail"].shape == (2, tokens % 64, 64)
    layer = cached.store.layers[0].key
    arrays = {name: tensors[f"layers.0.key.{name}"] for name in ("codes", "scale", "zero")}
    decoded = CODECS["4"].decode(arrays, layer.format, torch.float32)
    assert torch.equal(decoded, layer.read_blocks(torch.arange(blocks)[:, None], torch.float32))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="no cache that kvtool wrote"):
        read_cache(path)
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="no cache that kvtool wrote"):
        read_cache(path)


def test_ablations_vary_one_choice_each():
    spec = KVSpec(2, StreamSpec(2, 64), StreamSpec(2, 64), 2)
    rows = {(row.ablation, row.name): row for row in variants("all", KVOptions(nbits="4"), spec)}
    assert {ablation for ablation, _ in rows} == set(ABLATIONS)
    base = resolve(KVOptions(nbits="4"), spec)
    for (ablation, name), row in rows.items():
        if row.format is None:
            assert (ablation, name, row.reason) == ("group", "128", "head_dim 64 holds no groups of 128")
        else:
            layer, expected = row.format.layers[0], base.layers[0]
            streams = ((layer.key, expected.key), (layer.value, expected.value))
            changed = {
                field
                for ours, theirs in streams
                for field in ("bits", "axis", "group", "symmetric", "rotate")
                if getattr(ours, field) != getattr(theirs, field)
            } | ({"residual"} if row.format.residual != base.residual else set())
            allowed = {
                "bits": {"bits", "group", "symmetric", "axis", "residual"},  # each with its own recipe
                "axis": {"axis"},
                "symmetry": {"symmetric"},
                "residual": {"residual", "group"},
                "group": {"group"},
                "rotation": {"rotate", "axis"},
            }
            assert changed <= allowed[ablation], (ablation, name)
    wide = KVSpec(2, StreamSpec(2, 128), StreamSpec(2, 128), 2)
    assert all(row.format for row in variants("group", KVOptions(nbits="4"), wide))


@pytest.mark.parametrize(
    ("asked", "kv", "complaint"),
    [
        ("colour", KVOptions(nbits="4"), "must be all, or of bits, axis"),
        ("bits,,axis", KVOptions(nbits="4"), "must be all"),
        ("axis", KVOptions(nbits="16"), "means nothing for a 16-bit cache"),
        ("bits", KVOptions(nbits="4", q_group_size=48), "--q-group-size 48"),
    ],
)
def test_ablations_that_make_no_sense_are_refused(asked, kv, complaint):
    spec = KVSpec(2, StreamSpec(2, 64), StreamSpec(2, 64), 2)
    with pytest.raises(ConfigError, match=complaint):
        variants(asked, kv, spec)


def test_a_stopped_run_goes_on_where_it_was(tmp_path, monkeypatch):
    """Interrupted after two formats, it measures the others only, and ends with what one run gives."""
    from kvtool.quantize.report import Examiner

    config, journal = EngineConfig(kv=KVOptions(nbits="4")), tmp_path / "rows.jsonl"
    measured: list[KVOptions] = []
    measure, most = Examiner.measure, 2

    def counted(self, kv, on_progress):
        if len(measured) == most:
            raise KeyboardInterrupt
        measured.append(kv)
        return measure(self, kv, on_progress)

    monkeypatch.setattr(Examiner, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        ablate(config, "symmetry,group", SMALL, journal, quiet)
    assert len(journal.read_text().splitlines()) == 3
    with journal.open("a") as file:
        file.write('{"key": "half a li')  # what a run that is killed may leave
    most = 100
    rows = ablate(config, "symmetry,group", SMALL, journal, quiet)
    assert len(measured) == 3, "asymmetric in groups of 64, symmetric, groups of 32; 64 again, and 128 not at all"
    by_name = {row["variant"]: row for row in rows}
    assert by_name["128"]["reason"] and "perplexity" not in by_name["128"]
    assert by_name["64"]["perplexity"] == by_name["asymmetric"]["perplexity"]
    assert by_name["32"]["bits_per_element"] == 5
    with pytest.raises(ConfigError, match="another --batch, --context; ask for that"):
        ablate(config, "group", replace(SMALL, num_seqs=1, context=10), journal, quiet)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}\n",
        "[]\n",
        '{"identity": 3}\n',
        "\x00\n",
        '{"identity": {}}\n{"row": 1}\n',
        '{"identity": {}}\n{"key": "a", "row": 1}\n',
    ],
)
def test_a_journal_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(KVToolError, match="no list of results of ours"):
        Journal(path, {"model": "tiny"}, dict)
    assert path.read_text() == content


def test_an_ablation_as_a_report(command, tmp_path):
    """Charts and tables in one file that needs no other, and no journal left behind."""
    output = tmp_path / "report.html"
    code, out, err = command("quantize-kv", *SMALL_OPTIONS, "--ablate", "symmetry", "--output", str(output))
    assert code == 0, err
    assert "symmetry; saved: of 1 × 2,048 tokens" in out and "asymmetric" in out
    page = output.read_text()
    assert page.count("<svg") == 3 and "src=" not in page and "Sensitivity of layers" in page
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--nbits", "3"], "--nbits"),
        (["--ablate", "colour"], "--ablate 'colour'"),
        (["--tp", "2", "--dump", "x.safetensors"], "--dump: is written by one rank; leave out --tp 2 --pp 1"),
        (["--ablate", "bits", "--dump", "x"], "--dump is for one format"),
        (["--ablate", "bits", "--task", "retrieval"], "--task is for one format"),
        (["--ablate", "bits", "--prompt", "Hi"], "--prompt is for one format"),
        (["--ablate", "bits", "--questions", "3"], "--questions is for one format"),
        (["--task", "nowhere.jsonl"], "--task nowhere.jsonl: No such file"),
        (["--data", "nowhere.txt"], "--data nowhere.txt: No such file"),
        (["--window", "5000"], "--window 5000: the model's context is 2048"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--prompt", "hi"], "--prompt is what --dump caches"),
        (["--dump", "/nowhere/x.safetensors"], "--dump /nowhere/x.safetensors: cannot be written"),
        (["--dump", "x.safetensors", "--prompt", ""], "--prompt: 0 tokens"),
        (["--dump", "x.safetensors", "--prompt", "word " * 3000], "at most 2048"),
        (["--dump", "x.safetensors", "--prompt", "\udcff"], "--prompt: is no UTF-8 text"),
        (["--kv-plan", "nowhere.yaml"], "plan nowhere.yaml"),
        (["--output", "x.pdf"], "--output x.pdf: the format follows the suffix"),
        (["--batch", "0"], "--batch"),
    ],
)
def test_bad_input_is_one_line(command, options, complaint):
    assert complaint in error_line(command("quantize-kv", "--no-preflight", *options))


def test_another_model_is_asked_nothing_unless_told(command, tmp_path):
    code, _, err = command("quantize-kv", "--no-preflight", "--model", str(tmp_path), "--show-answers", "2")
    assert code == 2 and "give a --task" in err
