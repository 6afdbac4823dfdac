"""Answers that must look like something: which tokens may follow, by a JSON schema, a regular expression or a choice.

Grammars come from strangers. llguidance follows them without backtracking and under the limits below, so that a hostile
one costs less than a second and some 30 MB before it is refused or fails its own request.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

import msgspec
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from kvtool.errors import KVToolError, RequestError
from kvtool.request import Grammar
from kvtool.tokenizer import Tokenizer

MAX_BYTES = 64 << 10  # of a grammar's text
MAX_MULTIPLE_OF = 50_000  # a schema's multipleOf together: each becomes an automaton of so many states
MAX_COMPILED = 32
LIMITS = LLParserLimits(
    initial_lexer_fuel=100_000,  # about 0.1 s
    max_lexer_states=20_000,  # 1 to 2 kB each
    max_grammar_size=10_000,  # the time for optional properties grows with their square
    max_items_in_row=10_000,
    verbose_errors=False,
)
RESTART_EVERY = 16  # tokens: where the limits are met more often, each step would cost their whole
# What people and programs write, as in llama.cpp: given more, some models write nothing else till max_tokens.
WHITESPACE = r"\x20|\r?\n[\x20\x09]{0,20}"
NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "choice": "choice"}


def check(grammar: Grammar) -> None:
    """Refuse, without a model, what no answer could follow; takes up to a second, so call it in a thread.

    Raises:
        RequestError: the grammar is invalid, not supported, too long or too complex, or matches no text.
    """
    matcher = _compile(grammar, LLTokenizer("byte"))
    matcher.compute_bitmask()
    if matcher.is_error():
        raise _refusal(grammar, matcher.get_error())


class Matcher:
    """How far one answer has come in its grammar.

    What has been worked out of a grammar is shared by the answers that follow it, and grows up to a limit. An answer
    that meets the limit starts over from nothing, so it fails only where its own next tokens are too hard to tell.
    """

    def __init__(self, matcher: LLMatcher, compile_afresh: Callable[[], LLMatcher]) -> None:
        self._matcher = matcher
        self._compile_afresh = compile_afresh
        self._token_ids: list[int] = []
        self._restart_from = 0

    @property
    def finished(self) -> bool:
        """The answer is complete: nothing but an end-of-text token may follow."""
        return self._matcher.is_stopped()

    def fill(self, row: NDArray[np.int32]) -> None:
        """Set bit i % 32 of word i // 32 of `row` [ceil(V / 32)] if token i may follow, and clear the others.

        Raises:
            KVToolError: the grammar is too complex to tell.
        """
        self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._matcher.is_error():
            self._start_over()
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
            self._fail_if_stuck()

    def accept(self, token_id: int) -> None:
        """The answer goes on with `token_id`.

        Raises:
            KVToolError: it may not, or the grammar is too complex to tell.
        """
        self._token_ids.append(token_id)
        if not self._matcher.consume_token(token_id):
            self._start_over()

    def _start_over(self) -> None:
        if len(self._token_ids) < self._restart_from:
            self._fail_if_stuck()
        self._restart_from = len(self._token_ids) + RESTART_EVERY
        self._matcher = self._compile_afresh()
        self._matcher.consume_tokens(self._token_ids)
        self._fail_if_stuck()

    def _fail_if_stuck(self) -> None:
        if self._matcher.is_error():
            reason = _one_line(self._matcher.get_error())
            raise KVToolError(f"the answer cannot follow its grammar any further: {reason}; simplify the grammar")


class GrammarCompiler:
    """Starts matchers for one model's tokens, and keeps the newest grammars compiled.

    Args:
        tokenizer: the model's.
        vocab_size: of the model; ids that the tokenizer lacks are never allowed.
        eos_token_ids: allowed, all of them, where an answer may end.

    Raises:
        RequestError: the model's tokenizer takes no grammars, or none of its ids ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocabulary = _read_vocabulary(tokenizer, vocab_size, list(eos_token_ids))
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # least recently used first

    def start(self, grammar: Grammar) -> Matcher:
        """A matcher before the first token of an answer.

        Raises:
            RequestError: as `check`.
        """
        if grammar in self._compiled:
            self._compiled.move_to_end(grammar)
            matcher = self._compiled[grammar].deep_copy()
        else:
            matcher = self._compile(grammar)
        return Matcher(matcher, partial(self._compile, grammar))

    def _compile(self, grammar: Grammar) -> LLMatcher:
        self._compiled[grammar] = _compile(grammar, self._vocabulary)
        self._compiled.move_to_end(grammar)
        if len(self._compiled) > MAX_COMPILED:
            self._compiled.popitem(last=False)
        return self._compiled[grammar].deep_copy()


