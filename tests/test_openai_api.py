"""OpenAI's routes, asked by its own client, and by what others are known to send."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import events, fault, serving

from kvtool.request import FinishReason, Tokens
from kvtool.server.generation import Answer, Reader
from kvtool.server.protocol import Sampling
from kvtool.tokenizer import Tokenizer

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
MESSAGES: Any = [{"role": "user", "content": "Who are you?"}]
EOS = 2


@pytest.fixture(scope="module")
def tokenizer(client: openai.OpenAI) -> Tokenizer:
    """The server's, found where its model card says."""
    (model,) = client.models.list().data
    return Tokenizer.load(Path(model.root), 4096)  # type: ignore[attr-defined]


def test_completion(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, **GREEDY)
    assert completion.object == "text_completion"
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].text
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 8
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 8


def test_completion_streams_the_same_text(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, **GREEDY)
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_prompts_are_texts_or_ids_or_lists_of_either(client: openai.OpenAI, http: httpx.Client) -> None:
    def texts(prompt: Any) -> list[str]:
        choices = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, **GREEDY).choices
        assert [choice.index for choice in choices] == list(range(len(choices)))
        return [choice.text for choice in choices]

    one, other = texts(PROMPT) + texts([260, 261])
    assert texts([PROMPT]) == [one]
    assert texts([[260, 261]]) == [other]
    assert texts([PROMPT, [260, 261], PROMPT]) == [one, other, one]


def test_many_prompts_stream_side_by_side(client: openai.OpenAI) -> None:
    prompts = [PROMPT, "It was", "The"]
    whole = client.completions.create(model="tiny", prompt=prompts, max_tokens=8, **GREEDY)
    texts = ["", "", ""]
    for chunk in client.completions.create(model="tiny", prompt=prompts, max_tokens=8, stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


def test_chat(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, **GREEDY)
    assert chat.object == "chat.completion"
    assert (chat.choices[0].message.role, chat.choices[0].finish_reason) == ("assistant", "length")
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}]
    same = client.chat.completions.create(model="tiny", messages=parts, max_completion_tokens=8, **GREEDY)
    assert same.choices[0].message.content == chat.choices[0].message.content
    assert same.usage and chat.usage
    assert same.usage.total_tokens == chat.usage.total_tokens


def test_a_chat_streams_role_and_first_content_in_one_chunk(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, **GREEDY)
    *chunks, usage = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=8, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].choices[0].delta.content
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert usage.choices == []
    assert usage.usage and whole.usage
    assert usage.usage.total_tokens == whole.usage.total_tokens


def test_streams_end_with_done_and_hold_nothing_else(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, done = events(response)
    assert done == "[DONE]"
    assert all(json.loads(chunk)["object"] == "text_completion" for chunk in chunks)


def test_the_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, seed=seed).choices[0].text

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(1, 5)}) > 1


def test_top_k_and_top_p_of_one_choice_are_greedy(client: openai.OpenAI) -> None:
    def text(**sampling: Any) -> str:
        return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, **sampling).choices[0].text

    assert text(temperature=0) == text(extra_body={"top_k": 1}) == text(top_p=1e-6)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_itself(client: openai.OpenAI, stream: bool) -> None:
    text = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, **GREEDY).choices[0].text
    stop = text[5:9]
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, stop=[stop, "\0"], stream=stream, **GREEDY
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]  # type: ignore[union-attr]
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_fields_that_change_nothing_are_welcome(client: openai.OpenAI) -> None:
    neutral = {"stop": None, "n": 1, "presence_penalty": 0, "logprobs": None, "logit_bias": {}, "user": "me"}
    extra = {"best_of": 1, "min_p": 0, "repetition_penalty": 1.0, "unheard_of": [1]}
    completion = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=2, extra_body=extra, **neutral)  # type: ignore[call-overload]
    assert completion.choices[0].finish_reason


# Choices


