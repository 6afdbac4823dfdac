"""What passes between the parts of an engine, also over process boundaries: requests, steps, tokens. Integers only."""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request's tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: the smallest set of tokens whose probability reaches this is kept; 1 keeps all.
        top_k: this many most likely tokens are kept; 0 keeps all.
        seed: the same seed and prompt give the same tokens, whatever else runs; None draws one from the engine.
        max_tokens: tokens generated at most; None: up to the model's context.
        ignore_eos: do not end at an end-of-text token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool = False


class Request(msgspec.Struct, frozen=True, tag="request"):
    """One prompt to be continued. `id` is the caller's and unique among the requests that run."""

    id: str
    prompt: list[int]
    params: SamplingParams


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """The caller no longer wants `id`; nothing more is said of it, and its memory is freed at once."""

    id: str


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """New tokens of a request; the last message of a request carries its `finish_reason`.

    A request that can never run gets one message with `error`, no tokens and the offending `param`; one that fails on
    its way, a message with `error` alone.
    """

    id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None
    param: str | None = None


class ScheduledSpan(msgspec.Struct, frozen=True, kw_only=True):
    """Positions `start` to `end` of one sequence, to be computed in one step.

    Attributes:
        id: of the request.
        slot: the sequence's tail slot, and its row in the runner's memory of newest tokens.
        token_ids: the tokens at these positions; empty for a decode, whose one token is what was sampled last for
            `slot`.
        blocks: the sequence's blocks, enough for `end` tokens.
        samples: the span ends with the sequence's last token, so that the step yields the next one.
        params, seed: how that one is chosen.
    """

    id: str
    slot: int
    start: int
    end: int
    token_ids: list[int]
    blocks: list[int]
    samples: bool
    params: SamplingParams
    seed: int

    @property
    def length(self) -> int:
        return self.end - self.start


class ScheduledBatch(msgspec.Struct, frozen=True):
    """One step: decodes first, then other spans of one token, then longer ones, as the KV store wants them."""

    spans: list[ScheduledSpan]

    @property
    def sampled(self) -> list[ScheduledSpan]:
        """Spans that yield a token, in the order of the runner's answer."""
        return [span for span in self.spans if span.samples]


class EngineInfo(msgspec.Struct, frozen=True, tag="ready"):
    """What an engine says of itself once it can take requests.

    Attributes:
        model: the name asked for.
        path: the local folder that holds the model and its tokenizer.
        max_model_len: tokens of prompt and answer together.
        vocab_size: ids run from 0 to vocab_size - 1.
        eos_token_ids: ids that end an answer.
        dtype, device: as resolved.
        kv_format: one line for people.
        kv_bytes: bytes of blocks and tails, as allocated.
        kv_tokens: tokens that fit, blocks and tails together.
        kv_tokens_16bit: tokens that the same bytes would hold at 2 bytes an element.
    """

    model: str
    path: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    dtype: str
    device: str
    kv_format: str
    kv_bytes: int
    kv_tokens: int
    kv_tokens_16bit: int


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start; `error` is the one line for the user."""

    error: str
