"""The embedded model: small enough, readable by transformers unchanged, and able to retrieve."""

import json
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "kvtool" / "assets" / "tiny"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


def training_script() -> ModuleType:
    spec = util.spec_from_file_location("train_tiny", ROOT / "scripts" / "train_tiny.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folder_stays_under_twelve_megabytes():
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 12_000_000


def test_transformers_computes_what_was_trained(model):
    script = training_script()
    decoder = script.Decoder(script.Shape()).eval()
    weights = load_file(TINY / "model.safetensors")
    decoder.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in weights.items()})
    ids = torch.randint(0, script.Shape.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
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
