"""What is asked: prompts made up to a length, of data sets and of traces. Seeded, and made as they are needed."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvtool.bench.datasets import (
    MOONCAKE_BLOCK,
    MOST_TOKENS,
    Asked,
    Conversation,
    Problem,
    TraceRequest,
    azure_lines,
    digest,
    json_array,
    json_lines,
    mooncake_lines,
)
from kvtool.bench.events import WorkItem
from kvtool.errors import ConfigError

FEW_SHOT = 5  # solved problems before each question, as in SGLang's bench_gsm8k
MOST_MISSES = 10_000  # requests in a row that may not fit
FEWEST_TOKENS = 4  # of a ShareGPT question or answer, as in vLLM's benchmark_serving

T = TypeVar("T")


# --- lengths ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """How many tokens: `512`, `uniform:100-500`, `poisson:200` or `lognormal:200:0.8`.

    Attributes:
        kind: the distribution.
        first: its mean; of a uniform one the smallest value.
        second: the largest value of a uniform one; sigma of a lognormal one's logarithm.
    """

    kind: Literal["fixed", "uniform", "poisson", "lognormal"]
    first: float
    second: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Lengths":
        """Raises ConfigError: it is no length and names no distribution of lengths."""
        number = r"(\d+(?:\.\d+)?)"
        if match := re.fullmatch(r"(?:fixed:)?(\d+)", text):
            lengths = cls("fixed", int(match[1]))
        elif match := re.fullmatch(r"uniform:(\d+)-(\d+)", text):
            lengths = cls("uniform", int(match[1]), int(match[2]))
        elif match := re.fullmatch(f"poisson:{number}", text):
            lengths = cls("poisson", float(match[1]))
        elif match := re.fullmatch(f"lognormal:{number}:{number}", text):
            lengths = cls("lognormal", float(match[1]), float(match[2]))
        else:
            raise ConfigError(
                f"{text!r:.40} is no number of tokens; write 512, uniform:100-500, poisson:200 or lognormal:200:0.8"
            )
        if not 1 <= lengths.first <= MOST_TOKENS:
            raise ConfigError(f"{text!r:.40}: tokens are 1 to {MOST_TOKENS:,}")
        if lengths.kind == "uniform" and not lengths.first <= lengths.second <= MOST_TOKENS:
            raise ConfigError(f"{text!r:.40}: write the smaller length first, and none above {MOST_TOKENS:,}")
        if lengths.kind == "lognormal" and lengths.second > 5:
            raise ConfigError(f"{text!r:.40}: a sigma above 5 spreads lengths over all magnitudes; give a smaller one")
        return lengths

    def draw(self, random: np.random.Generator) -> int:
        """One length, 1 or more."""
        if self.kind == "fixed":
            return int(self.first)
        if self.kind == "uniform":
            return int(random.integers(int(self.first), int(self.second), endpoint=True))
        if self.kind == "poisson":
            return max(1, int(random.poisson(self.first)))
        log_mean = math.log(self.first) - self.second**2 / 2
        return min(MOST_TOKENS, max(1, round(random.lognormal(log_mean, self.second))))

    def __str__(self) -> str:
        if self.kind == "fixed":
            return f"{self.first:.0f}"
        if self.kind == "uniform":
            return f"uniform:{self.first:.0f}-{self.second:.0f}"
        return f"{self.kind}:{self.first:.15g}" + (f":{self.second:.15g}" if self.kind == "lognormal" else "")


# --- the workload -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """What prompts are made of.

    Attributes:
        ids: that a prompt may hold; no special ones.
        count: tokens of a text; None: no tokenizer at hand, so a data set's answers get `Workload.output` tokens.
    """

    ids: Sequence[int]
    count: Callable[[str], int] | None = None

    @cached_property
    def array(self) -> NDArray[np.int64]:
        return np.asarray(self.ids, dtype=np.int64)


@dataclass(frozen=True)
class Workload:
    """What is asked of an engine; the same options give the same prompts.

    Attributes:
        dataset: `random` ids, or what kind of file `path` is.
        path: of the data set.
        seed: of lengths and ids.
        prompt: tokens of a prompt without what it shares (random).
        output: tokens of an answer, where the data set does not say.
        output_first: and where it does (sharegpt, azure, mooncake).
        shared_prefix: tokens that all prompts of a group begin with (random).
        prefix_groups: how many such beginnings there are; prompts take turns (random).
        turns: questions in a conversation at most (random, sharegpt).
        think_seconds: between an answer and the next question.
        trace_speed: a trace is replayed so many times as fast (azure, mooncake).
        length_scale: of a trace's lengths, so that a short context can replay them in small.
        max_model_len: requests that do not fit are left out; None: none is.
    """

    dataset: Literal["random", "sharegpt", "jsonl", "gsm8k", "azure", "mooncake"] = "random"
    path: str | None = None
    seed: int = 0
    prompt: Lengths = Lengths("fixed", 512)
    output: Lengths = Lengths("fixed", 128)
    output_first: bool = False
    shared_prefix: int = 0
    prefix_groups: int = 1
    turns: int = 1
    think_seconds: float = 0.0
    trace_speed: float = 1.0
    length_scale: float = 1.0
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        if self.dataset == "random" and self.path is not None:
            raise ConfigError("--dataset-path: random prompts need no file; say what it is with --dataset")
        if self.dataset != "random" and self.path is None:
            raise ConfigError(f"--dataset {self.dataset}: say where it is with --dataset-path FILE")
        if self.shared_prefix and self.dataset != "random":
            raise ConfigError(f"--shared-prefix: prompts of --dataset {self.dataset} are as they are; leave it out")

    @property
    def timed(self) -> bool:
        """Its requests come with times of their own."""
        return self.dataset in ("azure", "mooncake")

    @property
    def has_one_length(self) -> bool:
        """All of its prompts have one length, and all answers, so that a static batch pads none of them."""
        return self.dataset == "random" and self.prompt.kind == self.output.kind == "fixed"

    def items(
        self, vocabulary: Vocabulary, repeat: int = 0, on_left_out: Callable[[], None] = lambda: None
    ) -> Iterator[WorkItem]:
        """The requests, without end but for a trace's; turns of a session follow each other.

        Args:
            vocabulary: what they are made of.
            repeat: another one gives other ids of the same lengths, so that no run finds the last one's in a cache.
            on_left_out: called for each request that does not fit.

        Raises:
            ConfigError: the data set cannot be read, or holds nothing that fits; the message names file and line.
        """
        number, misses, session, used = 0, 0, None, 0
        for item in DATASETS[self.dataset](self, vocabulary, repeat):
            used = _tokens(item, vocabulary) + (used if item.turn and item.session == session else 0)
            session = item.session
            if self.max_model_len is None or used <= self.max_model_len:
                yield msgspec.structs.replace(item, id=number)
                number, misses = number + 1, 0
                continue
            on_left_out()
            misses += 1
            if misses == MOST_MISSES:
                raise ConfigError(
                    f"no request of --dataset {self.dataset} fits a context of {self.max_model_len} tokens "
                    f"({misses} tried in a row); ask for shorter ones"
                )

    def primers(self, vocabulary: Vocabulary, repeat: int = 0) -> list[WorkItem]:
        """What to ask before, unmeasured, so that each shared beginning is in a cache."""
        if not self.shared_prefix:
            return []
        prefixes = _Prefixes(self, vocabulary, repeat)
        return [WorkItem(id=n, prompt=prefixes[n], output_tokens=1) for n in range(self.prefix_groups)]

    def with_prefix_hit(self, share: float) -> "Workload":
        """The same, of prompts whose first `share` lies in a cache once the primers have been asked.

        Raises:
            ConfigError: the lengths of its prompts differ.
        """
        if self.prompt.kind != "fixed" or self.dataset != "random" or self.shared_prefix:
            raise ConfigError("--prefix-hit: works on random prompts of one length; give --prompt-tokens a number")
        total = int(self.prompt.first)
        shared = min(round(share * total), total - 1)
        return replace(self, prompt=Lengths("fixed", total - shared), shared_prefix=shared)

    def describe(self) -> dict[str, Any]:
        """The options that reproduce its prompts; of a file its hash, since the same one may lie elsewhere.

        Raises:
            ConfigError: there is no such file.
        """
        options = {
            name: str(value) if isinstance(value, Lengths) else value
            for name, value in vars(self).items()
            if name != "path"
        }
        return options | {"data_sha256": digest(Path(self.path))} if self.path else options


class Hashed:
    """Passes requests on, and knows the digest of all that it has passed: what was asked, of whom and when.

    Attributes:
        digest: SHA-256.
    """

    def __init__(self) -> None:
        self.digest, self._encoder = sha256(), msgspec.msgpack.Encoder()

    def __call__(self, items: Iterable[WorkItem]) -> Iterator[WorkItem]:
        for item in items:
            self.digest.update(self._encoder.encode(item))
            yield item


# --- requests of data sets -------------------------------------------------------------------------------------------


def _random(workload: Workload, vocabulary: Vocabulary, repeat: int) -> Iterator[WorkItem]:
    """Ids drawn evenly: prompts of exact lengths that share nothing but what is asked for, nor with other lengths'."""
    asked = (int(workload.prompt.first), int(workload.output.first))
    lengths, ids = _lengths(workload), _Ids(vocabulary, workload.seed, 1, repeat, *asked)
    prefixes = _Prefixes(workload, vocabulary, repeat)
    for session in count():
        for turn in range(workload.turns):
            prefix = [] if turn else prefixes[session % workload.prefix_groups]
            yield WorkItem(
                id=0,
                prompt=prefix + ids.draw(workload.prompt.draw(lengths)),
                output_tokens=workload.output.draw(lengths),
                unique=not (prefix or turn),
                **_place(workload, session, turn),
            )


