"""The server as clients see it: a real process, over HTTP, with the real `openai` client."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import ServerProcess, children, kvtool, serving

from kvtool.errors import ModelError
from kvtool.server.generation import Defaults, read_model_defaults

PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "extra_body": {"ignore_eos": True}}
MESSAGES: Any = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def events(response: httpx.Response) -> list[str]:
    """Data of the events of a stream; there must be nothing else in it."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def test_the_card_says_what_runs_and_what_to_try(server: ServerProcess) -> None:
    assert f"tiny at {server.url}" in server.card
    assert "4 bits" in server.card
    assert "at 16 bits an element" in server.card
    command = next(line for line in server.card.splitlines() if "curl" in line).strip().removeprefix("try").strip()
    done = subprocess.run(command, shell=True, capture_output=True, timeout=60)
    assert json.loads(done.stdout)["meta_info"]["completion_tokens"] > 0


def test_only_the_engine_has_a_process_of_its_own(server: ServerProcess) -> None:
    assert len(children(server.process.pid)) == 1


def test_health(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "kvtool")
    assert client.models.retrieve("tiny") == model
    assert (Path(model.root) / "tokenizer.json").exists()  # type: ignore[attr-defined]


# OpenAI's routes


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
    assert same.usage == chat.usage


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
    assert (usage.choices, usage.usage) == ([], whole.usage)


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


# SGLang's route


def test_generate_takes_what_curl_sends(server: ServerProcess) -> None:
    body = '{"text": "你好", "sampling_params": {"temperature": 0}}'
    done = subprocess.run(["curl", "-sf", f"{server.url}/generate", "-d", body], capture_output=True, timeout=60)
    answer = json.loads(done.stdout)
    assert set(answer) == {"text", "output_ids", "meta_info"}
    meta = answer["meta_info"]
    assert meta["completion_tokens"] == len(answer["output_ids"]) <= 128
    assert meta["finish_reason"]["type"] in ("length", "stop")
    assert meta["prompt_tokens"] > 0


def test_generate_streams_the_text_so_far(http: httpx.Client) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    whole = http.post("/generate", json={"text": PROMPT, "sampling_params": sampling}).json()
    body = {"text": PROMPT, "sampling_params": sampling, "stream": True}
    with http.stream("POST", "/generate", json=body) as response:
        *chunks, done = events(response)
    assert done == "[DONE]"
    texts = [json.loads(chunk)["text"] for chunk in chunks]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    assert texts[-1] == whole["text"]
    assert json.loads(chunks[0])["meta_info"]["finish_reason"] is None
    assert json.loads(chunks[-1])["meta_info"]["finish_reason"] == {"type": "length", "length": 12}


def test_generate_takes_ids_and_lists(http: httpx.Client) -> None:
    def post(**prompt: Any) -> Any:
        sampling = {"temperature": 0, "max_new_tokens": 4}
        return http.post("/generate", json=prompt | {"sampling_params": sampling}).json()

    one = post(input_ids=[260, 261])
    assert one["meta_info"]["prompt_tokens"] == 2
    both = post(input_ids=[[260, 261], [262]])
    assert both[0]["output_ids"] == one["output_ids"]
    assert [answer["text"] for answer in post(text=[PROMPT])] == [post(text=PROMPT)["text"]]


def test_generate_says_what_stopped_it(http: httpx.Client) -> None:
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 24}
    text = http.post("/generate", json={"text": PROMPT, "sampling_params": sampling}).json()["text"]
    body = {"text": PROMPT, "sampling_params": sampling | {"stop": text[3:6]}}
    assert http.post("/generate", json=body).json()["meta_info"]["finish_reason"] == {
        "type": "stop",
        "matched": text[3:6],
    }


# Bad input

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
    ({"n": 2}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"echo": True}, "echo"),
    ({"logprobs": 0}, "logprobs"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"1": 1}}, "logit_bias"),
]


