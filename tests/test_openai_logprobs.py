"""How likely the tokens were, as OpenAI's routes tell it."""

import json

import httpx
import openai
import pytest
from conftest import EOS, GREEDY, MESSAGES, PROMPT, complete, events

from kvtool.tokenizer import Tokenizer


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
