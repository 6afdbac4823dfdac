"""The same requests served by two engines that both do everything, and by one that prefills and one that decodes."""

import asyncio
import contextlib
import random
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Literal

import numpy as np

from kvtool.client import EngineClient
from kvtool.config import EngineConfig, HandoffConfig
from kvtool.disagg.link import layout_of
from kvtool.errors import ConfigError, EngineDeadError, KVToolError
from kvtool.kv.layout import KVLayout
from kvtool.models import load_config, resolve_model
from kvtool.request import EngineInfo, EngineStats, Handoff, Request, SamplingParams, Tokens

Fault = Literal["kill-prefill", "kill-decode", "corrupt", "drop", "delay"]
DECODE_PROMPT, DECODE_TOKENS = 32, 512  # of what decodes in the background
KILL_SECONDS = 0.02  # into a request
SETTLE_SECONDS = 10.0


@dataclass(frozen=True)
class Load:
    """What is asked.

    Attributes:
        prompt_tokens: lengths of the prompts, which come one after the other.
        requests: of each length.
        decodes: answers that are being written all the while.
    """

    prompt_tokens: tuple[int, ...] = (128, 512, 1536)
    output_tokens: int = 16
    requests: int = 4
    decodes: int = 4

    @property
    def prompts(self) -> list[int]:
        """Length of each prompt, in their order."""
        return [length for _ in range(self.requests) for length in self.prompt_tokens]

    def check(self, context: int) -> None:
        """Raises ConfigError if a request exceeds the model's context."""
        longest = max(self.prompt_tokens)
        if longest + self.output_tokens > context:
            raise ConfigError(
                f"--prompt-tokens {longest}: with an answer of {self.output_tokens} it exceeds the context of {context}"
            )


@dataclass
class Outcome:
    """What a client saw of one request; times are of this process' clock.

    Attributes:
        first: when its first token came.
        handoff: of a request that two engines shared.
        served: who did it, where that is not what was planned.
    """

    request: str
    prompt_tokens: int
    sent: float
    first: float | None = None
    token_ids: list[int] = field(default_factory=list)
    handoff: Handoff | None = None
    served: str = ""
    error: str | None = None

    @property
    def ttft(self) -> float | None:
        return None if self.first is None else self.first - self.sent

    @property
    def stages(self) -> dict[str, float] | None:
        """Seconds of a shared request, up to the moment when the decode side gave its first token out."""
        h = self.handoff
        if h is None:
            return None
        moments = (self.sent, h.scheduled, h.prefilled, h.received, h.answered)
        names = ("queue", "prefill", "transfer", "first_decode")
        return {name: end - start for name, start, end in zip(names, moments[:-1], moments[1:], strict=True)}


