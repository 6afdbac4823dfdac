"""OpenAI's routes, asked by its own client, and by what others are known to send."""

import json
from typing import Any

import httpx
import openai
import pytest
from conftest import EOS, GREEDY, MESSAGES, PROMPT, complete, events, fault, serving

from kvtool.tokenizer import Tokenizer


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
