"""What no client should send: refused with a 400 that names the field, and of no consequence to anybody else."""

import json
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from conftest import MESSAGES, PROMPT, ServerProcess, fault

LONG = {"prompt": [260] * 2048}
BAD = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [PROMPT, ""]}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**6]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({}, "prompt"),
    (LONG, "prompt"),
    ({"prompt": [PROMPT] * 1025}, "prompt"),
    ({"prompt": [[260]] * 1025}, "prompt"),
    ({"prompt": "a" * 10**6}, "prompt"),
    ({"prompt": [PROMPT, "a" * 10**6]}, "prompt"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": 2048}, "max_tokens"),
    ({"max_tokens": 2**63}, "max_tokens"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -5}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": 2**64}, "seed"),
    ({"stop": [""]}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 1025}, "stop"),
    ({"stream": "yes"}, "stream"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stop": ["a"] * 10**5}, "stop"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 10**6}, "n"),
    ({"n": 100, "prompt": [PROMPT] * 11}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"echo": "yes"}, "echo"),
    ({"suffix": "the end"}, "suffix"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"min_p": 1.1}, "min_p"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"1": float("nan")}}, "logit_bias"),
    ({"logit_bias": {"1": "1"}}, "logit_bias"),
    ({"logit_bias": {"4096": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"the": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"stop_token_ids": [4096]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 17}, "min_tokens"),
    ({"min_tokens": 3, "max_tokens": 2}, "min_tokens"),
    ({"bad_words": ["bad"]}, "bad_words"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "a" * 257}, "cache_salt"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nope"}}}}, "response_format"),
    ({"guided_json": {"$ref": "#"}}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": {"enum": ["a" * 10**6]}}, "guided_json"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_regex": "(?=a)b"}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_grammar": "root ::= x"}, "guided_grammar"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "field"), BAD, ids=lambda value: json.dumps(value)[:40])
def test_a_bad_field_is_a_400_that_names_it(http: httpx.Client, body: dict[str, Any], field: str, stream: bool) -> None:
    prompt = {} if field == "prompt" else {"prompt": PROMPT}
    # Python's json writes NaN and Infinity, which JSON does not have, as clients in Python do.
    response = http.post("/v1/completions", content=json.dumps(prompt | {"stream": stream} | body))
    assert response.status_code == 400
    error = fault(response)
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"text"', "{'prompt': 'a'}", "[" * 100_000, "\xff", "prompt=a"]
)
def test_a_body_that_is_no_json_object_is_a_400(http: httpx.Client, content: str) -> None:
    for route in ("/v1/completions", "/v1/chat/completions", "/generate"):
        response = http.post(route, content=content.encode("latin-1"))
        assert response.status_code == 400
        fault(response)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "hello"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
        ({"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": 1}}]}, "tools"),
        ({"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}] * 1025}, "tools"),
        ({"messages": MESSAGES, "tool_choice": "required"}, "tool_choice"),
        ({"messages": MESSAGES, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"messages": MESSAGES, "functions": [{"name": "f"}]}, "functions"),
        ({"messages": MESSAGES, "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"messages": MESSAGES, "logprobs": 1}, "logprobs"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        ({"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": MESSAGES, "audio": {"voice": "alloy"}}, "audio"),
        ({"messages": MESSAGES, "modalities": ["text", "audio"]}, "modalities"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "tool_calls": "f()"}]}, "messages.0.tool_calls"),
        ({"messages": MESSAGES, "max_completion_tokens": 10**5}, "max_completion_tokens"),
        ({"messages": MESSAGES, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": MESSAGES, "max_tokens": 10**5}, "max_tokens"),
        ({"messages": MESSAGES * 2000}, "messages"),
        ({"messages": MESSAGES * 20_000}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 10**6}]}, "messages"),
    ],
)
def test_a_bad_chat_is_a_400_that_names_the_field(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert fault(response)["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [260]}, "text"),
        ({"text": "a", "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
        ({"text": "a", "sampling_params": {"max_new_tokens": -1}}, "sampling_params.max_new_tokens"),
        ({"text": "a", "sampling_params": {"regex": "a("}}, "sampling_params.regex"),
        ({"text": "a", "sampling_params": {"json_schema": "{"}}, "sampling_params.json_schema"),
        ({"text": "a", "sampling_params": {"ebnf": "root ::= x"}}, "sampling_params.ebnf"),
        ({"text": "a", "sampling_params": {"min_new_tokens": 129}}, "sampling_params.min_new_tokens"),
        ({"text": "a", "rid": ["a", "b"]}, "rid"),
        ({"text": "a", "rid": ""}, "rid"),
        ({"text": "a", "rid": 1}, "rid"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 5000}}, "sampling_params.max_new_tokens"),
        ({"text": ""}, "text"),
        ({"text": "a" * 10**6}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [10**6]}, "input_ids"),
    ],
)
def test_a_bad_generate_is_a_400_that_names_the_field(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/generate", json=body)
    assert response.status_code == 400
    assert fault(response)["param"] == param


@pytest.mark.parametrize(
    ("body", "param", "instead"),
    [
        ({"sampling_params": {"max_tokens": 2}}, "sampling_params.max_tokens", "sampling_params.max_new_tokens"),
        ({"max_tokens": 2}, "max_tokens", "sampling_params.max_new_tokens"),
        ({"max_new_tokens": 2}, "max_new_tokens", "sampling_params.max_new_tokens"),
        ({"temperature": 0}, "temperature", "sampling_params.temperature"),
    ],
)
def test_a_misplaced_field_is_a_400_that_says_where_it_belongs(
    http: httpx.Client, body: dict[str, Any], param: str, instead: str
) -> None:
    response = http.post("/generate", json={"text": "a"} | body)
    assert response.status_code == 400
    error = fault(response)
    assert (error["param"], error["message"]) == (param, f"{param}: is not supported; send {instead}")


@pytest.mark.parametrize(
    ("content", "cause"),
    [(b'{"prompt": "\xff"}', "UTF-8"), (b"[" * 10_000, "nested"), (b"[" + b"1" * 5000 + b"]", "digits")],
    ids=["no UTF-8", "deep", "long integer"],
)
def test_a_body_that_cannot_be_read_is_a_400_that_says_why(http: httpx.Client, content: bytes, cause: str) -> None:
    response = http.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert cause in fault(response)["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "messages: is missing"),
        ([], "the body: should be an object; send a JSON object"),
        ({"messages": []}, "messages: is empty; got []"),
        ({"messages": ["hello"]}, "messages.0: should be an object; got 'hello'"),
    ],
)
def test_errors_do_not_speak_of_python(http: httpx.Client, body: Any, message: str) -> None:
    assert fault(http.post("/v1/chat/completions", json=body))["message"] == message


