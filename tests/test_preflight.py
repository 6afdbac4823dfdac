"""Outlier twins, and the check that keeps a format from a model on which it would collapse."""

import signal
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from shutil import copytree

import pytest
import torch
from checkpoints import MLA, make_checkpoint
from conftest import serving
from transformers import AutoModelForCausalLM
from twins import outlier_twin

from kvtool.config import EngineConfig, KVOptions
from kvtool.errors import ModelError
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.models.resolve import EMBEDDED, fingerprint
from kvtool.quantize.cache_file import cache_prompt, read_cache, write_cache
from kvtool.quantize.preflight import Verdict, as_ranges, calibration_windows, examine, preflight
from kvtool.scoring import ScoringModel, Window
from kvtool.tokenizer import Tokenizer

TINY = EMBEDDED["tiny"]
PER_TOKEN = KVOptions(nbits="4", axis_key="token")


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys with outliers."""
    return outlier_twin(TINY, tmp_path_factory.mktemp("keys") / "twin")


@pytest.fixture(scope="module")
def value_twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys as they were, values with outliers."""
    return outlier_twin(TINY, tmp_path_factory.mktemp("values") / "twin", scale=1.0, value_scale=64.0)


@pytest.fixture(autouse=True)
def verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvtool" / "preflight"


@cache
def loaded(folder: Path) -> ScoringModel:
    return ScoringModel(EngineConfig(model=str(folder)))


@cache
def text(num_tokens: int) -> torch.Tensor:
    return calibration_windows(Tokenizer.load(TINY, 4096), num_tokens, torch.device("cpu"))


def verdict_on(folder: Path, kv: KVOptions) -> Verdict:
    model = loaded(folder)
    return examine(model.model, text(512), model.layout(KVOptions()).spec, kv)


@pytest.mark.parametrize(
    "outliers", [{}, {"scale": 48.0, "value_bias": 0.5}, {"value_scale": 64.0}], ids=["keys", "biases", "values"]
)
def test_a_twin_is_the_same_function(tmp_path, outliers):
    folder = outlier_twin(TINY, tmp_path / "twin", **outliers)
    ids = torch.randint(0, 4096, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, other = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float64)(ids).logits for f in (TINY, folder))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_latents_are_examined_as_heads_use_them(tmp_path):
    make_checkpoint("deepseek_v2", tmp_path, **MLA, q_lora_rank=None, rope_parameters=None)
    model = loaded(tmp_path)
    ids = torch.randint(0, 199, (1, 300), generator=torch.Generator().manual_seed(0))
    verdicts = [
        examine(model.model, ids, model.layout(KVOptions()).spec, KVOptions(nbits=nbits)) for nbits in ("8", "4", "2")
    ]
    eight, four, two = (verdict.worst for verdict in verdicts)
    assert 0 < 4 * eight < four < two / 2
    assert verdicts[1].asked.startswith("K 8 bits per channel") and "V 4 bits per token" in verdicts[1].asked

    cached = cache_prompt(model.model, model.layout(KVOptions(nbits="4")), ids[0].tolist(), torch.float32)
    write_cache(tmp_path / "cache.safetensors", cached)
    assert read_cache(tmp_path / "cache.safetensors").equals(cached)


def test_keys_per_token_collapse_on_a_twin_and_keys_per_channel_do_not(twin):
    ids = text(600)[0].tolist()

    def loss(folder: Path, kv: KVOptions) -> float:
        scored = loaded(folder).log_probs([Window(ids)], kv)
        return float(torch.cat([-rows.gather(1, targets[:, None]) for rows, targets in scored]).mean())

    exact = loss(TINY, KVOptions())
    assert loss(twin, KVOptions()) == pytest.approx(exact, abs=1e-4)
    assert loss(TINY, PER_TOKEN) < exact + 0.1
    assert loss(twin, PER_TOKEN) > exact + 1.0, "perplexity grows to three times and more"
    assert loss(twin, replace(PER_TOKEN, rotate=True)) > exact + 1.0
    assert loss(twin, KVOptions(nbits="4")) < exact + 0.01


@pytest.mark.parametrize("bits", ["8", "4", "2", "fp8"])
def test_recipes_hold_on_the_model_and_on_its_twin(twin, bits):
    for folder in (TINY, twin):
        verdict = verdict_on(folder, KVOptions(nbits=bits))
        assert verdict.collapses == () and verdict.kv == verdict.survivor == KVOptions(nbits=bits)


def test_what_was_asked_for_is_obeyed_with_a_warning(twin):
    assert verdict_on(TINY, PER_TOKEN).collapses == ()
    verdict = verdict_on(twin, PER_TOKEN)
    assert verdict.kv == PER_TOKEN
    assert [collapse.layer for collapse in verdict.collapses] == [0, 1, 2, 3]
    assert all(collapse.cause == "keys" and collapse.outlier > 30 for collapse in verdict.collapses)
    assert verdict.survivor == KVOptions(nbits="4", axis_key="channel")
    said = list(verdict.lines())
    assert all(line.startswith("warning: ") for line in said)
    assert "K and V 4 bits per token" in said[0] and "layers 0-3" in said[0] and "times the median" in said[0]
    assert "K 4 bits per channel" in said[1]


