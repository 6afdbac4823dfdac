"""Teacher-forced scores: those of transformers at 16 bits, and what decoding sees in every format."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_checkpoint

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import UnsupportedError
from kvtool.request import Request, SamplingParams
from kvtool.scoring import SIXTEEN_BITS, ScoringModel, Window

KV = {
    "16": SIXTEEN_BITS,
    "4": KVOptions(nbits="4", q_group_size=32),
    "2, window": KVOptions(nbits="2", q_group_size=32, residual_length=32),
    "8, rotated, on write": KVOptions(nbits="8", axis_key="token", rotate=True),
    "fp8": KVOptions(nbits="fp8"),
}


def windows(*lengths: int, first: int = 1) -> list[Window]:
    rng = random.Random(3)
    return [Window([rng.randrange(8, 199) for _ in range(length)], min(first, length - 1)) for length in lengths]


def scores(model: ScoringModel, asked: list[Window], kv: KVOptions) -> list[list[float]]:
    """Log-probabilities of the scored tokens of each window."""
    found = [x for rows, ids in model.log_probs(asked, kv) for x in rows.gather(1, ids[:, None])[:, 0].tolist()]
    ends = [sum(len(window.targets) for window in asked[: i + 1]) for i in range(len(asked))]
    assert len(found) == ends[-1]
    return [found[end - len(window.targets) : end] for window, end in zip(asked, ends, strict=True)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("qwen2")
    return path, make_checkpoint("qwen2", path)


def test_16_bits_are_transformers(checkpoint: tuple[Path, Any]) -> None:
    path, oracle = checkpoint
    asked = windows(2, 300, 90, 512, 2, 17, first=9)
    tested = ScoringModel(EngineConfig(model=str(path), dtype="float32", max_num_batched_tokens=400))
    found = [rows for rows, _ in tested.log_probs(asked, SIXTEEN_BITS)]
    assert max(map(len, found)) <= 128, "a few rows at a time"
    with torch.no_grad():
        logits = [oracle(torch.tensor([window.token_ids[:-1]])).logits[0, window.first - 1 :] for window in asked]
    torch.testing.assert_close(torch.cat(found), torch.cat(logits).log_softmax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kv", KV.values(), ids=KV.keys())
def test_scores_do_not_depend_on_what_runs_together(checkpoint: tuple[Path, Any], kv: KVOptions) -> None:
    asked = windows(40, 2, 200, 129, 3, 64)

    def model(max_num_batched_tokens: int) -> ScoringModel:
        path, _ = checkpoint
        return ScoringModel(EngineConfig(str(path), "float64", max_num_batched_tokens=max_num_batched_tokens))

    together = scores(model(2048), asked, kv)
    for tested in (model(43), model(200)):
        for mine, theirs in zip(scores(tested, asked, kv), together, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("kv", KV.values(), ids=KV.keys())
def test_scoring_sees_what_decoding_sees(checkpoint: tuple[Path, Any], kv: KVOptions) -> None:
    """An answer that the engine gives token by token is scored as the engine scored it."""
    path, _ = checkpoint
    config = EngineConfig(str(path), "float64", kv_cache_memory=64 << 20, kv=kv)
    engine, prompt = Engine(config), list(range(20, 50))
    engine.submit(Request("r", prompt, SamplingParams(max_tokens=120, logprobs=0, ignore_eos=True)))
    answer, decoded = [], []
    while engine.has_work:
        for tokens in engine.step():
            answer += tokens.token_ids
            decoded += [row.logprob for row in tokens.logprobs or []]
    assert len(decoded) == 120
    (scored,) = scores(ScoringModel(config), [Window(prompt + answer, len(prompt))], kv)
    assert scored == pytest.approx(decoded, abs=1e-9)


def test_what_a_format_cannot_hold_is_an_error(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    model = ScoringModel(EngineConfig(str(tmp_path), "float32"))
    with torch.inference_mode():
        for layer in model.model.layers.values():
            layer.self_attn.qkv_proj.weight.mul_(1e6)  # keys beyond fp16
    with pytest.raises(UnsupportedError):
        list(model.log_probs(windows(100), KVOptions(nbits="4")))