def test_each_choice_is_the_answer_to_a_seed_of_its_own(client: openai.OpenAI) -> None:
    def texts(**fields: Any) -> list[str]:
        completion = client.completions.create(model="tiny", max_tokens=12, **fields)
        assert [choice.index for choice in completion.choices] == list(range(len(completion.choices)))
        return [choice.text for choice in completion.choices]

    of_first = texts(prompt=PROMPT, seed=7, n=3, extra_body={"best_of": 3})
    assert of_first == [text for seed in (7, 8, 9) for text in texts(prompt=PROMPT, seed=seed)]
    assert len(set(of_first)) > 1
    last = 2**63 - 1
    assert texts(prompt=PROMPT, seed=last, n=2)[1:] == texts(prompt=PROMPT, seed=0)
    assert texts(prompt=[PROMPT, "It was"], seed=7, n=3) == of_first + texts(prompt="It was", seed=7, n=3)


def test_choices_stream_side_by_side_and_the_prompt_is_counted_once(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 10, "seed": 3, "n": 3}
    whole = client.chat.completions.create(**fields)
    alone = client.chat.completions.create(**fields | {"n": 1})
    assert whole.usage and alone.usage
    assert whole.usage.prompt_tokens == alone.usage.prompt_tokens
    assert whole.usage.completion_tokens == 30
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(stream=True, **fields):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


