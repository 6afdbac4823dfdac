"""Whatever the model would like to say, what it may say fits the grammar; and hostile grammars stay cheap."""

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from kvtool import grammar as grammar_module
from kvtool.errors import KVToolError, RequestError
from kvtool.grammar import MAX_BYTES, GrammarCompiler, Matcher, check
from kvtool.request import Grammar
from kvtool.tokenizer import Tokenizer

TINY = Path(__file__).parents[1] / "kvtool" / "assets" / "tiny"
TOKENIZER = Tokenizer.load(TINY, 4096)
VOCAB = 4096 + 40  # as if padded; no multiple of 32
EOS = [2, 0]
COMPILER = GrammarCompiler(TOKENIZER, VOCAB, EOS)


def allowed(matcher: Matcher) -> list[int]:
    row = np.full(-(-VOCAB // 32), -1, dtype=np.int32)
    matcher.fill(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(grammar: Grammar, seed: int, max_tokens: int = 400) -> tuple[str, bool]:
    """An answer of tokens drawn at random from those allowed, and whether it came to an end.

    After some tokens it ends as soon as it may; the closing ones are preferred then, so that most walks come to an end.
    """
    matcher, rng, answer = COMPILER.start(grammar), random.Random(seed), []
    patience = rng.randrange(max_tokens // 4)
    for i in range(max_tokens):
        ids = allowed(matcher)
        assert ids and max(ids) < 4096, "something must be allowed, and never an id that the tokenizer lacks"
        may_end = set(EOS) & set(ids)
        assert may_end in (set(), set(EOS))
        assert not matcher.finished or set(ids) == set(EOS)
        if may_end and (i > patience or len(ids) == 2 or rng.random() < 0.1):
            matcher.accept(rng.choice(EOS))
            assert matcher.finished
            return TOKENIZER.decode(answer), True
        ids = [i for i in ids if i not in EOS]
        closing = [i for i in ids if TOKENIZER.decode([i]) in ('"', "}", "]")] if i > patience else []
        answer.append(rng.choice(closing or ids))
        matcher.accept(answer[-1])
    return TOKENIZER.decode(answer), False


def fits(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    """JSON Schema, as much of it as the schemas below use."""
    if "$ref" in schema:
        return fits(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root)
    if "anyOf" in schema:
        return any(fits(value, option, root) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    match schema.get("type"):
        case "object":
            known = schema.get("properties", {})
            extra = schema.get("additionalProperties", True)
            return (
                isinstance(value, dict)
                and set(schema.get("required", [])) <= set(value)
                and (extra is not False or set(value) <= set(known))
                and all(fits(value[name], known[name], root) for name in set(known) & set(value))
            )
        case "array":
            inside = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
            return isinstance(value, list) and inside and all(fits(item, schema["items"], root) for item in value)
        case "string":
            inside = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
            return isinstance(value, str) and inside and re.search(schema.get("pattern", ""), value) is not None
        case "integer":
            inside = schema.get("minimum", value) <= value <= schema.get("maximum", value)
            return type(value) is int and inside and value % schema.get("multipleOf", 1) == 0
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
    return True


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "mood": {"enum": ["good", "so-so", "\N{GRINNING FACE}", 'a "quote"', None, 3]},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
        "even": {"type": "integer", "multipleOf": 2, "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 1, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "age", "code", "tags"],
    "additionalProperties": False,
}
LINKED = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
}


@pytest.mark.parametrize("schema", [PERSON, LINKED, {"type": "object"}], ids=["person", "linked", "object"])
def test_random_answers_fit_their_json_schema(schema: dict[str, Any]) -> None:
    grammar = Grammar("json_schema", json.dumps(schema))
    check(grammar)
    answers = [walk(grammar, seed) for seed in range(25)]
    ended = [text for text, whole in answers if whole]
    assert len(ended) > 5
    assert len(set(ended)) > 3
    for text in ended:
        assert fits(json.loads(text), schema, schema), text


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
        r"(yes|no|maybe)( [a-z]{1,8}){0,4}",
        r"[0-9]+(\.[0-9]+)?|-",
        "[éß你\N{GRINNING FACE}]{1,6}!",
        r"(a+)+b?",
        "^[a-zé]{1,10}$",
        r"<\|im_end\|>|\"\\",
    ],
)
def test_random_answers_match_the_whole_regex(pattern: str) -> None:
    grammar = Grammar("regex", pattern)
    check(grammar)
    for seed in range(15):
        text, whole = walk(grammar, seed)
        assert not whole or re.fullmatch(pattern, text), text


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.integers(0, 1000))
@example(["a", "ab", "abc"], 1)
@example(["<|im_end|>"], 1)
@example(["\n<|im_end|>", "x<|im_start|>y"], 3)
@example(["\N{GRINNING FACE}", '"', "\\", "'", "\n", "/x/", "\0", "<|im_end|>", "{a}", "$1"], 2)
def test_the_answer_is_one_of_the_choices(choices: list[str], seed: int) -> None:
    text, whole = walk(Grammar("choice", json.dumps(choices)), seed)
    assert whole
    assert text in choices


def test_a_choice_that_begins_another_can_end_there_or_go_on() -> None:
    grammar = Grammar("choice", '["a", "ab"]')
    assert {walk(grammar, seed)[0] for seed in range(30)} == {"a", "ab"}
    matcher = COMPILER.start(grammar)
    matcher.accept(*TOKENIZER.encode("a"))
    assert not matcher.finished
    assert set(allowed(matcher)) == {*EOS, *TOKENIZER.encode("b")}
    matcher.accept(*TOKENIZER.encode("b"))
    assert matcher.finished
    assert set(allowed(matcher)) == set(EOS)


def test_a_character_may_be_said_byte_by_byte() -> None:
    matcher, answer = COMPILER.start(Grammar("choice", json.dumps(["\N{GRINNING FACE}"]))), []
    while not matcher.finished:
        answer.append(min(allowed(matcher)))
        matcher.accept(answer[-1])
    assert len(answer) == len("\N{GRINNING FACE}".encode())
    assert TOKENIZER.decode(answer) == "\N{GRINNING FACE}"


def test_a_token_that_may_not_follow_is_an_error() -> None:
    matcher = COMPILER.start(Grammar("choice", '["a"]'))
    with pytest.raises(KVToolError, match="cannot follow its grammar"):
        matcher.accept(*TOKENIZER.encode("b"))


@pytest.mark.parametrize(("space", "most"), [(" ", 1), ("\n", 1), ("\n ", 20), ("\n\t", 20)])
def test_whitespace_comes_to_an_end(space: str, most: int) -> None:
    matcher = COMPILER.start(Grammar("json_schema", '{"type": "array"}'))
    whitespace = [TOKENIZER.encode(character)[0] for character in " \n\t"]
    first, last = TOKENIZER.encode(space[0])[0], TOKENIZER.encode(space[-1])[0]
    for token_id in [*TOKENIZER.encode("["), *([first] if first != last else []), *[last] * most]:
        assert token_id in allowed(matcher)
        matcher.accept(token_id)
    assert last not in allowed(matcher)
    if len(space) > 1:
        assert not set(whitespace) & set(allowed(matcher))


def nested(depth: int) -> str:
    return '{"properties": {"a": ' * depth + "{}" + "}}" * depth


NAMES = [f"{a}{b}" for a in range(100) for b in "abcdefghijklmnopqrstuvwxyzABCDEFGH"]
REFUSED = {
    "no JSON": Grammar("json_schema", "{"),
    "no schema": Grammar("json_schema", '"x"'),
    "NaN": Grammar("json_schema", '{"minimum": NaN}'),
    "unknown type": Grammar("json_schema", '{"type": "text"}'),
    "unknown keyword": Grammar("json_schema", '{"type": "array", "uniqueItems": true}'),
    "nothing fits": Grammar("json_schema", '{"type": "integer", "minimum": 2, "maximum": 1}'),
    "empty enum": Grammar("json_schema", '{"enum": []}'),
    "10,000 deep": Grammar("json_schema", "[" * 10_000),
    "1,000 deep": Grammar("json_schema", nested(1000)),
    "refers to itself": Grammar("json_schema", '{"$ref": "#"}'),
    "refers in a ring": Grammar("json_schema", '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}'),
    "refers to nothing": Grammar("json_schema", '{"$ref": "#/$defs/a"}'),
    "refers to the web": Grammar("json_schema", '{"$ref": "http://127.0.0.1:9/x.json"}'),
    "refers to a file": Grammar("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "too many properties": Grammar("json_schema", json.dumps({"properties": {name: {} for name in NAMES}})),
    "huge multipleOf": Grammar("json_schema", '{"type": "integer", "multipleOf": 1000003}'),
    "multipleOf 1e300": Grammar("json_schema", '{"type": "number", "multipleOf": 1e300}'),
    "many multipleOf": Grammar("json_schema", json.dumps({"anyOf": [{"multipleOf": 9973 + i} for i in range(99)]})),
    "powers of allOf": Grammar(
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in "ab"]} for i in range(25)]}),
    ),
    "look-ahead in a pattern": Grammar("json_schema", '{"type": "string", "pattern": "^(?=a)b"}'),
    "unclosed": Grammar("regex", "(a"),
    "look-around": Grammar("regex", "(?=a)b"),
    "back-reference": Grammar("regex", r"(a)\1"),
    "nested groups": Grammar("regex", "(" * 5000 + "a" + ")*" * 5000),
    "lone surrogate": Grammar("regex", "\ud800"),
    "long": Grammar("regex", "a" * (MAX_BYTES + 1)),
    "no list": Grammar("choice", "{}"),
    "no choices": Grammar("choice", "[]"),
    "no texts": Grammar("choice", "[1]"),
    "half a character": Grammar("choice", '["\\ud800"]'),
}
COSTLY = {
    "evil": Grammar("regex", "(a+)+b"),
    "evil alternatives": Grammar("regex", "(a|a|aa)*b"),
    "exponential states": Grammar("regex", r"(.|\n)*a(.|\n){200}b"),
    "words": Grammar("regex", "([a-z ]*(cat|dog|[aeiou][a-z]{9}) ){30}x"),
    "product of repeats": Grammar("regex", "(a{1000}){1000}"),
    "powers of repeats": Grammar("regex", "((((a{1000}){1000}){1000}){1000}){1000}"),
    "dots": Grammar("regex", "(.*)" * 200 + "x"),
    "long string": Grammar("json_schema", '{"type": "string", "minLength": 1000000, "maxLength": 1000000000}'),
    "long list": Grammar("json_schema", '{"type": "array", "items": {"type": "string"}, "minItems": 1000000000}'),
    "pattern and length": Grammar(
        "json_schema", '{"type": "string", "pattern": "a.{0,40}b.{0,40}c", "maxLength": 3000}'
    ),
    "large enum": Grammar("json_schema", json.dumps({"enum": NAMES})),
    "many properties": Grammar("json_schema", json.dumps({"properties": {name: {} for name in NAMES[:800]}})),
    "endless": Grammar(
        "json_schema",
        '{"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}}}',
    ),
    "many choices": Grammar("choice", json.dumps(NAMES)),
}


