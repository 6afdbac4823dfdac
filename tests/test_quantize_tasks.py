"""Questions with known answers: reading them, judging answers, and an engine that answers."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import ConfigError
from kvtool.quantize.tasks import Question, answer_all, final_number, load_task
from kvtool.request import SamplingParams


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", 18),
        ("#### 1,234", 1234),
        ("It is 42. #### -7\n", -7),
        ("The answer is $1,000.50.", Decimal("1000.5")),
        ("2.0", 2),
        ("no digits", None),
        ("#### none, though 5 comes before", 5),
        ("####", None),
        ("", None),
    ],
)
def test_the_final_number(text, number):
    assert final_number(text) == number


@given(st.integers(-(10**12), 10**12), st.text(alphabet=st.characters(exclude_categories=["Nd"]), max_size=40))
def test_a_number_is_found_however_it_is_written(number, before):
    for written in (f"{number}", f"{number:,}", f"{number}.0"):
        assert final_number(f"{before.replace('#', '')} #### {written}") == number


def test_answers_are_judged():
    asked = Question("", "6 times 7?", "6 * 7 = 42\n#### 42", is_prompt=False)
    assert asked.is_right("That makes 42.") and asked.is_right("#### 42.0")
    assert not asked.is_right("42 or 43") and not asked.is_right("I do not know")
    continued = Question("", "The code is", " 0042", is_prompt=True)
    assert continued.is_right(" 0042.") and not continued.is_right(" 42") and not continued.is_right("")


def test_gsm8k_is_read_as_it_is(tmp_path):
    rows = [{"question": "How many?\u2028", "answer": f"So 3 + {i}\n#### {3 + i}"} for i in range(3)]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    questions = load_task(str(path))
    assert [final_number(question.answer) for question in questions] == [3, 4, 5]
    assert not any(question.is_prompt for question in questions)


def test_retrieval_travels_with_kvtool_and_begins_with_every_length():
    questions = load_task("retrieval")
    assert len(questions) == 72 and all(question.is_prompt for question in questions)
    sizes = [len(question.text) for question in questions[:3]]
    assert sizes == sorted(sizes) and sizes[2] > 3 * sizes[0]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "no question"),
        ("not json", "line 1: is no JSON"),
        ("[1]", 'line 1: needs a text under "answer"'),
        ('{"question": "How many?"}', '"answer"'),
        ('{"answer": "#### 3"}', '"question" or "prompt"'),
        ('{"question": "Who?", "answer": "Janet"}', "holds no number"),
        ('{"prompt": "Who?", "answer": " "}', "is empty"),
        ('{"question": "1?", "answer": "1"}\n{"question": 1, "answer": "1"}', "line 2"),
        ("[" * 100_000, "is no JSON"),
        ('{"question": "\\ud800?", "answer": "1"}', "lone surrogate"),
        ('{"prompt": "Who?", "answer": "\\ud800"}', "lone surrogate"),
        (b"\xff\xfe{", "UTF-8"),
    ],
)
def test_a_bad_file_is_refused_in_its_own_terms(tmp_path, content, complaint):
    path = tmp_path / "task.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=complaint) as refusal:
        load_task(str(path))
    assert "task.jsonl" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_missing_file_is_refused():
    with pytest.raises(ConfigError, match="No such file"):
        load_task("nowhere.jsonl")
    with pytest.raises(ConfigError, match="directory"):
        load_task(str(Path(__file__).parent))


def test_answers_are_the_engines():
    """In the order of the questions, each the text that the engine generates, right and wrong told apart."""
    config = EngineConfig(kv=KVOptions(nbits="4"), max_num_seqs=4)
    rows = load_task("retrieval")[:3:2]
    wrong = Question("", rows[0].text, " 0000", is_prompt=True)
    chat = Question("", "Who are you?", "7", is_prompt=False)
    seen = []
    answers = answer_all(config, [*rows, wrong, chat], 12, lambda done, total: seen.append((done, total)))
    assert [answer.is_right for answer in answers] == [True, True, False, False]
    assert answers[0].text == rows[0].answer
    assert seen[-1] == (4, 4)
    prompt = "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    (expected,) = Engine(config).generate([prompt], SamplingParams(temperature=0, max_tokens=12))
    assert answers[3].text == expected.text


def test_a_question_beyond_the_context_is_named():
    config = EngineConfig(max_model_len=100)
    with pytest.raises(ConfigError, match=r"line 7: \d+ tokens do not fit in 100"):
        answer_all(config, [Question("--task x, line 7", "word " * 200, " 1", is_prompt=True)], 10)