@dataclass
class Phase:
    """One way to serve the load.

    Attributes:
        gaps: (time, seconds) between tokens of what decodes in the background.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Found:
    """What a run has found, as far as it came.

    Attributes:
        info: of the decode engine.
        leaks: what survivors still held when all was answered.
        arrivals, losses: of the decode side.
    """

    layout: KVLayout | None = None
    info: EngineInfo | None = None
    colocated: Phase = field(default_factory=Phase)
    shared: Phase = field(default_factory=Phase)
    leaks: list[str] = field(default_factory=list)
    arrivals: int = 0
    losses: int = 0

    def matches(self, outcome: Outcome) -> bool | None:
        """Its tokens are those of the same request served by one engine; None: there are none to compare."""
        same = (other for other in self.colocated.outcomes if other.request == outcome.request)
        other = next(same, None)
        return None if other is None or outcome.error else other.token_ids == outcome.token_ids

    @property
    def residual(self) -> float | None:
        """Share of the time to the first tokens that no stage accounts for."""
        rows = [(o.ttft, sum(o.stages.values())) for o in self.shared.outcomes if o.stages and o.ttft]
        return 1 - sum(staged for _, staged in rows) / sum(ttft for ttft, _ in rows) if rows else None


class Pair:
    """A prefill and a decode engine of one model, in a process each."""

    def __init__(self, prefill: EngineClient, decode: EngineClient) -> None:
        self.prefill, self.decode = prefill, decode

    @property
    def sides(self) -> dict[str, EngineClient]:
        return {"prefill": self.prefill, "decode": self.decode}

    async def shared(self, request: Request) -> AsyncGenerator[Tokens, None]:
        """Tokens of a request whose prompt one engine computes, and whose answer the other.

        Raises:
            EngineDeadError: one of them has ended; nothing has been said where it was the first.
        """
        address = self.decode.info.kv_address
        stream = self.decode.submit(Request(request.id, request.prompt, request.params, is_pushed=True))
        first = asyncio.ensure_future(anext(stream))
        begun = asyncio.create_task(
            _drain(self.prefill.submit(Request(request.id, request.prompt, request.params, push_to=address)))
        )
        try:
            await asyncio.wait({first, begun}, return_when=asyncio.FIRST_COMPLETED)
            if begun.done() and not first.done():
                begun.result()  # raises what went wrong there
            yield await first
            async for tokens in stream:
                yield tokens
        finally:
            for task in (first, begun):
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, KVToolError):
                await first
            await stream.aclose()
            with contextlib.suppress(asyncio.CancelledError, KVToolError):
                await begun


async def _drain(stream: AsyncGenerator[Tokens, None]) -> None:
    async with aclosing(stream):
        async for _ in stream:
            pass


@asynccontextmanager
async def running(
    engine: EngineConfig, devices: tuple[str, str], transfer: str, fault: Fault | None
) -> AsyncIterator[Pair]:
    """The two engines."""
    secret = secrets.token_hex()
    at = HandoffConfig("decode", secret)
    decode = await EngineClient.start(replace(engine, device=devices[1], handoff=at))
    try:
        injected = fault if fault in ("corrupt", "drop", "delay") else None
        to = HandoffConfig("prefill", secret, (decode.info.kv_address,), transfer=transfer, fault=injected)
        prefill = await EngineClient.start(replace(engine, device=devices[0], handoff=to))
        try:
            yield Pair(prefill, decode)
        finally:
            await prefill.close()
    finally:
        await decode.close()


async def measure(
    engine: EngineConfig,
    load: Load,
    found: Found,
    *,
    devices: tuple[str, str] = ("auto", "auto"),
    transfer: str = "auto",
    fault: Fault | None = None,
    on_progress: Callable[[float, float], None] = lambda done, total: None,
) -> None:
    """Serve the load both ways, on the same two engines, and fill `found`.

    Raises:
        KVToolError: an engine cannot start, or refuses what is asked.
    """
    async with running(engine, devices, transfer, fault) as pair:
        found.info = pair.decode.info
        found.layout = layout_of(engine, engine.kv, pair.decode.info.dtype)
        rng = random.Random(engine.seed)
        vocab = range(3, pair.decode.info.vocab_size)
        prompts = [rng.choices(vocab, k=length) for length in load.prompts]
        background = [rng.choices(vocab, k=DECODE_PROMPT) for _ in range(load.decodes)]
        count = 2 * len(prompts)
        for client in pair.sides.values():  # what is done once: kernels, pages of memory
            await _drain(client.submit(Request("warm-up", rng.choices(vocab, k=max(load.prompts)), _params(2))))
        await _drain(pair.shared(Request("warm-up", rng.choices(vocab, k=max(load.prompts)), _params(2))))

        sides = list(pair.sides.values())
        streams = [sides[index % 2].submit for index in range(load.decodes)]
        async with _decoding(streams, background, found.colocated):
            for index, prompt in enumerate(prompts):
                await _ask(sides[index % 2].submit, str(index), prompt, load, found.colocated)
                on_progress(index + 1, count)
        for client in sides:
            client.flush_cache()
        async with _decoding([pair.shared] * load.decodes, background, found.shared):
            for index, prompt in enumerate(prompts):
                killed = fault if fault and fault.startswith("kill") and index == len(prompts) // 2 else None
                await _ask_pair(pair, str(index), prompt, load, found.shared, killed)
                on_progress(len(prompts) + index + 1, count)
        found.leaks = await _leaks(pair)
        stats = pair.decode.stats
        found.arrivals, found.losses = stats.arrivals_total, stats.losses_total


Submit = Callable[[Request], AsyncGenerator[Tokens, None]]


async def _ask(submit: Submit, name: str, prompt: list[int], load: Load, phase: Phase) -> None:
    outcome = Outcome(name, len(prompt), perf_counter())
    phase.outcomes.append(outcome)
    await _follow(submit(Request(name, prompt, _params(load.output_tokens))), outcome)


async def _ask_pair(
    pair: Pair, name: str, prompt: list[int], load: Load, phase: Phase, killed: str | None = None
) -> None:
    """One request as a router would have it served: shared, and where an engine has ended by the other alone, unless
    the client has seen a part of the answer."""
    outcome = Outcome(name, len(prompt), perf_counter())
    phase.outcomes.append(outcome)
    request = Request(name, prompt, _params(load.output_tokens))
    killer = asyncio.create_task(_kill(pair, outcome, killed)) if killed else None
    try:
        if all(client.alive for client in pair.sides.values()):
            await _follow(pair.shared(request), outcome)
            return
        raise EngineDeadError("an engine has ended before")
    except EngineDeadError as error:
        survivors = {side: client for side, client in pair.sides.items() if client.alive}
        if outcome.token_ids or not survivors:
            outcome.error = str(error)
            return
        side, client = next(iter(survivors.items()))
        outcome.served = f"by the {side} side alone"
        retry = Request(f"{name}-again", prompt, request.params)
        await _follow(client.submit(retry), outcome)
    finally:
        if killer:
            await killer


async def _kill(pair: Pair, outcome: Outcome, killed: str) -> None:
    """A prefill engine while it prefills, a decode engine while it decodes."""
    if killed == "kill-prefill":
        await asyncio.sleep(KILL_SECONDS)
        pair.prefill.kill()
    else:
        while outcome.first is None:
            await asyncio.sleep(KILL_SECONDS / 20)
        pair.decode.kill()


async def _follow(stream: AsyncGenerator[Tokens, None], outcome: Outcome) -> None:
    async with aclosing(stream):
        async for tokens in stream:
            if outcome.first is None and tokens.token_ids:
                outcome.first = perf_counter()
            outcome.handoff = outcome.handoff or tokens.handoff
            outcome.token_ids += tokens.token_ids


@asynccontextmanager
async def _decoding(streams: Sequence[Submit], prompts: Sequence[list[int]], phase: Phase) -> AsyncIterator[None]:
    """Answers that are being written all the while; the gaps between their tokens go to `phase`."""

    async def decode(index: int, submit: Submit, prompt: list[int], ready: asyncio.Event) -> None:
        turn = 0
        while True:
            last = None
            request = Request(f"decode-{index}-{turn}", prompt, _params(DECODE_TOKENS))
            with contextlib.suppress(EngineDeadError):
                async with aclosing(submit(request)) as stream:
                    async for _ in stream:
                        now = perf_counter()
                        if last is not None:
                            phase.gaps.append((now, now - last))
                        last = now
                        ready.set()
            ready.set()
            turn += 1
            await asyncio.sleep(KILL_SECONDS if last is None else 0)

    events = [asyncio.Event() for _ in streams]
    tasks = [
        asyncio.create_task(decode(index, submit, prompt, ready))
        for index, (submit, prompt, ready) in enumerate(zip(streams, prompts, events, strict=True))
    ]
    try:
        for ready in events:
            await ready.wait()
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _leaks(pair: Pair) -> list[str]:
    """What engines that live still hold, though all has been answered."""
    deadline = perf_counter() + SETTLE_SECONDS
    while True:
        held = [
            f"the {side} side holds {stats.used_blocks} blocks and {stats.used_tails} tails of {_count(stats)} requests"
            for side, client in pair.sides.items()
            if client.alive and _holds(stats := client.stats)
        ]
        if not held or perf_counter() > deadline:
            return held
        await asyncio.sleep(0.05)
        for client in pair.sides.values():
            if client.alive:
                client.flush_cache()  # whatever it is told, an engine answers with its stats


def _count(stats: EngineStats) -> int:
    return stats.running + stats.waiting


def _holds(stats: EngineStats) -> bool:
    return bool(_count(stats) or stats.used_blocks or stats.used_tails)


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def model_context(engine: EngineConfig) -> int:
    """Tokens of prompt and answer that the engine's model can read."""
    return load_config(resolve_model(engine.model)).max_position


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and max; empty where there is nothing."""
    if not values:
        return {}
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"p50": p50, "p90": p90, "p99": p99, "max": max(values)}


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least squares through (x, y): y at 0, and its rise; through the origin where all x are the same."""
    x, y = np.array(points).T
    if np.ptp(x) == 0:
        return 0.0, float(y.mean() / x.mean())
    rise, start = np.polyfit(x, y, 1)
    return float(start), float(rise)


def break_even(prefill: Sequence[tuple[float, float]], transfer: Sequence[tuple[float, float]]) -> float | None:
    """The prompt length from which bringing its KV takes less time than computing it; None: there is none.

    Args:
        prefill, transfer: (tokens, seconds), measured.
    """
    (start, rise), (way, each) = line(prefill), line(transfer)
    if each >= rise:
        return None
    return max(1.0, (way - start) / (rise - each))