def test_what_exceeds_the_context_has_openai_s_code(http: httpx.Client) -> None:
    bodies = [{"prompt": [260] * 2048}, {"prompt": "a" * 10**6}, {"prompt": PROMPT, "max_tokens": 2048}]
    for body in bodies:
        assert fault(http.post("/v1/completions", json=body))["code"] == "context_length_exceeded"


@pytest.mark.parametrize("field", ["prompt", "stop"])
def test_too_many_items_are_refused_before_any_is_read(http: httpx.Client, field: str) -> None:
    response = http.post("/v1/completions", json={"prompt": PROMPT} | {field: [[""]] * 2000})
    assert response.status_code == 400
    assert "2000" in fault(response)["message"]


def test_lone_surrogates_are_no_text(http: httpx.Client) -> None:
    bodies = {
        "/v1/completions": '{"prompt": "\\ud800"}',
        "/generate": '{"text": "\\ud800"}',
        "/v1/chat/completions": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    }
    for route, body in bodies.items():
        assert http.post(route, content=body).status_code == 400
    chat: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 1}
    for field in (
        {"stop": "\ud800"},
        {"guided_choice": ["\ud800"]},
        {"guided_regex": "\ud800"},
        {"guided_json": {"const": "\ud800"}},
        {"cache_salt": "\ud800"},
        {"chat_template_kwargs": {"\ud800": 1}},
        {"tools": [{"type": "function", "function": {"name": "\ud800"}}]},
        {"messages": [{"role": "user", "content": "a", "name": "\ud800"}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "\ud800"}}]}]},
    ):
        assert http.post("/v1/chat/completions", content=json.dumps(chat | field)).status_code == 400, field
    assert http.post("/generate", content='{"text": "a", "rid": "\\ud800"}').status_code == 400


def test_other_models_and_routes_are_a_404(client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    for path in ("/v2/completions", "//v1/models"):  # a base URL that ends in a slash makes the second
        response = http.get(f"{http.base_url}".rstrip("/") + path)
        assert response.status_code == 404
        assert path in fault(response)["message"]


def test_a_body_without_end_is_not_read(http: httpx.Client) -> None:
    response = http.post("/generate", content=b'{"text": "' + b"a" * 17 * 2**20)
    assert response.status_code == 413
    fault(response)


def test_nul_is_a_character_like_any_other(http: httpx.Client) -> None:
    body = {"prompt": "a\0b", "stop": ["\0"], "max_tokens": 2, "echo": True, "cache_salt": "\0"}
    answer = http.post("/v1/completions", json=body)
    assert answer.json()["choices"][0]["text"].startswith("a\0b")
    chat = {"messages": [{"role": "user", "content": "\0"}], "max_tokens": 3, "guided_choice": ["\0"]}
    assert http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"] == "\0"
    assert http.post("/generate", json={"text": "\0"}).status_code == 200


@pytest.mark.parametrize("regex", ["(a+)+$", "(x+x+)+y", "(a{1000}){1000}", "(a|aa)+", "(.*a){20}", "[ab]*[ab]*[ab]*c"])
def test_a_regex_that_stalls_others_does_not_stall_this(http: httpx.Client, regex: str) -> None:
    """Or is refused; either way soon."""
    started = time.perf_counter()
    body = {"prompt": PROMPT, "max_tokens": 16, "guided_regex": regex, "ignore_eos": True}
    assert http.post("/v1/completions", json=body).status_code in (200, 400)
    assert time.perf_counter() - started < 10


def test_bad_bodies_change_nothing_for_others(http: httpx.Client, server: ServerProcess) -> None:
    """A stream is the same, byte for byte, while all of the above come in, and 10 MB of it."""
    body = {"prompt": PROMPT, "max_tokens": 600, "ignore_eos": True, "stream": True, "seed": 1}

    def told(others: Callable[[], None]) -> list[Any]:
        with http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            chunks = [next(lines)]
            others()
            chunks += [line for line in lines if line]
        return [json.loads(chunk.removeprefix("data: "))["choices"] for chunk in chunks[:-1]]

    def misbehave() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as another:
            for bad, field in BAD:
                content = json.dumps(({} if field == "prompt" else {"prompt": PROMPT}) | bad)
                assert another.post("/v1/completions", content=content).status_code == 400
            for large in ("a" * 10**7, [260] * 2 * 10**6, [[260]] * 10**6, {"a": ["b"] * 10**6}):
                assert another.post("/v1/completions", json={"prompt": large}).status_code in (400, 413)
            assert another.post("/v1/completions", content="[" * 10_000 + "]" * 10_000).status_code == 400

    assert told(misbehave) == told(lambda: None)