# Which tokens may come, and which end an answer


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The one choice of a greedy completion."""
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True} | fields
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return dict(choice)


def test_logit_bias_makes_a_token_the_only_one(http: httpx.Client) -> None:
    assert complete(http, logit_bias={"300": 100}, ignore_eos=True)["token_ids"] == [300] * 12


@pytest.mark.parametrize("penalty", [{"presence_penalty": 2}, {"frequency_penalty": 2}, {"repetition_penalty": 1.5}])
def test_penalties_make_answers_repeat_themselves_less(http: httpx.Client, penalty: dict[str, float]) -> None:
    def distinct(**fields: Any) -> int:
        return len(set(complete(http, max_tokens=80, ignore_eos=True, **fields)["token_ids"]))

    assert distinct(**penalty) > distinct()


def test_min_p_of_one_is_greedy(http: httpx.Client) -> None:
    greedy = complete(http, ignore_eos=True)
    assert complete(http, temperature=1, min_p=1, ignore_eos=True)["token_ids"] == greedy["token_ids"]


def test_a_stop_token_ends_the_answer_and_is_not_shown(http: httpx.Client, tokenizer: Tokenizer) -> None:
    whole = complete(http, ignore_eos=True)
    stop = whole["token_ids"][5]
    end = whole["token_ids"].index(stop)
    cut = complete(http, ignore_eos=True, stop_token_ids=[stop])
    assert cut["token_ids"] == whole["token_ids"][: end + 1]
    assert (cut["text"], cut["finish_reason"]) == (tokenizer.decode(cut["token_ids"][:-1]), "stop")
    shown = complete(http, ignore_eos=True, stop_token_ids=[stop], include_stop_str_in_output=True)
    assert shown["text"] == tokenizer.decode(cut["token_ids"])
    late = complete(http, ignore_eos=True, stop_token_ids=[stop], min_tokens=12)
    assert len(late["token_ids"]) == 12


def test_a_stop_string_is_shown_to_who_asks_for_it(http: httpx.Client) -> None:
    text = complete(http, ignore_eos=True)["text"]
    stop = text[5:9]
    shown = complete(http, ignore_eos=True, stop=[stop], include_stop_str_in_output=True)
    assert shown["text"] == text[: text.index(stop)] + stop


@pytest.mark.parametrize("floor", [0, 3, 8])
def test_no_stop_string_ends_an_answer_before_min_tokens(http: httpx.Client, tokenizer: Tokenizer, floor: int) -> None:
    whole = complete(http, ignore_eos=True)
    early = tokenizer.decode(whole["token_ids"][:floor])
    late = complete(http, ignore_eos=True, stop=" ", min_tokens=floor)
    assert late["text"] == whole["text"][: whole["text"].index(" ", len(early))]
    assert late["finish_reason"] == "stop"


def test_special_tokens_are_shown_to_who_asks_for_them(http: httpx.Client) -> None:
    ends = {"logit_bias": {str(EOS): 100}, "max_tokens": 2}
    assert (complete(http, **ends)["text"], complete(http, **ends)["token_ids"]) == ("", [EOS])
    assert complete(http, ignore_eos=True, **ends)["text"] == ""
    assert complete(http, ignore_eos=True, skip_special_tokens=False, **ends)["text"] == "<|im_end|>" * 2


# What an answer must look like

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Anne", "Emma"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "field",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA, "strict": True}}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
    ],
    ids=["response_format", "guided_json", "guided_json as text", "structured_outputs"],
)
@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_follows_its_schema(client: openai.OpenAI, field: dict[str, Any], n: int) -> None:
    chat = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1000, n=n, extra_body=field)
    for choice in chat.choices:
        assert choice.finish_reason == "stop"
        person = json.loads(choice.message.content or "")
        assert person["name"] in ("Anne", "Emma")
        assert 0 <= person["age"] <= 99


def test_an_answer_follows_its_regex_or_is_one_of_the_choices(http: httpx.Client) -> None:
    for regex in ({"guided_regex": "(ab){3}!"}, {"structured_outputs": {"regex": "(ab){3}!"}}):
        assert complete(http, **regex)["text"] == "ababab!"
    for choice in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
        assert complete(http, **choice)["text"] in ("yes", "no")


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=40, response_format={"type": "json_object"}, seed=1
    )
    assert (chat.choices[0].message.content or "").startswith("{")


# How likely the tokens were


def test_the_greedy_token_s_number_is_the_best_of_its_alternatives(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, logprobs=3, **GREEDY)
    choice = completion.choices[0]
    told = choice.logprobs
    assert told and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
    assert "".join(told.tokens) == choice.text
    for token, number, top, offset in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset, strict=True
    ):
        assert len(top) == 3
        assert top[token] == number == max(top.values())
        assert choice.text[offset:].startswith(token)


def test_who_draws_an_unlikely_token_still_finds_it_among_the_alternatives(client: openai.OpenAI) -> None:
    completion = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, logprobs=1, temperature=2, seed=1, extra_body={"ignore_eos": True}
    )
    told = completion.choices[0].logprobs
    assert told and told.tokens and told.token_logprobs and told.top_logprobs
    assert {len(top) for top in told.top_logprobs} == {1, 2}
    for token, number, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == number <= max(top.values()) < 0


@pytest.mark.parametrize("logprobs", [0, 1, 5])
def test_echo_tells_the_prompt_s_numbers_as_lm_eval_reads_them(http: httpx.Client, logprobs: int) -> None:
    """lm-evaluation-harness: a prompt of ids, one token more, everything but that one read."""
    ids = [400, 401, 402, 403, 404]
    choice = complete(http, prompt=ids, max_tokens=1, echo=True, logprobs=logprobs, seed=1234)
    told = choice["logprobs"]
    assert {len(column) for column in told.values()} == {6}
    assert (told["token_logprobs"][0], told["top_logprobs"][0]) == (None, None)
    assert choice["text"] == "".join(told["tokens"])
    for number, top, token in zip(
        told["token_logprobs"][1:], told["top_logprobs"][1:], told["tokens"][1:], strict=True
    ):
        assert top[token] == number
        assert len(top) in (max(1, logprobs), logprobs + 1)
    # What follows ids 0 to i is as likely as the prompt, cut there, says of its next token.
    for cut in range(1, len(ids)):
        shorter = complete(http, prompt=ids[:cut], max_tokens=1, echo=True, logprobs=logprobs)
        assert shorter["logprobs"]["token_logprobs"][1:cut] == pytest.approx(told["token_logprobs"][1:cut], abs=1e-4)


def test_an_answer_that_ends_at_once_still_has_its_number(http: httpx.Client) -> None:
    choice = complete(http, max_tokens=1, logprobs=1, echo=True, logit_bias={str(EOS): 100})
    told = choice["logprobs"]
    assert choice["token_ids"] == [EOS]
    assert (choice["finish_reason"], told["tokens"][-1]) == ("stop", "<|im_end|>")
    assert told["top_logprobs"][-1]["<|im_end|>"] == told["token_logprobs"][-1] < 0
    assert len(told["tokens"]) == len(choice["prompt_token_ids"]) + 1


def test_echo_without_numbers_is_the_prompt_s_text(http: httpx.Client, tokenizer: Tokenizer) -> None:
    answer = complete(http, ignore_eos=True)
    assert complete(http, ignore_eos=True, echo=True)["text"] == PROMPT + answer["text"]
    ids = tokenizer.encode(PROMPT)
    assert complete(http, ignore_eos=True, echo=True, prompt=ids)["text"] == PROMPT + answer["text"]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_streams_carry_the_same_numbers(http: httpx.Client, echo: bool, n: int) -> None:
    body = {"prompt": "naïve 😀", "max_tokens": 16, "logprobs": 2, "seed": 5, "temperature": 3, "ignore_eos": True}
    body |= {"n": n, "echo": echo}
    whole = http.post("/v1/completions", json=body).json()["choices"]
    texts, columns = [""] * n, [dict.fromkeys(whole[0]["logprobs"], ()) for _ in range(n)]
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        *chunks, _ = events(response)
    for chunk in chunks:
        (part,) = json.loads(chunk)["choices"]
        texts[part["index"]] += part["text"]
        for name, column in part["logprobs"].items():
            columns[part["index"]][name] += tuple(column)
    for choice, text, told in zip(whole, texts, columns, strict=True):
        assert text == choice["text"]
        assert told["tokens"] == tuple(choice["logprobs"]["tokens"])
        assert told["text_offset"] == tuple(choice["logprobs"]["text_offset"])
        assert told["token_logprobs"][1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-4)


def test_a_chat_tells_bytes_too(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=12, logprobs=True, top_logprobs=2, **GREEDY
    )
    assert chat.choices[0].logprobs and chat.choices[0].logprobs.content
    said = b""
    for entry in chat.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        said += bytes(entry.bytes or [])
    assert said.decode() == chat.choices[0].message.content


def test_prompt_logprobs_as_vllm_spells_them(http: httpx.Client) -> None:
    ids = [400, 401, 402]
    choice = complete(http, prompt=ids, prompt_logprobs=2)
    assert choice["prompt_token_ids"] == ids
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    for token_id, entry in zip(ids[1:], rest, strict=True):
        assert {told["rank"] for told in entry.values()} >= {1, 2}
        assert str(token_id) in entry
    echoed = complete(http, prompt=ids, echo=True, logprobs=0)["logprobs"]["token_logprobs"]
    told = [entry[str(token_id)]["logprob"] for token_id, entry in zip(ids[1:], rest, strict=True)]
    assert told == pytest.approx(echoed[1:3], abs=1e-4)


# Usage


def test_prefix_hits_are_told_and_shared_by_salt(http: httpx.Client) -> None:
    def cached(salt: str) -> int:
        body = {"prompt": [300] * 300, "max_tokens": 1, "cache_salt": salt}
        usage = http.post("/v1/completions", json=body).json()["usage"]
        assert usage["prompt_tokens"] == 300
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("one") == 0
    assert 200 < cached("one") < 300
    assert cached("another") == 0


@pytest.mark.parametrize("include", [False, True])
def test_usage_comes_as_it_is_asked_for(http: httpx.Client, include: bool) -> None:
    options = {"include_usage": include, "continuous_usage_stats": True}
    body = {"prompt": PROMPT, "max_tokens": 6, "ignore_eos": True, "stream": True, "stream_options": options}
    with http.stream("POST", "/v1/completions", json=body) as response:
        *chunks, done = map(json.loads, events(response)[:-1]), "[DONE]"
    chunks = list(chunks[0])
    last = chunks.pop() if include else chunks[-1]
    assert (last["choices"] == []) is include
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"] == 6
    assert done


# Tools

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


# Text of tokens


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


# What clients are known to send


@pytest.mark.parametrize(
    ("route", "body"),
    [
        (  # langchain-openai
            "/v1/chat/completions",
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "name": "me", "content": [{"type": "text", "text": "Hello"}]},
                    {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [], "audio": None},
                    {"role": "user", "content": "Who are you?"},
                ],
                "model": "tiny",
                "max_completion_tokens": 2,
                "n": 1,
                "logit_bias": None,
                "stop": None,
                "stream": False,
                "temperature": 0.7,
                "tool_choice": None,
            },
        ),
        (  # litellm
            "/v1/chat/completions",
            {
                "model": "tiny",
                "messages": MESSAGES,
                "max_tokens": 2,
                "frequency_penalty": 0,
                "presence_penalty": 0,
                "top_p": 1,
                "user": "someone",
                "extra_headers": {},
                "metadata": {"trace": "1"},
            },
        ),
        (  # lm_eval --model local-completions, loglikelihood and generate_until
            "/v1/completions",
            {
                "model": "tiny",
                "prompt": [[300, 301, 302]],
                "temperature": 0,
                "max_tokens": 1,
                "logprobs": 1,
                "seed": 1234,
                "echo": True,
            },
        ),
        (
            "/v1/completions",
            {
                "model": "tiny",
                "prompt": [PROMPT],
                "max_tokens": 2,
                "temperature": 0,
                "stop": ["\n\n", "<|im_end|>"],
                "seed": 1234,
            },
        ),
        (  # vllm bench serve
            "/v1/completions",
            {
                "model": "tiny",
                "prompt": PROMPT,
                "max_tokens": 2,
                "repetition_penalty": 1.0,
                "temperature": 0.0,
                "logprobs": None,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
        (  # sglang.bench_serving --backend sglang-oai, and sglang
            "/v1/completions",
            {
                "model": "tiny",
                "prompt": PROMPT,
                "temperature": 0.0,
                "best_of": 1,
                "max_tokens": 2,
                "stream": True,
                "ignore_eos": True,
            },
        ),
        (
            "/generate",
            {
                "text": PROMPT,
                "sampling_params": {"temperature": 0.0, "max_new_tokens": 2, "ignore_eos": True},
                "stream": True,
                "lora_path": None,
                "return_logprob": False,
                "logprob_start_len": -1,
            },
        ),
    ],
    ids=["langchain", "litellm", "lm_eval scores", "lm_eval writes", "vllm", "sglang-oai", "sglang"],
)
def test_what_clients_send_is_taken(http: httpx.Client, route: str, body: dict[str, Any]) -> None:
    response = http.post(route, json=body)
    assert response.status_code == 200, response.text


# More than the server takes


def test_who_comes_to_a_full_queue_is_told_to_try_later() -> None:
    options = ["--kv-cache-memory", "64MiB", "--max-num-seqs", "1", "--max-queue", "1"]
    with serving(*options) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        long = {"prompt": [PROMPT, PROMPT], "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=long) as response:
            lines = response.iter_lines()
            next(lines)
            refused = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert fault(refused)["code"] == "queue_full"
        many = http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 1, "n": 3})
        assert (many.status_code, fault(many)["param"]) == (400, "n")  # there will never be room for three
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=5) as client:
            assert client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1).choices


def test_an_unknown_field_is_told_of_once() -> None:
    with serving("--kv-cache-memory", "64MiB") as server:
        for _ in range(2):
            body = {"prompt": PROMPT, "max_tokens": 1, "unheard_of": [1], "line\nbreak": 1, "nothing": None}
            assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        server.process.terminate()
        _, stderr = server.end()
    told = [line for line in stderr.splitlines() if "unknown" in line]
    assert [word in line for word, line in zip(("'unheard_of'", "'line\\nbreak'"), told, strict=True)] == [True, True]