def _sharegpt(workload: Workload, vocabulary: Vocabulary, repeat: int) -> Iterator[WorkItem]:
    """ShareGPT's conversations: first questions as plain texts, or with `turns` whole conversations as messages."""
    path, lengths, tokens = _path(workload), _lengths(workload), vocabulary.count

    def long_enough(*texts: str) -> bool:
        return tokens is None or all(tokens(text) >= FEWEST_TOKENS for text in texts)

    def conversations() -> Iterator[list[tuple[str, str]]]:
        for _, conversation in json_array(path, Conversation):
            if (pairs := conversation.pairs()) and long_enough(*pairs[0]):
                yield pairs

    for session, pairs in enumerate(_again(conversations, path, "conversation that a user begins")):
        for turn, (question, answer) in enumerate(pairs[: workload.turns]):
            yield WorkItem(
                id=0,
                prompt=question if workload.turns == 1 else [{"role": "user", "content": question}],
                output_tokens=_output(workload, lengths, max(1, tokens(answer)) if tokens else None),
                unique=False,
                **_place(workload, session, turn),
            )


def _output(workload: Workload, lengths: np.random.Generator, said: int | None) -> int:
    """Tokens of an answer, of which the data set may have said how many."""
    return workload.output.draw(lengths) if said is None or workload.output_first else said


