"""What Prometheus and operators see of a server: counts that agree with what was asked of it."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from conftest import ServerProcess, serving
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

PROMPT = "Once upon a time there was a miller"


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """A server that nobody else asks anything."""
    with (
        serving("--nbits", "4", "--kv-cache-memory", "64MiB", "--served-model-name", 'my "model"') as running,
        httpx.Client(base_url=running.url, timeout=60) as client,
    ):
        yield client


def scrape(http: httpx.Client) -> dict[tuple[str, ...], float]:
    """Values by name and labels; the model's name, that all of them have, is left out."""
    response = http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    values = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name") == 'my "model"'
            if family.name != "vllm:cache_config_info":
                labels.pop("format", None)
                values[(sample.name, *labels.values())] = sample.value
    return values


def complete(http: httpx.Client, **body: Any) -> Any:
    asked = {"prompt": PROMPT, "temperature": 0, "ignore_eos": True} | body
    return http.post("/v1/completions", json=asked).raise_for_status().json()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_names_that_dashboards_ask_for_are_there(http: httpx.Client) -> None:
    names = {name for name, *_ in scrape(http)}
    gauges = ["num_requests_running", "num_requests_waiting", "num_requests_swapped"]
    gauges += ["kv_cache_usage_perc", "gpu_cache_usage_perc"]
    counters = ["prefix_cache_queries", "prefix_cache_hits", "gpu_prefix_cache_queries", "gpu_prefix_cache_hits"]
    counters += ["num_preemptions", "prompt_tokens", "generation_tokens", "request_success"]
    histograms = ["time_to_first_token_seconds", "inter_token_latency_seconds", "time_per_output_token_seconds"]
    histograms += ["e2e_request_latency_seconds", "request_prompt_tokens", "request_generation_tokens"]
    expected = set(gauges) | {f"{name}_total" for name in counters}
    expected |= {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    assert {f"vllm:{name}" for name in expected} <= names
    own = ["kv_packed_bytes", "kv_tail_bytes", "kv_bytes", "sealed_blocks", "cached_blocks", "used_tails"]
    own += ["used_swap_units", "swap_units", "swap_out_blocks_total", "swap_in_blocks_total", "recomputations_total"]
    own += ["prefix_full_hits_total", "prefix_partial_hits_total"]
    assert {f"kvtool:{name}" for name in own} <= names


def test_counts_grow_by_what_was_asked(http: httpx.Client) -> None:
    before = scrape(http)
    usages = [complete(http, max_tokens=tokens)["usage"] for tokens in (1, 7)]
    stopped = complete(http, max_tokens=20, stop=complete(http, max_tokens=20)["choices"][0]["text"][3:6])["usage"]
    usages += [stopped, {"prompt_tokens": usages[0]["prompt_tokens"], "completion_tokens": 20}]
    after = scrape(http)

    def grown(*name: str) -> float:
        return after[name] - before[name]

    generated = sum(usage["completion_tokens"] for usage in usages)
    assert grown("vllm:prompt_tokens_total") == sum(usage["prompt_tokens"] for usage in usages)
    # The engine may be a token ahead of a stop string.
    assert generated <= grown("vllm:generation_tokens_total") <= generated + 2
    assert grown("vllm:request_success_total", "length") == 3
    assert grown("vllm:request_success_total", "stop") == 1
    for histogram in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_prompt_tokens"):
        assert grown(f"vllm:{histogram}_count") == 4
    assert grown("vllm:inter_token_latency_seconds_count") == grown("vllm:generation_tokens_total") - 4
    first, gaps = grown("vllm:time_to_first_token_seconds_sum"), grown("vllm:inter_token_latency_seconds_sum")
    assert first + gaps == pytest.approx(grown("vllm:e2e_request_latency_seconds_sum"), rel=0.1, abs=0.05)
    assert grown("vllm:request_generation_tokens_bucket", "5.0") == sum(u["completion_tokens"] <= 5 for u in usages)


def test_what_runs_shows_and_goes(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    before = scrape(http)
    with http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        with httpx.Client(base_url=http.base_url) as other:
            wait_until(lambda: other.get("/server_info").json()["kv"]["packed_bytes"] > 0)
            values, info = scrape(other), other.get("/server_info").json()
            assert values["vllm:num_requests_running",] == 1
            assert 0 < values["vllm:kv_cache_usage_perc",] < 1
            assert values["kvtool:kv_tail_bytes",] == info["kv"]["tail_bytes"] > 0
            kv = info["kv"]
            assert kv["used_blocks"] + kv["cached_blocks"] + kv["free_blocks"] == kv["total_blocks"]
            assert info["internal_states"] == [info["stats"]]
    wait_until(lambda: http.get("/server_info").json()["stats"]["running"] == 0)
    after = scrape(http)
    assert after["vllm:request_success_total", "abort"] == before["vllm:request_success_total", "abort"] + 1
    assert (after["vllm:kv_cache_usage_perc",], after["kvtool:kv_tail_bytes",]) == (0, 0)


def test_prefix_hits_are_counted_and_can_be_forgotten(http: httpx.Client) -> None:
    prompt = list(range(300, 500))

    def hits() -> float:
        before = scrape(http)
        complete(http, prompt=prompt, max_tokens=2)
        after = scrape(http)
        return after["vllm:prefix_cache_hits_total",] - before["vllm:prefix_cache_hits_total",]

    assert hits() == 0
    assert hits() == 192  # whole blocks of 64
    assert http.post("/flush_cache").status_code == 200
    assert hits() == 0


def test_requests_can_be_ended_from_outside(http: httpx.Client) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(complete(http, prompt=[PROMPT] * 3, max_tokens=1500)))
    thread.start()
    with httpx.Client(base_url=http.base_url) as other:
        wait_until(lambda: other.get("/server_info").json()["stats"]["running"] == 3)
        assert other.post("/abort_request", json={"rid": "nobody's"}).json() == {"aborted": 0}
        assert other.post("/abort_request", json={}).json() == {"aborted": 0}
        assert other.post("/abort_request", json={"abort_all": True}).json() == {"aborted": 3}
    thread.join()
    assert [choice["finish_reason"] for choice in found[0]["choices"]] == ["abort"] * 3


# What a server is


def test_it_says_what_it_is(server: ServerProcess) -> None:
    def get(path: str) -> Any:
        return httpx.get(f"{server.url}{path}").raise_for_status().json()

    assert get("/version") == {"version": "0.1.0"}
    assert get("/model_info") == get("/get_model_info")
    assert get("/model_info")["is_generation"] is True
    info = get("/get_server_info")
    assert info.keys() == get("/server_info").keys()
    assert info["configuration"]["engine"]["max_num_seqs"] == 2
    assert info["kv"]["bits_per_element"] == 4.5


def test_other_routes_and_methods_are_named(server: ServerProcess) -> None:
    for method, path, status, said in [
        ("GET", "/v2/completions", 404, "/v2/completions is no route"),
        ("POST", "/version/", 404, "/version/ is no route"),
        ("GET", "/generate", 405, "/generate is for POST, not for GET"),
        ("DELETE", "/flush_cache", 405, "/flush_cache is for"),
    ]:
        response = httpx.request(method, f"{server.url}{path}")
        assert (response.status_code, response.headers.get("allow") is not None) == (status, status == 405)
        error = response.json()["error"]
        assert said in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


def test_text_becomes_tokens_and_text_again(server: ServerProcess) -> None:
    def post(path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{server.url}{path}", json=body)

    oracle = AutoTokenizer.from_pretrained(httpx.get(f"{server.url}/v1/models").json()["data"][0]["root"])
    text = "Grüße, 世界! <|im_end|> 🙂"
    ids = oracle(text)["input_ids"]
    for field in ("prompt", "text"):
        answer = post("/tokenize", **{field: text, "return_token_strs": True}).json()
        assert answer == {
            "count": len(ids),
            "max_model_len": 2048,
            "tokens": ids,
            "token_strs": oracle.convert_ids_to_tokens(ids),
        }
    assert "token_strs" not in post("/tokenize", prompt=text).json()
    assert post("/detokenize", tokens=ids).json() == {"prompt": text, "text": text}
    bare = oracle.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert post("/detokenize", tokens=ids, skip_special_tokens=True).json()["text"] == bare
    messages = [{"role": "user", "content": "Who are you?"}]
    chat = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert post("/tokenize", messages=messages).json()["tokens"] == chat
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert (info["eos_token"], info["chat_template"]) == (oracle.eos_token, oracle.chat_template)
    for path, body in [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": messages}),
        ("/tokenize", {"prompt": "a" * 2**21}),
        ("/detokenize", {"tokens": [4096]}),
        ("/detokenize", {"tokens": [-1]}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {}),
    ]:
        assert post(path, **body).status_code == 400
