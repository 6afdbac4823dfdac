"""Faults of a server's streams, by OpenAI's protocol: what trips clients up and makes timings wrong."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import httpx

from kvtool.bench.client import PATHS, HttpTarget
from kvtool.bench.events import WorkItem
from kvtool.bench.measure import Where, to_end

TOKENS = 24
PROMPT = "Once upon a time there was a miller who had three sons, and"
TOGETHER = 0.5  # share of events that may arrive with the one before


@dataclass(frozen=True)
class Fault:
    """Something that a stream must not do, and what was seen."""

    fault: str
    seen: str


@dataclass(frozen=True)
class Line:
    """A line of a body, without its end, and when it arrived (seconds)."""

    time: float
    text: str


def lint_stream(where: Where) -> list[Fault]:
    """Ask a server for one streamed answer and for one of a model that it has not; returns what is wrong with them.

    Raises:
        ConfigError: the server cannot be reached.
    """
    assert where.url is not None
    target = HttpTarget(where.url, where.api, api_key=where.api_key, extra_body=where.extra_body)

    async def look() -> None:
        try:
            await target.open()
        finally:
            await target.close()

    to_end(look)
    body = target.body(PROMPT, WorkItem(id=0, prompt=PROMPT, output_tokens=TOKENS)) | where.extra_body
    headers = {"authorization": f"Bearer {where.api_key}"} if where.api_key else {}
    with httpx.Client(base_url=target.url, headers=headers, timeout=where.timeout, trust_env=False) as client:
        with client.stream("POST", PATHS[where.api], json=body) as response:
            if response.status_code != 200:
                text = response.read().decode(errors="replace")
                return [Fault("a plain request is answered with status 200", f"{response.status_code}: {text:.200}")]
            media_type = response.headers.get("content-type", "")
            lines = [Line(perf_counter(), line) for line in response.iter_lines()]
        faults = [*lint_lines(lines, where.api)]
        if not media_type.startswith("text/event-stream"):
            faults.insert(0, Fault("a stream's media type is text/event-stream", media_type or "none"))
        if where.api != "generate":
            faults += lint_refusal(client.post(PATHS[where.api], json=body | {"model": "no-such-model-here"}))
    return faults


def lint_refusal(response: httpx.Response) -> Iterator[Fault]:
    """What is wrong with the answer to a request for a model that does not exist."""
    if response.status_code not in (400, 404):
        yield Fault("an unknown model is refused with status 404", f"status {response.status_code}")
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = None
    if not isinstance(message, str):
        yield Fault('a refusal is {"error": {"message": ...}}', response.text[:200])


def lint_lines(lines: list[Line], api: str) -> Iterator[Fault]:
    """What is wrong with the lines of one streamed answer of `TOKENS` tokens."""
    for line in lines:
        if line.text and not line.text.startswith((":", "data:", "event:", "id:", "retry:")):
            yield Fault("a line is a field of an event, or a comment", line.text[:200])
    events = [line for line in lines if line.text.startswith("data:")]
    if sum(not line.text for line in lines) < len(events):
        yield Fault("an event ends with an empty line", f"{len(events)} events, fewer empty lines")
    data = [line.text.removeprefix("data:").strip() for line in events]
    if data.count("[DONE]") != 1 or data[-1] != "[DONE]":
        yield Fault("a stream ends with one [DONE]", f"{data.count('[DONE]')} of them; last event {data[-1:]!r:.200}")
    chunks: list[dict[str, Any]] = []
    for text in data:
        if text == "[DONE]":
            continue
        try:
            chunk = json.loads(text)
        except ValueError:
            chunk = None
        if isinstance(chunk, dict):
            chunks.append(chunk)
        else:
            yield Fault("an event is a JSON object", text[:200])
    times = [line.time for line in events]
    together = sum(b - a < 1e-5 for a, b in pairwise(times))
    if len(times) > 4 and together > TOGETHER * len(times):
        yield Fault("events are sent when they are made", f"{together} of {len(times)} arrived with the one before")
    yield from (lint_generate(chunks) if api == "generate" else lint_openai(chunks, api))


def lint_openai(chunks: list[dict[str, Any]], api: str) -> Iterator[Fault]:
    """What is wrong with OpenAI's chunks of one answer, [DONE] left out."""
    kind = "chat.completion.chunk" if api == "chat" else "text_completion"
    for name, wanted in (("id", None), ("model", None), ("created", None), ("object", kind)):
        seen = list(dict.fromkeys(str(chunk.get(name)) for chunk in chunks))
        if len(seen) != 1 or seen[0] == "None" or (wanted and seen[0] != wanted):
            yield Fault(f"{name} is {wanted or 'the same'} in all chunks", ", ".join(seen)[:200])
    with_choice = [chunk["choices"][0] for chunk in chunks if chunk.get("choices")]
    if api == "chat":
        deltas = [choice.get("delta") or {} for choice in with_choice]
        if sum("role" in delta and delta["role"] is not None for delta in deltas[:1]) != 1:
            yield Fault("the first delta of a chat names the role", json.dumps(deltas[:1])[:200])
        texts = [(delta.get("content") or "") + (delta.get("reasoning_content") or "") for delta in deltas]
    else:
        texts = [choice.get("text") or "" for choice in with_choice]
    reasons = [choice.get("finish_reason") for choice in with_choice]
    if sum(reason is not None for reason in reasons) != 1 or reasons[-1] is None:
        yield Fault("the last choice, and no other, has a finish_reason", str(reasons)[:200])
    elif any(text for text in texts[reasons.index(reasons[-1]) + 1 :]):
        yield Fault("no text comes after the finish_reason", "text did")
    if any("\ufffd" in text for text in texts):
        yield Fault("a chunk ends between characters", "U+FFFD in a text: half a character was sent")
    yield from lint_usage(chunks, with_choice)


