"""What is asked: lengths against their distributions, prefixes that are truly shared, files as others write them."""

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtool.bench.events import WorkItem
from kvtool.bench.workloads import FEW_SHOT, Hashed, Lengths, Vocabulary, Workload
from kvtool.errors import ConfigError

WORDS = Vocabulary(range(100, 5000), count=lambda text: len(text.split()))


def take(workload: Workload, count: int, repeat: int = 0) -> list[WorkItem]:
    return list(islice(workload.items(WORDS, repeat), count))


def digest(items: list[WorkItem]) -> str:
    hashed = Hashed()
    assert list(hashed(items)) == items
    return hashed.digest.hexdigest()


def draws(text: str, count: int = 4000) -> np.ndarray:
    random = np.random.default_rng(1)
    return np.array([Lengths.parse(text).draw(random) for _ in range(count)])


def chi_square(values: np.ndarray, probabilities: dict[int, float]) -> tuple[float, float]:
    """Pearson's statistic over values expected five times or more, and what one true sample in a thousand exceeds
    (Wilson and Hilferty's approximation)."""
    counts = Counter(values.tolist())
    expected = {value: p * len(values) for value, p in probabilities.items() if p * len(values) >= 5}
    statistic = sum((counts[value] - e) ** 2 / e for value, e in expected.items())
    rest = len(values) - sum(expected.values())
    if rest >= 5:
        statistic += (len(values) - sum(counts[value] for value in expected) - rest) ** 2 / rest
    degrees = len(expected) - (rest < 5)
    return statistic, degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3


# --- lengths ----------------------------------------------------------------------------------------------------------


def test_uniform_lengths() -> None:
    statistic, limit = chi_square(draws("uniform:10-29"), dict.fromkeys(range(10, 30), 1 / 20))
    assert statistic < limit
    assert chi_square(draws("uniform:10-28"), dict.fromkeys(range(10, 30), 1 / 20))[0] > limit


def test_poisson_lengths() -> None:
    mass = {k: math.exp(k * math.log(50) - 50 - math.lgamma(k + 1)) for k in range(1, 120)}
    statistic, limit = chi_square(draws("poisson:50"), mass)
    assert statistic < limit


def test_lognormal_lengths() -> None:
    values = np.sort(draws("lognormal:2000:0.8"))
    mean = math.log(2000) - 0.32
    cdf = np.array([0.5 * (1 + math.erf((math.log(v) - mean) / 0.8 / math.sqrt(2))) for v in values])
    steps = np.arange(1, len(values) + 1) / len(values)
    assert np.max(np.abs(steps - cdf)) < 1.95 / math.sqrt(len(values)) + 1 / 2000
    assert values.mean() == pytest.approx(2000, rel=0.05)


@given(
    st.one_of(
        st.integers(1, 2**24).map(lambda n: Lengths("fixed", n)),
        st.tuples(st.integers(1, 10**6), st.integers(0, 10**6)).map(lambda t: Lengths("uniform", t[0], sum(t))),
        st.integers(1, 10**5).map(lambda n: Lengths("poisson", n)),
        st.tuples(st.integers(1, 10**5), st.integers(0, 50)).map(lambda t: Lengths("lognormal", t[0], t[1] / 10)),
    ),
    st.integers(0, 2**32),
)
def test_lengths_are_read_as_they_are_written(lengths: Lengths, seed: int) -> None:
    assert Lengths.parse(str(lengths)) == lengths
    assert 1 <= lengths.draw(np.random.default_rng(seed)) <= 2**24


@pytest.mark.parametrize(
    "text",
    ["", "0", "-5", "ten", "1.5", "uniform:9-3", "uniform:0-3", "poisson:", "lognormal:5", "lognormal:9:6", "9" * 9],
)
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"tokens|smaller"):
        Lengths.parse(text)


# --- random prompts ---------------------------------------------------------------------------------------------------


def test_random_prompts_have_exact_lengths_and_share_nothing() -> None:
    items = take(Workload(prompt=Lengths("fixed", 64), output=Lengths("fixed", 7)), 200)
    assert {(len(item.prompt), item.output_tokens, item.unique) for item in items} == {(64, 7, True)}
    assert len({tuple(item.prompt[:8]) for item in items}) == 200
    assert {token for item in items for token in item.prompt} <= set(WORDS.ids)
    assert [item.id for item in items] == list(range(200))