def _read_vocabulary(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> LLTokenizer:
    """A second or two for 150,000 tokens."""
    if not eos_token_ids:
        raise RequestError("grammar: no token of this model ends a text; leave it out", "grammar")
    try:
        whole = LLTokenizer(tokenizer.backend.to_str(), n_vocab=vocab_size, eos_token=eos_token_ids)
        return LLTokenizer(TokenizerWrapper(_Vocabulary(whole, eos_token_ids)), eos_token=eos_token_ids)
    except ValueError as error:
        reason = _one_line(str(error))
        raise RequestError(f"grammar: the model's tokenizer takes none: {reason}; leave it out", "grammar") from error


class _Vocabulary:
    """A tokenizer as `TokenizerWrapper` wants it, to which the text `<|im_end|>` is text.

    Where a grammar leaves one text only, llguidance allows its usual tokens alone; those of Hugging Face would be the
    control token, and end the answer.
    """

    bos_token_id = None

    def __init__(self, tokenizer: LLTokenizer, eos_token_ids: Sequence[int]) -> None:
        ids = range(tokenizer.vocab_size)
        self.eos_token_id = eos_token_ids[0]
        self.tokens = [tokenizer.decode_bytes([token_id]) for token_id in ids]
        self.special_token_ids = [token_id for token_id in ids if tokenizer.is_special_token(token_id)]
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        usual = self._tokenizer.tokenize_str(text)
        is_text = not any(map(self._tokenizer.is_special_token, usual))
        return usual if is_text else self._tokenizer.greedy_tokenize(text)


def _compile(grammar: Grammar, tokenizer: LLTokenizer) -> LLMatcher:
    try:
        matcher = LLMatcher(tokenizer, _source(grammar), log_level=0, limits=LIMITS)
    except (ValueError, msgspec.MsgspecError) as error:
        raise _refusal(grammar, str(error)) from error
    if matcher.is_error():
        raise _refusal(grammar, matcher.get_error())
    return matcher


def _source(grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    if len(grammar.text.encode()) > MAX_BYTES:
        raise ValueError(f"it is longer than {MAX_BYTES >> 10} KiB")
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(grammar.text)
    if grammar.kind == "json_schema":
        source = LLMatcher.grammar_from_json_schema(grammar.text, overrides={"whitespace_pattern": WHITESPACE})
        if _multiple_of(json.loads(grammar.text, parse_float=Decimal)) > MAX_MULTIPLE_OF:
            raise ValueError(f"its multipleOf add up to more than {MAX_MULTIPLE_OF}")
        return source
    choices = msgspec.json.decode(grammar.text, type=list[str])
    if not choices:
        raise ValueError("there is no text to choose")
    # One terminal: the parser has a limit of alternatives, the lexer has none.
    return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choices)))


def _multiple_of(schema: Any) -> int:
    """All of a schema's `multipleOf` together, without their decimal points."""
    if isinstance(schema, list):
        return sum(map(_multiple_of, schema))
    if not isinstance(schema, dict):
        return 0
    own = schema.get("multipleOf")
    _, digits, exponent = Decimal(own if isinstance(own, int | Decimal) else 0).as_tuple()
    assert isinstance(exponent, int)  # JSON has no NaN
    return int(Decimal((0, digits, max(exponent, 0)))) + sum(map(_multiple_of, schema.values()))


def _refusal(grammar: Grammar, error: str) -> RequestError:
    return RequestError(
        f"the {NAMES[grammar.kind]} cannot be used: {_one_line(error)}; change or simplify it", "grammar"
    )


def _one_line(error: str) -> str:
    """What llguidance and its regex parser have to say, without pictures of where."""
    lines = error.splitlines()
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    told = told.rpartition("(in regex): ")[2].rstrip(".")
    return "no text matches it" if told == "NoExtensionBias" else told[:200]