def lint_usage(chunks: list[dict[str, Any]], with_choice: list[dict[str, Any]]) -> Iterator[Fault]:
    """What is wrong with how an answer's tokens are counted."""
    last = chunks[-1] if chunks else {}
    usage = last.get("usage")
    if not isinstance(usage, dict) or last.get("choices") != []:
        yield Fault("stream_options.include_usage gives a last chunk of usage without choices", json.dumps(last)[:200])
        return
    prompt, completion, total = (usage.get(f"{name}_tokens") for name in ("prompt", "completion", "total"))
    if not (isinstance(prompt, int) and isinstance(completion, int) and prompt + completion == total):
        yield Fault("prompt and completion tokens add up to total_tokens", json.dumps(usage)[:200])
    ids = [choice["token_ids"] for choice in with_choice if isinstance(choice.get("token_ids"), list)]
    if ids and sum(map(len, ids)) != completion:
        yield Fault("usage counts the tokens that were sent", f"{completion}, but {sum(map(len, ids))} ids came")
    if completion != TOKENS:
        yield Fault("ignore_eos gives an answer of max_tokens", f"{completion} tokens, not {TOKENS}")


def lint_generate(chunks: list[dict[str, Any]]) -> Iterator[Fault]:
    """What is wrong with SGLang's chunks of one answer, [DONE] left out."""
    metas = [chunk.get("meta_info") or {} for chunk in chunks]
    texts = [chunk.get("text") or "" for chunk in chunks]
    if not all(after.startswith(before) for before, after in pairwise(texts)):
        yield Fault("a chunk's text begins with the one before", "it does not")
    counts = [meta.get("completion_tokens") for meta in metas]
    numbers = [count for count in counts if isinstance(count, int)]
    if numbers != counts or numbers != sorted(numbers) or numbers[-1:] != [TOKENS]:
        yield Fault("completion_tokens grow to max_new_tokens", str(counts)[:200])
    reasons = [meta.get("finish_reason") for meta in metas]
    if sum(reason is not None for reason in reasons) != 1 or reasons[-1] is None:
        yield Fault("the last chunk, and no other, has a finish_reason", str(reasons)[:200])
