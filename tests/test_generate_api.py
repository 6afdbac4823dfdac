"""SGLang's `/generate`, as its clients use it."""

import json
import subprocess
import threading
from itertools import pairwise
from typing import Any

import httpx
import pytest
from conftest import PROMPT, ServerProcess, events, fault


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


def test_generate_numbers_its_choices(http: httpx.Client) -> None:
    def ids(**sampling: Any) -> Any:
        body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 6, "ignore_eos": True} | sampling}
        answer = http.post("/generate", json=body | {"rid": f"choices-{sampling}"}).json()
        return [part["output_ids"] for part in answer] if isinstance(answer, list) else answer["output_ids"]

    assert ids(n=2, seed=4) == [ids(seed=4), ids(seed=5)]


@pytest.mark.parametrize("top", [0, 2])
def test_generate_tells_how_likely_tokens_were(http: httpx.Client, top: int) -> None:
    def meta(start: int | None, **more: Any) -> Any:
        sampling = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
        body = {"input_ids": [400, 401, 402, 403], "sampling_params": sampling, "return_logprob": True}
        answer = http.post("/generate", json=body | {"top_logprobs_num": top, "logprob_start_len": start} | more).json()
        assert [token_id for _, token_id, _ in answer["meta_info"]["output_token_logprobs"]] == answer["output_ids"]
        return answer["meta_info"]

    whole = meta(0)
    assert whole["input_token_logprobs"][0] == [None, 400, None]
    assert [token_id for _, token_id, _ in whole["input_token_logprobs"]] == [400, 401, 402, 403]
    later = meta(2)["input_token_logprobs"]
    assert later[0] == [None, 402, None]
    assert later[1][0] == pytest.approx(whole["input_token_logprobs"][3][0], abs=1e-4)
    assert meta(-1)["input_token_logprobs"] == meta(None)["input_token_logprobs"] == []
    assert all(isinstance(text, str) for _, _, text in meta(0, return_text_in_logprobs=True)["output_token_logprobs"])
    assert ("output_top_logprobs" in whole) is (top > 0)
    if top:
        assert whole["input_top_logprobs"][0] is None
        assert [len(best) for best in whole["output_top_logprobs"]] == [2, 2, 2]
        for best, chosen in zip(whole["output_top_logprobs"], whole["output_token_logprobs"], strict=True):
            assert best[0] == chosen


@pytest.mark.parametrize("grammar", [{"regex": "(ab){3}!"}, {"json_schema": '{"const": 7}'}])
def test_generate_follows_grammars(http: httpx.Client, grammar: dict[str, str]) -> None:
    body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 12} | grammar}
    answer = http.post("/generate", json=body).json()
    assert answer["text"] in ("ababab!", "7")
    assert answer["meta_info"]["finish_reason"]["type"] == "stop"


def test_generate_shows_what_stopped_it_to_who_asks(http: httpx.Client) -> None:
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 24}
    text = http.post("/generate", json={"text": PROMPT, "sampling_params": sampling}).json()["text"]
    body = {"text": PROMPT, "sampling_params": sampling | {"stop": text[3:6], "no_stop_trim": True}}
    assert http.post("/generate", json=body).json()["text"] == text[: text.index(text[3:6]) + 3]


def test_rids_name_what_runs(http: httpx.Client) -> None:
    sampling = {"max_new_tokens": 1, "n": 2}
    answers = http.post("/generate", json={"text": [PROMPT, "It"], "rid": ["a", "b"], "sampling_params": sampling})
    assert [answer["meta_info"]["id"] for answer in answers.json()] == ["a_0", "a_1", "b_0", "b_1"]
    answer = http.post("/generate", json={"text": PROMPT, "rid": "c", "sampling_params": {"max_new_tokens": 1}})
    assert answer.json()["meta_info"]["id"] == "c"


@pytest.mark.parametrize("stream", [False, True])
def test_who_is_aborted_gets_what_there_is(http: httpx.Client, server: ServerProcess, stream: bool) -> None:
    rid = f"long-{stream}"
    sampling = {"max_new_tokens": 1900, "ignore_eos": True}
    body = {"text": PROMPT, "rid": rid, "sampling_params": sampling}

    def abort() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as another:
            while not another.post("/abort_request", json={"rid": rid}).json()["aborted"]:
                pass

    threading.Timer(0.5, abort).start()
    if stream:
        with http.stream("POST", "/generate", json=body | {"stream": True}) as response:
            *chunks, done = events(response)
        assert done == "[DONE]"
        answer = json.loads(chunks[-1])
    else:
        answer = http.post("/generate", json=body).json()
    assert answer["meta_info"]["finish_reason"] == {"type": "abort"}
    assert 0 < len(answer["output_ids"]) < 1900


def test_a_rid_that_runs_is_taken(http: httpx.Client, server: ServerProcess) -> None:
    body = {"text": PROMPT, "rid": "taken", "sampling_params": {"max_new_tokens": 500, "ignore_eos": True}}
    with http.stream("POST", "/generate", json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        refused = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    assert (refused.status_code, fault(refused)["param"]) == (400, "rid")
    twice = http.post("/generate", json={"text": ["a", "b"], "rid": ["same", "same"]})
    assert (twice.status_code, fault(twice)["param"]) == (400, "rid")