def test_bits_alone_are_raised_in_the_layers_that_need_it_and_no_further(value_twin):
    verdict = verdict_on(value_twin, KVOptions(nbits="4"))
    bits = verdict.kv.layer_bits
    assert verdict.kv == verdict.survivor and bits is not None
    assert {collapse.cause for collapse in verdict.collapses} == {"values"}
    assert verdict_on(value_twin, verdict.kv).collapses == ()
    spec = loaded(value_twin).layout(KVOptions()).spec
    cost = KVLayout(spec, resolve(verdict.kv, spec)).block_bytes
    for layer, pair in product(range(4), product(("4", "8"), repeat=2)):
        changed = KVOptions(nbits="4", layer_bits=(*bits[:layer], pair, *bits[layer + 1 :]))
        if KVLayout(spec, resolve(changed, spec)).block_bytes < cost:
            assert [collapse.layer for collapse in verdict_on(value_twin, changed).collapses] == [layer]


def test_keys_that_fp16_scales_cannot_hold_stay_at_16_bits(tmp_path):
    folder = outlier_twin(TINY, tmp_path / "twin", scale=2.0**20)
    verdict = verdict_on(folder, KVOptions(nbits="8"))
    assert verdict.kv.layer_bits == (("16", "8"),) * 4
    assert "beyond fp16 in layer 0, through its keys" in next(verdict.lines())


def test_other_options_beside_the_bits_are_obeyed(value_twin):
    asked = KVOptions(nbits="4", residual_length=64)
    verdict = verdict_on(value_twin, asked)
    assert verdict.kv == asked and verdict.survivor != asked


@pytest.mark.parametrize(
    "config", [EngineConfig(), EngineConfig(load_format="dummy", kv=PER_TOKEN), EngineConfig(kv=KVOptions(nbits="16"))]
)
def test_there_is_nothing_to_check_at_16_bits_and_of_dummy_weights(config, verdicts, capsys):
    assert preflight(config) is config
    assert capsys.readouterr().err == "" and not verdicts.exists()


def test_a_verdict_is_stored_and_read_again(verdicts, capsys):
    config = EngineConfig(kv=KVOptions(nbits="4"))
    assert preflight(config) == config
    (file,) = verdicts.iterdir()
    first = capsys.readouterr().err
    assert first.startswith("preflight: K 4 bits per channel, V 4 bits per token")

    whole = file.read_text()
    file.write_text(whole.replace('"worst":0.', '"worst":0.7'))
    preflight(config)
    assert "attention is off by 7" in capsys.readouterr().err, "it comes from the file"

    for damaged in (whole[: len(whole) // 2], '{"kv": 4}', '{"more": ' + "[" * 100_000):
        file.write_text(damaged)
        assert preflight(config) == config
        assert capsys.readouterr().err == first
        assert file.read_text() == whole and list(verdicts.iterdir()) == [file]


def test_a_short_context_is_no_reason_to_read_less(twin, capsys):
    """The text is longer than what this server may hold, and a verdict holds for servers of any length."""
    config = EngineConfig(model=str(twin), kv=PER_TOKEN, max_model_len=96, tp=2, nnodes=2)  # which it starts none of
    assert preflight(config) == config
    assert "collapse in layers" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    config = EngineConfig(kv=KVOptions(nbits="4"))
    assert preflight(config) == config
    assert "the next start checks again" in capsys.readouterr().err


def test_other_weights_have_another_fingerprint(tmp_path, twin):
    copy = copytree(TINY, tmp_path / "copy")
    assert fingerprint(copy) == fingerprint(TINY) != fingerprint(twin)
    with (copy / "config.json").open("a") as file:
        file.write(" ")
    assert fingerprint(copy) != fingerprint(TINY)


def test_a_folder_without_a_model_is_refused_in_its_own_terms(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json: no such file"):
        preflight(EngineConfig(model=str(tmp_path), kv=KVOptions(nbits="4")))


def test_numbers_in_a_row_are_a_range():
    assert as_ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"


def test_a_server_runs_what_survives(value_twin):
    options = ("--model", str(value_twin), "--nbits", "4", "--max-num-seqs", "2", "--kv-cache-memory", "16MiB")
    with serving(*options) as server:
        assert "V 8 bits per token" in server.card
        server.process.send_signal(signal.SIGTERM)
        _, stderr = server.end()
    assert "preflight: K 4 bits per channel, V 4 bits per token, asymmetric in groups of 64 would collapse" in stderr
    assert "through its values, whose largest channel is" in stderr