def _jsonl(workload: Workload, vocabulary: Vocabulary, repeat: int) -> Iterator[WorkItem]:
    """A user's own: `{"prompt": text or ids}` or `{"messages": [...]}`, with `"output_tokens"` if it is to differ."""
    path, lengths = _path(workload), _lengths(workload)
    for line, asked in _again(lambda: json_lines(path, Asked), path, "prompt"):
        prompt = asked.messages if asked.prompt is None else asked.prompt
        if not prompt or (asked.prompt and asked.messages):
            raise ConfigError(f"{path}, line {line}: give either a prompt or messages, and not empty")
        output = asked.output_tokens or workload.output.draw(lengths)
        yield WorkItem(id=0, prompt=prompt, output_tokens=output, unique=False)


def _gsm8k(workload: Workload, vocabulary: Vocabulary, repeat: int) -> Iterator[WorkItem]:
    """GSM8K's problems behind the first few with their answers, as SGLang asks them; the answer stops by itself."""
    path, lengths = _path(workload), _lengths(workload)

    def questions() -> Iterator[str]:
        shots: list[str] = []
        for _, problem in json_lines(path, Problem):
            if len(shots) < FEW_SHOT:
                shots.append(f"Question: {problem.question}\nAnswer: {problem.answer}\n\n")
            else:
                yield "".join(shots) + f"Question: {problem.question}\nAnswer:"

    for text in _again(questions, path, f"problem behind the first {FEW_SHOT}"):
        yield WorkItem(id=0, prompt=text, output_tokens=workload.output.draw(lengths), unique=False, stops=True)


def _azure(workload: Workload, vocabulary: Vocabulary, repeat: int) -> Iterator[WorkItem]:
    """Azure's LLM inference traces (Patel et al., Splitwise, ISCA 2024): times and lengths, prompts of random ids."""
    ids, lengths = _Ids(vocabulary, workload.seed, 1, repeat), _lengths(workload)
    for seconds, asked in _in_time(workload, azure_lines(_path(workload))):
        prompt = ids.draw(_scaled(workload, asked.input_length))
        output = _output(workload, lengths, _scaled(workload, asked.output_length))
        yield WorkItem(id=0, prompt=prompt, output_tokens=output, scheduled=seconds)


