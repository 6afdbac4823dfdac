"""Tool calls come out of an answer whole, and everything else comes out of it as it was, however it is split."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_tokenizer import BYTE_LEVEL, QWEN, TINY, with_template
from transformers import PreTrainedTokenizerFast

from kvtool.server.tools import CLOSE, OPEN, ToolCall, ToolParser
from kvtool.tokenizer import Detokenizer, Tokenizer

WEATHER = '{"name": "weather", "arguments": {"city": "Lisboa"}}'


def parsed(pieces: list[str]) -> tuple[str, list[ToolCall]]:
    """Text and calls of an answer that comes in `pieces`."""
    parser = ToolParser()
    texts, calls = zip(*[*map(parser.push, pieces), parser.finish()], strict=True)
    return "".join(texts), [call for some in calls for call in some]


def block(name: str, arguments: dict[str, Any]) -> str:
    return f"{OPEN}\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n{CLOSE}"


def squeezed(text: str) -> str:
    return "".join(text.split())


words = st.text(st.sampled_from("ab <>/\\\"'{}\n_tool_call你"), max_size=20)
scraps = st.sampled_from([OPEN, CLOSE, "<", "<tool", "</tool_", "\n", WEATHER, '"', "\\", "{", "}", '{"name": "x"}'])
values = st.recursive(st.none() | st.booleans() | st.integers() | words | st.just(CLOSE), st.lists, max_leaves=5)
arguments = st.dictionaries(words, values, max_size=3)
calls = st.builds(block, words.filter(bool), arguments)
answers = st.lists(words | scraps | calls, max_size=8).map("".join)


@given(answers, st.lists(st.integers(1, 9), max_size=100))
def test_the_result_does_not_depend_on_the_split(answer: str, lengths: list[int]) -> None:
    pieces, rest = [], answer
    for length in lengths:
        pieces, rest = [*pieces, rest[:length]], rest[length:]
    assert parsed([*pieces, rest]) == parsed([answer])


@given(answers)
def test_nothing_is_lost_and_nothing_made_up(answer: str) -> None:
    """Text and calls, one after the other, are the answer again, but for white space around calls."""
    parser, text, rest = ToolParser(), "", answer
    for end in range(1, len(answer) + 1):
        shown, found = parser.push(answer[end - 1])
        text += shown
        for call in found:
            before = rest.removesuffix(answer[end:])
            block = squeezed(before).removeprefix(squeezed(text))
            assert block.startswith(OPEN) and block.endswith(CLOSE)
            assert squeezed(call.arguments) in block and isinstance(json.loads(call.arguments), dict)
            text, rest = "", answer[end:]
    text += parser.finish()[0]
    assert squeezed(text) == squeezed(rest)
    assert rest is not answer or text == answer


@given(words.filter(lambda text: "<" not in text), st.lists(st.tuples(words.filter(bool), arguments)))
@example("", [("weather", {"city": CLOSE}), ("weather", {})])
def test_calls_that_a_template_writes_are_read_back(text: str, wanted: list[tuple[str, dict[str, Any]]]) -> None:
    answer = "\n".join([text, *(block(name, arguments) for name, arguments in wanted)])
    content, found = parsed([answer])
    assert content == (text.rstrip() if wanted else text)
    assert [(call.name, json.loads(call.arguments)) for call in found] == wanted


def test_a_turn_that_the_chat_template_renders_is_read_back() -> None:
    function = {"name": "weather", "arguments": '{"city": "Lisboa & é", "days": 2}'}
    turn = {"role": "assistant", "content": "Let me see.", "tool_calls": [{"function": function}] * 2}
    tokenizer = with_template(QWEN)
    answer = tokenizer.chat_text([turn], add_generation_prompt=False)
    answer = answer.removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
    call = ToolCall(function["name"], function["arguments"])
    assert parsed([answer]) == ("Let me see.", [call, call])


def test_tags_that_are_tokens_of_their_own_are_read_too() -> None:
    hf = PreTrainedTokenizerFast.from_pretrained(TINY)
    hf.add_tokens([OPEN, CLOSE])
    tokenizer = Tokenizer(hf)
    ids = tokenizer.encode(f"Well\n{OPEN}\n{WEATHER}\n{CLOSE}")
    assert len(hf) > BYTE_LEVEL.backend.get_vocab_size() and max(ids) >= len(hf) - 2
    detokenizer = Detokenizer(tokenizer)
    assert parsed([detokenizer.push([i]) for i in ids]) == ("Well", [ToolCall("weather", '{"city": "Lisboa"}')])


def test_text_is_not_held_back_without_need() -> None:
    parser = ToolParser()
    assert parser.push("one <") == ("one", [])
    assert parser.push("b> two\n\n") == (" <b> two", [])
    assert parser.push(f"{OPEN}{WEATHER}{CLOSE}\n") == ("", [ToolCall("weather", '{"city": "Lisboa"}')])
    assert parser.push("three\n") == ("\nthree", [])
    assert parser.finish() == ("\n", [])


@pytest.mark.parametrize(
    "text",
    [
        OPEN,
        f"a {OPEN}\n{WEATHER}",
        f"{OPEN}{CLOSE} b",
        f"{OPEN}\n{{broken\n{CLOSE}\n",
        f'{OPEN}\n{{"name": "stray quote}}\n{CLOSE}',
        f'{OPEN}{{"name": "weather"}}{CLOSE}',
        f'{OPEN}{{"name": "", "arguments": {{}}}}{CLOSE}',
        f'{OPEN}{{"name": "weather", "arguments": "{{}}"}}{CLOSE}',
        f'{OPEN}{{"name": "weather", "arguments": {{"x": NaN}}}}{CLOSE}',
        f'{OPEN}{{"name": "weather", "arguments": {{"x": {"[" * 100_000}}}{CLOSE}',
        f"{OPEN}{OPEN}{WEATHER}{CLOSE}",
        f"{CLOSE} {WEATHER}",
        " \n ",
    ],
)
def test_what_is_no_call_is_text(text: str) -> None:
    assert parsed([text]) == (text, [])


def test_a_malformed_call_does_not_hide_the_next() -> None:
    broken = f'{OPEN}\n{{"name": "stray quote}}\n{CLOSE}'
    text, found = parsed([f"{broken}\n{OPEN}\n{WEATHER}\n{CLOSE}"])
    assert (text, [call.name for call in found]) == (broken, ["weather"])


def test_arguments_are_the_model_s_own_words() -> None:
    arguments = '{"x": 1.10, "y":1e400, "x": 2, "z": "\\u00e9"}'
    _, (call,) = parsed([f'{OPEN}{{"arguments":  {arguments} , "name": "f"}}{CLOSE}'])
    assert call == ToolCall("f", arguments)