@pytest.mark.parametrize("grammar", REFUSED.values(), ids=REFUSED)
def test_what_no_answer_could_follow_is_refused(grammar: Grammar) -> None:
    began = time.process_time()
    with pytest.raises(RequestError) as refused:
        check(grammar)
    assert time.process_time() - began < 2
    assert refused.value.param == "grammar"
    message = str(refused.value)
    assert "\n" not in message and len(message) < 300
    assert message.startswith("the ") and "cannot be used: " in message


@pytest.mark.parametrize("grammar", COSTLY.values(), ids=COSTLY)
def test_a_costly_grammar_is_refused_or_followed_in_bounded_time(grammar: Grammar) -> None:
    def seconds() -> float:
        nonlocal began
        before, began = began, time.process_time()
        return began - before

    began, slowest, rng = time.process_time(), 0.0, random.Random(3)
    try:
        check(grammar)
        matcher = COMPILER.start(grammar)
        assert seconds() < 2
        for _ in range(200):
            ids = [i for i in allowed(matcher) if i not in EOS]
            if not ids:
                break
            matcher.accept(rng.choice(ids))
            slowest = max(slowest, seconds())
    except KVToolError as error:
        assert "\n" not in str(error)
    assert max(slowest, seconds()) < 1


def test_answers_do_not_fail_because_of_what_others_have_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many answers of one grammar, which together meet the limit of lexer states again and again."""
    monkeypatch.setattr(grammar_module, "LIMITS", grammar_module.LLParserLimits(max_lexer_states=2000))
    compiler, fresh = GrammarCompiler(TOKENIZER, VOCAB, EOS), 0
    compile_afresh = compiler._compile

    def counted(grammar: Grammar) -> Any:
        nonlocal fresh
        fresh += 1
        return compile_afresh(grammar)

    monkeypatch.setattr(compiler, "_compile", counted)
    grammar, rng = Grammar("regex", r"(\p{L}{1,30}[ ,.]){1,200}"), random.Random(5)
    matchers = [(compiler.start(grammar), []) for _ in range(3)]
    for _ in range(60):
        for matcher, answer in matchers:
            answer.append(rng.choice([i for i in allowed(matcher) if i not in EOS]))
            matcher.accept(answer[-1])
    assert fresh > 3
    for _, answer in matchers:
        alone = compiler.start(grammar)
        for token_id in answer:
            assert token_id in allowed(alone)
            alone.accept(token_id)


def test_only_the_newest_grammars_are_kept() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCAB, EOS)
    first = Grammar("choice", '["first"]')
    for i in range(100):
        compiler.start(Grammar("choice", json.dumps([str(i)])))
        compiler.start(first)
    assert len(compiler._compiled) == grammar_module.MAX_COMPILED
    assert first in compiler._compiled


def test_tokenizers_of_bytes_and_spaces_follow_too() -> None:
    """Llama 2's kind: a space is `▁`, unknown characters are byte tokens."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "b"]
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>"))
    matcher = GrammarCompiler(tokenizer, VOCAB, [1]).start(Grammar("choice", json.dumps([" aé"])))
    answer: list[int] = []
    while not matcher.finished:
        answer.append(min(allowed(matcher)))
        matcher.accept(answer[-1])
    assert [words[i] for i in answer[-2:]] == ["<0xC3>", "<0xA9>"]
    assert tokenizer.decode(answer) == " aé"
    assert allowed(matcher) == [1]