def fault(response: httpx.Response) -> dict[str, Any]:
    """The error object of a response that refuses."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    return error


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
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": MESSAGES, "logprobs": True}, "logprobs"),
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
        ({"text": "a", "sampling_params": {"regex": "a+"}}, "sampling_params.regex"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 5000}}, "sampling_params.max_new_tokens"),
        ({"text": ""}, "text"),
        ({"text": "a" * 10**6}, "text"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [10**6]}, "input_ids"),
        ({"text": "a", "return_logprob": True}, "return_logprob"),
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
    [(b'{"prompt": "\xff"}', "UTF-8"), (b"[" * 100_000, "nested too deep"), (b"[" + b"1" * 5000 + b"]", "digits")],
    ids=["no UTF-8", "deep", "long integer"],
)
def test_a_body_that_cannot_be_read_is_a_400_that_says_why(http: httpx.Client, content: bytes, cause: str) -> None:
    response = http.post("/v1/completions", content=content)
    assert response.status_code == 400
    assert cause in fault(response)["message"]


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


def test_other_models_and_routes_are_a_404(client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-4", prompt=PROMPT)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    response = http.get("/v2/completions")
    assert response.status_code == 404
    fault(response)


def test_a_body_without_end_is_not_read(http: httpx.Client) -> None:
    response = http.post("/generate", content=b'{"text": "' + b"a" * 17 * 2**20)
    assert response.status_code == 413
    fault(response)


def test_bad_requests_leave_the_engine_well(http: httpx.Client) -> None:
    answer = http.post("/generate", json={"text": PROMPT, "sampling_params": {"max_new_tokens": 4}})
    assert answer.status_code == 200


# Clients that leave


def long_answer(stream: bool) -> dict[str, Any]:
    return {"prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": stream}


def test_who_leaves_makes_room(http: httpx.Client, server: ServerProcess) -> None:
    """The server runs two requests at once; four forgotten ones of 1,500 tokens would block it for long."""

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}
        assert http.post("/v1/completions", json=body).status_code == 200
        return time.perf_counter() - started

    hundred = seconds(100)

    async def leave(stream: bool) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            if stream:
                async with client.stream("POST", "/v1/completions", json=long_answer(stream)) as response:
                    await anext(response.aiter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/v1/completions", json=long_answer(stream), timeout=1)

    async def leave_all() -> None:
        await asyncio.gather(leave(False), leave(False))
        await asyncio.gather(leave(True), leave(True))

    asyncio.run(leave_all())
    assert seconds(1) < 5 * hundred


# Life and death


def test_a_dead_engine_ends_its_streams_and_the_server() -> None:
    with serving("--nbits", "4", "--kv-cache-memory", "64MiB", "--served-model-name", "mine") as server:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            assert http.get("/v1/models").json()["data"][0]["id"] == "mine"
            body = long_answer(True) | {"model": "mine"}
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                os.kill(server.engine, signal.SIGKILL)
                rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert "data: [DONE]" not in rest
        status, stderr = server.end()
    assert status == 2
    assert stderr.splitlines()[-1].startswith("error: the engine ended")
    assert "Traceback" not in stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_all_processes_also_while_loading(number: signal.Signals, status: int) -> None:
    process = kvtool("serve", "--port", "0")
    assert process.stderr is not None
    assert process.stderr.readline() == "loading tiny ...\n"
    while not children(process.pid):
        time.sleep(0.05)
    (engine,) = children(process.pid)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (status, "")
    assert not Path(f"/proc/{engine}").exists()


def test_a_card_that_nobody_reads_ends_no_server() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = kvtool("serve", "--port", str(port), "--kv-cache-memory", "64MiB", stdout=writer)
    os.close(writer)
    while process.poll() is None:
        with suppress(httpx.TransportError):
            assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.1)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "loading tiny ...\n")


def test_sigterm_lets_a_short_answer_finish() -> None:
    with serving("--kv-cache-memory", "64MiB") as server:
        engine = server.engine
        body = {"prompt": PROMPT, "max_tokens": 40, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.end() == (0, "loading tiny ...\n")
        assert not Path(f"/proc/{engine}").exists()


# What the model's folder says


def test_sampling_defaults_are_the_model_s(tmp_path: Path) -> None:
    assert read_model_defaults(tmp_path) == Defaults(1.0, 1.0, 0)
    file = tmp_path / "generation_config.json"
    file.write_text('{"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}')
    assert read_model_defaults(tmp_path) == Defaults(0.7, 1.0, 20)
    file.write_text('{"temperature": "warm"}')
    with pytest.raises(ModelError, match=r"generation_config.json.*temperature"):
        read_model_defaults(tmp_path)
    file.write_text("[" * 100_000)
    with pytest.raises(ModelError, match=r"generation_config.json"):
        read_model_defaults(tmp_path)