def _mooncake(workload: Workload, vocabulary: Vocabulary, repeat: int) -> Iterator[WorkItem]:
    """Mooncake's traces (Qin et al., FAST 2025): the same hash id is the same block, so prefixes are truly shared."""
    size, lengths = _scaled(workload, MOONCAKE_BLOCK), _lengths(workload)

    @lru_cache(2**14)
    def block(hash_id: int) -> list[int]:
        return _Ids(vocabulary, workload.seed, 2, repeat, hash_id).draw(size)

    for seconds, asked in _in_time(workload, mooncake_lines(_path(workload))):
        prompt = [token_id for hash_id in asked.hash_ids for token_id in block(hash_id)]
        yield WorkItem(
            id=0,
            prompt=prompt[: max(1, round(asked.input_length * size / MOONCAKE_BLOCK))],
            output_tokens=_output(workload, lengths, _scaled(workload, asked.output_length)),
            scheduled=seconds,
            unique=False,
        )


DATASETS: dict[str, Callable[[Workload, Vocabulary, int], Iterator[WorkItem]]] = {
    "random": _random,
    "sharegpt": _sharegpt,
    "jsonl": _jsonl,
    "gsm8k": _gsm8k,
    "azure": _azure,
    "mooncake": _mooncake,
}


# --- what they are made of --------------------------------------------------------------------------------------------


class _Ids:
    """A seeded source of ids; sources with another `key` have nothing to do with it."""

    def __init__(self, vocabulary: Vocabulary, *key: int) -> None:
        self._ids = vocabulary.array
        self._random = np.random.default_rng(key)

    def draw(self, length: int) -> list[int]:
        ids: list[int] = self._ids[self._random.integers(len(self._ids), size=length)].tolist()
        return ids


class _Prefixes:
    """What the prompts of each group begin with."""

    def __init__(self, workload: Workload, vocabulary: Vocabulary, repeat: int) -> None:
        self._length, self._key = workload.shared_prefix, (vocabulary, workload.seed, 3, repeat)
        self._made: dict[int, list[int]] = {}

    def __getitem__(self, group: int) -> list[int]:
        if group not in self._made:
            self._made[group] = _Ids(*self._key, group).draw(self._length)
        return self._made[group]


def _path(workload: Workload) -> Path:
    assert workload.path is not None
    return Path(workload.path)


def _again(read: Callable[[], Iterator[T]], path: Path, what: str) -> Iterator[T]:
    """A data set from its beginning whenever it ends."""
    while True:
        element = None
        for element in read():
            yield element
        if element is None:
            raise ConfigError(f"--dataset-path {path}: holds no {what}; choose another file")


def _in_time(workload: Workload, lines: Iterator[tuple[int, TraceRequest]]) -> Iterator[tuple[float, TraceRequest]]:
    """Seconds after the first request, by the trace's clock at `trace_speed`."""
    first, last = None, 0.0
    for number, asked in lines:
        if asked.timestamp < last:
            raise ConfigError(f"{workload.path}, line {number}: is earlier than the line before; sort the file by time")
        last = asked.timestamp
        first = last if first is None else first
        yield (last - first) / 1000 / workload.trace_speed, asked


def _lengths(workload: Workload) -> np.random.Generator:
    """Apart from the ids' source, so that every repeat asks for the same lengths."""
    return np.random.default_rng([workload.seed, 0])


def _place(workload: Workload, session: int, turn: int) -> dict[str, Any]:
    """Where a request stands in a conversation, as fields of its `WorkItem`."""
    if workload.turns == 1:
        return {}
    return {"session": str(session), "turn": turn, "think_seconds": workload.think_seconds if turn else 0.0}


def _scaled(workload: Workload, tokens: int) -> int:
    return max(1, round(tokens * workload.length_scale))


def _tokens(item: WorkItem, vocabulary: Vocabulary) -> int:
    """Of prompt and answer, as far as they are known here: a chat template's own are not."""
    if isinstance(item.prompt, str):
        texts = [item.prompt]
    elif isinstance(item.prompt[0], int):
        return len(item.prompt) + item.output_tokens
    else:
        texts = [message["content"] for message in item.prompt]
    return sum(map(vocabulary.count, texts) if vocabulary.count else ()) + item.output_tokens
