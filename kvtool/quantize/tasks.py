"""Questions with known answers: what a cache in fewer bits does to what a model gets right."""

import json
import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any

from kvtool.config import EngineConfig
from kvtool.engine import Engine
from kvtool.errors import ConfigError, KVToolError
from kvtool.models.resolve import EMBEDDED
from kvtool.request import Request, SamplingParams
from kvtool.tokenizer import Tokenizer

RETRIEVAL = "retrieval"
MAX_FILE_BYTES = 64 << 20
ASKED = "Question: {}\nAnswer:"  # of models without a chat template, as lm-evaluation-harness asks GSM8K
NEXT_QUESTION = "\nQuestion:"  # which such models go on to ask themselves
NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")


@dataclass(frozen=True)
class Question:
    """One row of a task.

    Attributes:
        source: where it stands, for errors.
        text: a question, or a prompt to continue.
        answer: a solution whose last number is the answer, or how the prompt must continue.
        is_prompt: `text` goes to the model as it is and the answer is a text; else it is asked, and a number.
    """

    source: str
    text: str
    answer: str
    is_prompt: bool

    def is_right(self, completion: str) -> bool:
        if self.is_prompt:
            return completion.strip().startswith(self.answer.strip())
        return final_number(completion) == final_number(self.answer)


@dataclass(frozen=True)
class Answer:
    """What a model answered to a question by greedy decoding."""

    question: str
    expected: str
    text: str
    is_right: bool


def load_task(name: str) -> tuple[Question, ...]:
    """The rows of `retrieval`, or of a JSONL file.

    A row is `{"question": …, "answer": …}`, right when the last number is (GSM8K's files as they are: what follows
    `####` counts), or `{"prompt": …, "answer": …}`, right when greedy decoding goes on with the answer.

    Raises:
        ConfigError: an unreadable file, or a row that is neither.
    """
    path = EMBEDDED["tiny"] / "retrieval.jsonl" if name == RETRIEVAL else Path(name)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"--task {name}: is larger than {MAX_FILE_BYTES >> 20} MiB; cut it")
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is no UTF-8 text"
        raise ConfigError(f"--task {name}: {reason}; give {RETRIEVAL} or a JSONL file") from error
    rows = [(f"--task {name}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ConfigError(f"--task {name}: holds no question")
    questions = tuple(_question(source, line) for source, line in rows)
    return _lengths_in_turn(questions) if name == RETRIEVAL else questions


def final_number(text: str) -> Decimal | None:
    """The number behind the last `####` of a solution, or its last number; 1,234.0 is 1234."""
    marked = text.rpartition("####")[2] if "####" in text else text
    found: list[str] = NUMBER.findall(marked)
    return Decimal(found[-1].replace(",", "")) if found else None


def answer_all(
    config: EngineConfig,
    questions: Sequence[Question],
    max_tokens: int,
    on_progress: Callable[[float, float], None] = lambda done, total: None,
) -> list[Answer]:
    """Greedy answers of an engine in this process, all questions together.

    Args:
        max_tokens: of the answer to a question; a prompt is continued as far as its answer goes.
        on_progress: told how many of how many answers are complete.

    Raises:
        KVToolError: a question that does not fit the model's context, or an engine that cannot run.
    """
    with closing(Engine(config)) as engine:
        return _answer_all(engine, questions, max_tokens, on_progress)


def _answer_all(
    engine: Engine, questions: Sequence[Question], max_tokens: int, on_progress: Callable[[float, float], None]
) -> list[Answer]:
    tokenizer = Tokenizer.load(engine.runner.path, engine.info.vocab_size)
    is_chat = tokenizer.info["chat_template"] is not None
    for index, question in enumerate(questions):
        engine.submit(
            Request(str(index), *_prompt(question, tokenizer, is_chat, max_tokens, engine.info.max_model_len))
        )
    generated: list[list[int]] = [[] for _ in questions]
    done = 0
    while engine.has_work:
        for tokens in engine.step():
            if tokens.error:
                raise KVToolError(f"{questions[int(tokens.id)].source}: {tokens.error}")
            generated[int(tokens.id)] += tokens.token_ids
            done += tokens.finish_reason is not None
        on_progress(done, len(questions))
    texts = [tokenizer.decode(ids).partition(NEXT_QUESTION)[0] for ids in generated]
    return [
        Answer(question.text, question.answer, text, question.is_right(text))
        for question, text in zip(questions, texts, strict=True)
    ]


def _prompt(
    question: Question, tokenizer: Tokenizer, is_chat: bool, max_tokens: int, max_model_len: int
) -> tuple[list[int], SamplingParams]:
    """Ids of a question as the model is asked it, and how it answers."""
    if question.is_prompt:
        ids = tokenizer.encode(question.text)
        max_tokens = len(tokenizer.encode(question.answer, add_special_tokens=False))
    elif is_chat:
        ids = tokenizer.chat([{"role": "user", "content": question.text}])
    else:
        ids = tokenizer.encode(ASKED.format(question.text))
    room = max_model_len - len(ids)
    if room < 1 or (question.is_prompt and room < max_tokens):
        raise ConfigError(f"{question.source}: {len(ids)} tokens do not fit in {max_model_len}; leave it out")
    return ids, SamplingParams(temperature=0, max_tokens=min(max_tokens, room))


def _question(source: str, line: str) -> Question:
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: is no JSON; write one object a line") from error
    if not isinstance(row, dict) or not isinstance(row.get("answer"), str):
        raise ConfigError(f'{source}: needs a text under "answer"')
    for name in ("prompt", "question"):
        if isinstance(row.get(name), str) and row[name].strip():
            question = Question(source, row[name], row["answer"], is_prompt=name == "prompt")
            break
    else:
        raise ConfigError(f'{source}: needs a text under "question" or "prompt"')
    if re.search("[\ud800-\udfff]", question.text + question.answer):  # which JSON can spell
        raise ConfigError(f"{source}: holds a lone surrogate, which is no text; take it out")
    if not question.is_prompt and final_number(question.answer) is None:
        raise ConfigError(f'{source}: the answer holds no number; write "prompt" for "question" to compare texts')
    if not question.answer.strip():
        raise ConfigError(f"{source}: the answer is empty")
    return question


def _lengths_in_turn(questions: Sequence[Question]) -> tuple[Question, ...]:
    """So that the first few hold documents of every length; the file has three lengths behind each other."""
    third = len(questions) // 3
    return tuple(chain.from_iterable(zip(*(questions[i * third :][:third] for i in range(3)), strict=True)))