def test_a_seed_gives_the_same_prompts_and_a_repeat_others_of_the_same_lengths() -> None:
    workload = Workload(prompt=Lengths.parse("uniform:1-99"), output=Lengths.parse("poisson:20"), seed=3)
    first, again, other = take(workload, 50), take(workload, 50), take(workload, 50, repeat=1)
    assert first == again
    assert digest(first) == digest(again) != digest(other)
    lengths = [[(len(item.prompt), item.output_tokens) for item in items] for items in (first, other)]
    assert lengths[0] == lengths[1]
    assert all(a.prompt != b.prompt for a, b in zip(first, other, strict=True) if len(a.prompt) > 3)
    assert take(Workload(prompt=workload.prompt, output=workload.output, seed=4), 50) != first


def test_other_lengths_have_other_prompts() -> None:
    """Or bench-throughput, after bench-ttft on one server, would find that one's longer prompts in the cache."""
    fixed = [Workload(prompt=Lengths("fixed", n), output=Lengths("fixed", m)) for n, m in ((64, 1), (128, 1), (64, 2))]
    assert len({tuple(take(workload, 1)[0].prompt[:8]) for workload in fixed}) == 3


def test_prefixes_are_shared_within_a_group_and_primed() -> None:
    workload = Workload(prompt=Lengths("fixed", 20), shared_prefix=30, prefix_groups=3)
    items, primers = take(workload, 12), workload.primers(WORDS)
    assert all(item.prompt[:30] == primers[n % 3].prompt for n, item in enumerate(items))
    assert len({tuple(item.prompt[:4]) for item in items}) == 3
    assert len({tuple(item.prompt[30:]) for item in items}) == 12
    assert not any(item.unique for item in items)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.8, 0.95, 1.0])
def test_a_hit_rate_is_a_prefix_that_others_have_asked_for(share: float) -> None:
    workload = Workload(prompt=Lengths("fixed", 200)).with_prefix_hit(share)
    first, second = take(workload, 2)
    assert len(first.prompt) == len(second.prompt) == 200
    common = next(n for n, (a, b) in enumerate(zip(first.prompt, second.prompt, strict=True)) if a != b)
    assert common == min(round(200 * share), 199)
    assert [len(item.prompt) for item in workload.primers(WORDS)] == ([common] if common else [])


def test_a_hit_rate_wants_prompts_of_one_length() -> None:
    with pytest.raises(ConfigError, match="--prefix-hit"):
        Workload(prompt=Lengths.parse("poisson:20")).with_prefix_hit(0.5)


