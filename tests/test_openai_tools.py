"""Tools over OpenAI's routes, and the text around their calls."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from conftest import EOS, MESSAGES, fault, serving

from kvtool.request import FinishReason, Tokens
from kvtool.server.generation import Answer, Reader
from kvtool.server.protocol import Sampling
from kvtool.tokenizer import Tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Łódź"}}\n</tool_call>'


def test_tools_need_a_template_that_knows_them(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"messages": MESSAGES, "tools": TOOLS})
    assert response.status_code == 400
    assert fault(response)["message"] == "tools: the model's chat template has no tools; leave them out"
    ignored = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "none", "max_tokens": 1}
    assert http.post("/v1/chat/completions", json=ignored).status_code == 200


def test_a_template_from_a_client_is_refused(http: httpx.Client) -> None:
    response = http.post("/v1/chat/completions", json={"messages": MESSAGES, "chat_template": "{{ 1 }}"})
    assert response.status_code == 400
    assert "--trust-request-chat-template" in fault(response)["message"]


@pytest.fixture(scope="module")
def trusting() -> Iterator[openai.OpenAI]:
    with (
        serving("--kv-cache-memory", "64MiB", "--trust-request-chat-template") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client


def called(client: openai.OpenAI, text: str, **fields: Any) -> Any:
    """An answer that can only be `text`, from a model that is offered tools."""
    extra = {"guided_choice": [text], "chat_template": "{{ tools | tojson }}{{ messages[0].content }}"}
    return client.chat.completions.create(model="tiny", messages=MESSAGES, tools=TOOLS, extra_body=extra, **fields)


def test_a_call_is_told_from_text(trusting: openai.OpenAI) -> None:
    choice = called(trusting, "I will look." + CALL).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I will look.")
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Łódź"}
    choice = called(trusting, CALL + CALL).choices[0]
    assert (choice.message.content, len(choice.message.tool_calls)) == (None, 2)
    assert len({call.id for call in choice.message.tool_calls}) == 2
    choice = called(trusting, CALL, tool_choice="none").choices[0]
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", CALL, None)


def test_calls_stream(trusting: openai.OpenAI) -> None:
    chunks = list(called(trusting, "So: " + CALL + CALL, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "So:"
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert all(call.id and call.function.name == "weather" for call in calls)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "tool_calls"
    assert deltas[0].role == "assistant"


def test_a_conversation_with_calls_goes_on(trusting: openai.OpenAI) -> None:
    """The template sees what tools were called, and what came of it."""
    message: Any = called(trusting, CALL).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    template = "{{ messages[1].tool_calls[0].function.name }} {{ messages[2].content }} {{ tools | length }}"
    chat = trusting.chat.completions.create(
        model="tiny",
        messages=[*MESSAGES, message, result],
        tools=TOOLS,  # type: ignore[arg-type]
        max_tokens=1,
        extra_body={"chat_template": template, "return_token_ids": True},
    )
    same = trusting.completions.create(
        model="tiny", prompt="weather rain 1", max_tokens=1, extra_body={"return_token_ids": True}
    )
    assert chat.prompt_token_ids == same.choices[0].prompt_token_ids  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_how_tokens_arrive_does_not_matter(tokenizer: Tokenizer, size: int) -> None:
    """Text, stop string and calls are the same; and every token comes with some piece."""
    ids = tokenizer.encode(f"Look 😀: {CALL} and then END of it")
    reader = Reader(tokenizer, [EOS], Sampling(stop=["END"]), tools=True)
    answer = Answer()
    for start in range(0, len(ids), size):
        end = start + size
        reason: FinishReason | None = "length" if end >= len(ids) else None
        reader.read(Tokens("id", ids[start:end], reason), part := Answer())
        answer.add(part)
        if reader.finished:
            break
    assert answer.text == "Look 😀: and then "
    assert [json.loads(call.arguments) for call in answer.tool_calls] == [{"city": "Łódź"}]
    assert (answer.finish_reason, answer.matched) == ("stop", "END")
    assert answer.token_ids == ids[: len(answer.token_ids)]
