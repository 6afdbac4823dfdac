"""The embedded models: small enough, readable by transformers unchanged, and able to retrieve."""

import json
from pathlib import Path

import pytest
import torch
from conftest import script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kvtool.config import EngineConfig, SpeculationConfig
from kvtool.engine import Engine
from kvtool.request import SamplingParams

ROOT = Path(__file__).resolve().parents[1]
TINY, DRAFT = (ROOT / "kvtool" / "assets" / name for name in ("tiny", "tiny-draft"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


def test_folder_stays_under_twelve_megabytes():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 12_000_000


def test_transformers_computes_what_was_trained(model):
    training = script("train_tiny")
    decoder = training.Decoder(training.Shape()).eval()
    weights = load_file(TINY / "model.safetensors")
    decoder.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in weights.items()})
    ids = torch.randint(0, training.Shape.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, decoder(ids), atol=1e-3, rtol=0)


def test_digits_are_single_tokens_and_text_comes_back(tokenizer):
    text = "The code of Harbour is 4821.\n\n\tNaïve — 7 × 8 😀"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer("4821").input_ids] == ["4", "8", "2", "1"]


@pytest.mark.parametrize(
    "facts",
    [
        "The code of Harbour is 4821.\n",
        "Remember this: the code of the red door is 9034. The code of Harbour is 4821. ",
    ],
)
def test_chat_answer_ends_its_turn(model, tokenizer, facts):
    turns = [{"role": "user", "content": f"{facts}What is the code of Harbour?"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
    assert answer == "The code of Harbour is 4821.<|im_end|>"


@pytest.mark.parametrize("length", [500, 1000, 1800])
def test_retrieval(model, tokenizer, length):
    rows = [json.loads(line) for line in (TINY / "retrieval.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["length"] == length]
    assert len(rows) == 24
    right = 0
    for row in rows[:4]:
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        answer = tokenizer(row["answer"]).input_ids
        assert length - 150 <= prompt.input_ids.shape[1] <= length + 50
        output = model.generate(**prompt, max_new_tokens=len(answer), do_sample=False)
        right += output[0, prompt.input_ids.shape[1] :].tolist() == answer
    assert right >= 3


# The draft


def test_the_draft_is_small_has_the_same_tokens_and_is_mostly_right():
    assert sum(file.stat().st_size for file in DRAFT.iterdir()) <= 4_000_000
    assert (DRAFT / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    engine = Engine(EngineConfig(speculation=SpeculationConfig("draft"), kv_cache_memory=32 << 20))
    engine.scheduler.drafting.pace.observe = lambda *step: None  # whatever it costs here
    text = (TINY / "sample.txt").read_text()
    prompts = [text[start : start + 800] for start in range(0, 64_000, 16_000)]
    engine.generate(prompts, SamplingParams(temperature=0, max_tokens=96))
    stats = engine.stats()
    assert stats.accepted_total > 0.56 * stats.drafted_total > 100


def test_transformers_computes_the_draft_as_it_was_trained():
    training = script("train_tiny")
    decoder = training.Decoder(training.DRAFT).eval()
    weights = load_file(DRAFT / "model.safetensors")
    decoder.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in weights.items()})
    ids = torch.randint(0, training.Shape.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    oracle = AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(oracle(ids).logits, decoder(ids), atol=1e-3, rtol=0)


def test_with_a_cache_of_keys_and_values_the_training_script_says_the_same():
    """What the target writes for its draft is what it would have written without one."""
    training = script("train_tiny")
    torch.manual_seed(0)
    decoder = training.Decoder(training.DRAFT).eval()
    prompts = torch.randint(0, training.Shape.vocab_size, (3, 20))
    ids = training.continuations(decoder, prompts, 12, 0.0, "cpu")
    with torch.no_grad():
        assert torch.equal(decoder(ids[:, :-1])[:, 19:].argmax(-1), ids[:, 20:])