def test_conversations_are_sessions_whose_turns_follow_each_other() -> None:
    items = take(Workload(turns=3, think_seconds=0.5, shared_prefix=4, prompt=Lengths("fixed", 6)), 9)
    assert [(item.session, item.turn) for item in items] == [(str(n // 3), n % 3) for n in range(9)]
    assert [item.think_seconds for item in items[:3]] == [0.0, 0.5, 0.5]
    assert [len(item.prompt) for item in items[:3]] == [10, 6, 6]  # later turns are added to what was said


def test_what_does_not_fit_is_left_out_and_counted() -> None:
    left_out = []
    workload = Workload(prompt=Lengths.parse("uniform:1-100"), output=Lengths("fixed", 10), max_model_len=60)
    items = list(islice(workload.items(WORDS, on_left_out=lambda: left_out.append(1)), 100))
    assert max(len(item.prompt) for item in items) == 50
    assert 60 < len(left_out) < 150  # half of all
    with pytest.raises(ConfigError, match="fits a context of 60 tokens"):
        take(Workload(prompt=Lengths("fixed", 61), max_model_len=60), 1)


def test_a_conversation_ends_where_the_context_does() -> None:
    items = take(Workload(turns=9, prompt=Lengths("fixed", 5), output=Lengths("fixed", 5), max_model_len=35), 6)
    assert [(item.session, item.turn) for item in items] == [(str(n // 3), n % 3) for n in range(6)]


# --- files ------------------------------------------------------------------------------------------------------------


def written(path: Path, *lines: Any) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(path)


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


CHAT = chat(
    ("human", "tell me all you know"),
    ("gpt", "I know very little indeed"),
    ("human", "tell me a little more"),
    ("gpt", "there is no more to tell"),
)


@pytest.fixture
def sharegpt(tmp_path: Path) -> str:
    chats = [chat(("gpt", "the model begins here"), ("human", "a b c d")), CHAT, chat(("human", "hi"), ("gpt", "ho"))]
    return written(
        tmp_path / "chats.json", json.dumps([*chats, chat(("system", "be brief"), *turns_of(CHAT))], indent=1)
    )


def turns_of(conversation: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["from"], turn["value"]) for turn in conversation["conversations"]]


def test_sharegpt_gives_first_questions_and_the_lengths_of_their_answers(sharegpt: str) -> None:
    items = take(Workload(dataset="sharegpt", path=sharegpt), 3)  # two can be used: the third is the first again
    assert {(item.prompt, item.output_tokens) for item in items} == {("tell me all you know", 5)}


def test_lengths_that_are_asked_for_go_before_those_of_chats(sharegpt: str) -> None:
    asked = Workload(dataset="sharegpt", path=sharegpt, output=Lengths("fixed", 9), output_first=True)
    assert {item.output_tokens for item in take(asked, 3)} == {9}


def test_sharegpt_conversations_go_turn_by_turn(sharegpt: str) -> None:
    items = take(Workload(dataset="sharegpt", path=sharegpt, turns=5), 4)
    assert [(item.session, item.turn, item.output_tokens) for item in items] == [
        ("0", 0, 5), ("0", 1, 6), ("1", 0, 5), ("1", 1, 6),
    ]  # fmt: skip
    assert items[1].prompt == [{"role": "user", "content": "tell me a little more"}]


def test_a_large_array_is_read_in_pieces(tmp_path: Path) -> None:
    long = chat(("human", "word " * 150_000), ("gpt", "yes of course I do"))  # 0.75 MB
    path = written(tmp_path / "chats.json", json.dumps([long] * 5))
    assert len({id(item) for item in take(Workload(dataset="sharegpt", path=path), 5)}) == 5


def test_gsm8k_asks_behind_solved_problems(tmp_path: Path) -> None:
    problems = [{"question": f"How much is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(FEW_SHOT + 2)]
    items = take(Workload(dataset="gsm8k", path=written(tmp_path / "gsm8k.jsonl", *problems)), 3)
    assert items[0].prompt.startswith("Question: How much is 0 + 1?\nAnswer: #### 1\n\nQuestion: How much is 1")
    assert items[0].prompt.endswith("#### 5\n\nQuestion: How much is 5 + 1?\nAnswer:")
    assert items[1].prompt.endswith("Question: How much is 6 + 1?\nAnswer:")
    assert items[2].prompt == items[0].prompt
    assert all(item.stops for item in items)


def test_prompts_of_ones_own(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    path = written(
        tmp_path / "own.jsonl", {"prompt": "Hello", "output_tokens": 3}, {"prompt": [5, 6]}, {"messages": messages}
    )
    items = take(Workload(dataset="jsonl", path=path, output=Lengths("fixed", 9)), 4)
    assert [item.prompt for item in items] == ["Hello", [5, 6], messages, "Hello"]
    assert [item.output_tokens for item in items] == [3, 9, 9, 3]


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens",
    "2023-11-16 18:15:46.6805900,374,44",
    "2023-11-16 18:15:47.6805900,40,10",
    "2023-11-16 18:16:46.6805900,91,16",
)


def test_azure_requests_come_in_time(tmp_path: Path) -> None:
    path = written(tmp_path / "azure.csv", *AZURE)
    items = take(Workload(dataset="azure", path=path, trace_speed=2.0), 9)
    assert [(item.scheduled, len(item.prompt), item.output_tokens) for item in items] == [
        (0.0, 374, 44), (pytest.approx(0.5), 40, 10), (pytest.approx(30.0), 91, 16),
    ]  # fmt: skip
    small = take(Workload(dataset="azure", path=path, length_scale=0.1), 9)
    assert [(len(item.prompt), item.output_tokens) for item in small] == [(37, 4), (4, 1), (9, 2)]


def test_the_newer_azure_traces_have_a_zone(tmp_path: Path) -> None:
    lines = (AZURE[0], "2024-05-10 00:00:00.009930+00:00,2162,5", "2024-05-10 00:00:01.009930+00:00,2399,6")
    items = take(Workload(dataset="azure", path=written(tmp_path / "azure.csv", *lines)), 2)
    assert items[1].scheduled == pytest.approx(1.0)


def mooncake(timestamp: int, length: int, *hash_ids: int) -> dict[str, Any]:
    return {"timestamp": timestamp, "input_length": length, "output_length": 20, "hash_ids": hash_ids}


@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_mooncake_hash_ids_are_shared_prefixes(tmp_path: Path, scale: float) -> None:
    path = written(
        tmp_path / "trace.jsonl", mooncake(0, 1000, 0, 1), mooncake(500, 1200, 0, 1, 2), mooncake(900, 600, 0, 3)
    )
    items = take(Workload(dataset="mooncake", path=path, length_scale=scale), 3)
    first, second, third = (item.prompt for item in items)
    assert [len(item.prompt) for item in items] == [round(n * scale) for n in (1000, 1200, 600)]
    assert [item.scheduled for item in items] == [0.0, 0.5, 0.9]
    block = round(512 * scale)
    assert second[: len(first)] == first
    assert third[:block] == first[:block]
    assert third[block:] != first[block : len(third)]


@pytest.mark.parametrize(
    ("dataset", "lines", "message"),
    [
        ("jsonl", ('{"prompt": "x"}', '{"prompt": '), "line 2: "),
        ("jsonl", ('{"prompt": "x"}', "", '{"prompt": 5}'), "line 3: .*prompt"),
        ("jsonl", ('{"text": "x"}',), "line 1: give either a prompt or messages"),
        ("jsonl", ('{"prompt": "x", "output_tokens": 0}',), "line 1: .*output_tokens"),
        ("jsonl", ("[" * 100_000,), "line 1: "),
        ("jsonl", ("",), "holds no prompt"),
        ("gsm8k", ('{"question": "x"}',), "line 1: .*answer"),
        ("gsm8k", ('{"question": "x", "answer": "y"}',), "holds no problem behind the first 5"),
        ("sharegpt", ("[", json.dumps(CHAT) + ",", '{"conversations": 3}]'), "line 3: .*conversations"),
        ("sharegpt", ("[", json.dumps(CHAT) + ",", '{"conversations": ['), "line 3: .*one JSON array"),
        ("sharegpt", ("[" + json.dumps(CHAT) + ", {}", "["), "line 3: .*one JSON array"),
        ("sharegpt", ("[]",), "holds no conversation"),
        ("sharegpt", ("[" * 100_000 + '{"a":' * 100_000,), "line 1: "),
        ("azure", (AZURE[0], "yesterday,1,2"), "line 2: is no"),
        ("azure", (AZURE[0], "2023-13-16 18:15:46.6,1,2"), "line 2: "),
        ("azure", (AZURE[0], "2023-11-16 18:15:46.6,0,2"), "line 2: .*input_length"),
        ("azure", (AZURE[0], AZURE[3], AZURE[1]), "line 3: is earlier"),
        ("mooncake", (json.dumps(mooncake(0, 513, 0)),), "line 1: 513 tokens are 2 blocks of 512, but there are 1"),
        ("mooncake", (json.dumps(mooncake(0, 0)),), "line 1: .*input_length"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_named_with_the_line(tmp_path: Path, dataset: Any, lines: Any, message: str) -> None:
    path = written(tmp_path / "data", *lines)
    with pytest.raises(ConfigError, match=message) as raised:
        take(Workload(dataset=dataset, path=path), 5)
    assert path in str(raised.value)
    assert len(str(raised.value)) < 400


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for content, reason in ((None, "cannot be read"), (b"\xff\xfe\x00", "no UTF-8")):
        path = tmp_path / "data"
        if content:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=reason):
            take(Workload(dataset="jsonl", path=str(path)), 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        Workload(dataset="jsonl", path=str(tmp_path / "none")).describe()
    with pytest.raises(ConfigError, match="--dataset-path"):
        Workload(dataset="gsm8k")


def test_a_description_knows_a_file_by_its_content(sharegpt: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    copy.write_bytes(Path(sharegpt).read_bytes())
    here, there = Workload(dataset="sharegpt", path=sharegpt), Workload(dataset="sharegpt", path=str(copy))
    assert here.describe() == there.describe()
    copy.write_text("[]")
    assert here.describe() != there.describe()
    json.dumps(here.describe())
