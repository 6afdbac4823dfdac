"""What passes between the parts of an engine, also over process boundaries: requests, steps, tokens. Integers only.

What a step makes hundreds of has `gc=False`: none of it can be part of a cycle, and Python need not look through it.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort"]
VOID = -2  # in place of a token: it does not count


class Grammar(msgspec.Struct, frozen=True):
    """What an answer must look like.

    Attributes:
        kind: of `text`: a JSON schema, a regular expression that matches the whole answer, or a JSON list of the
            texts to choose from.
    """

    kind: Literal["json_schema", "regex", "choice"]
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request's tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: the smallest set of tokens whose probability reaches this is kept; 1 keeps all.
        top_k: this many most likely tokens are kept; 0 keeps all.
        min_p: tokens of at least this share of the most likely one's probability are kept.
        repetition_penalty: logits of all tokens seen, prompt and answer, are divided by it (negative ones multiplied).
        presence_penalty: subtracted from the logit of each token that the answer holds.
        frequency_penalty: subtracted as often as the answer holds it.
        logit_bias: added to the logits of these ids.
        seed: the same seed and prompt give the same tokens, whatever else runs; None draws one from the engine.
        max_tokens: tokens generated at most; None: up to the model's context.
        min_tokens: no end-of-text or stop token before so many others.
        ignore_eos: do not end at an end-of-text token.
        stop_token_ids: end at one of these.
        grammar: what the answer must look like.
        speculate: its tokens may be drafted, where the engine drafts; they are the same either way.
        logprobs: give the log-probability of each token and so many of the most likely ones; None: of none. They are
            the model's own, before temperature, penalties and the like.
        prompt_logprobs: the same for the prompt's tokens but the first; such a request takes no prefix hit.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] = []
    grammar: Grammar | None = None
    speculate: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def looks_back(self) -> bool:
        """The choice of a token depends on those before it, beyond what the model makes of them."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


class Request(msgspec.Struct, frozen=True, tag="request"):
    """One prompt to be continued.

    Attributes:
        id: the caller's, unique among the requests that run.
        cache_salt: prefixes are shared among requests of the same salt only.
        fork_of: id of a request submitted just before, of the same prompt and salt, whose computed prompt it shares.
        push_to: HOST:PORT of the engine that goes on behind the first token, and gets the KV; here it ends with that.
        is_pushed: another engine computes the prompt, and pushes it here under the same id.
    """

    id: str
    prompt: list[int]
    params: SamplingParams
    cache_salt: str = ""
    fork_of: str | None = None
    push_to: str | None = None
    is_pushed: bool = False


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """The caller no longer wants `id`; nothing more is said of it, and its memory is freed at once."""

    id: str


class FlushCache(msgspec.Struct, frozen=True, tag="flush"):
    """Forget every prefix; those that run keep what they have."""


class CountExperts(msgspec.Struct, frozen=True, tag="count_experts"):
    """Say how many tokens have chosen each expert so far."""


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probability of one token, and the most likely ids at its place, best first, with theirs."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Handoff(msgspec.Struct, frozen=True, array_like=True):
    """How a request came from another engine; times are seconds on this engine's `time.perf_counter`.

    Attributes:
        scheduled: the first step with the prompt began, there.
        prefilled: the first token was known, there.
        received: its KV was here, checked.
        answered: the first step here was done, with which the first token is told.
        num_bytes: that came for it, headers included.
    """

    scheduled: float
    prefilled: float
    received: float
    answered: float
    num_bytes: int


class Tokens(msgspec.Struct, frozen=True, tag="tokens", gc=False):
    """New tokens of a request; the last message of a request carries its `finish_reason`.

    A request that can never run gets one message with `error`, no tokens and the offending `param`; one that fails on
    its way, a message with `error`, and with `param` if that is to blame.

    Attributes:
        logprobs: of each of `token_ids`, if asked for.
        prompt_logprobs: in the first message, if asked for: of every prompt token but the first.
        num_cached_tokens: in the first message: tokens of the prompt that a prefix hit saved.
        queue_seconds: in the first message: from submission to the first step that computed something of it.
        handoff: in the first message, if another engine has computed the prompt.
    """

    id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    error: str | None = None
    param: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    queue_seconds: float = 0.0
    handoff: Handoff | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What an engine is doing. Those that end in `_total` only grow.

    Attributes:
        running, waiting: requests; of those that wait, `swapped` have their memory in the swap space.
        awaited: requests whose prompt another engine computes, and whose KV has not come.
        used_blocks, cached_blocks: owned by a request; owned by none but kept for prefix hits. The rest is free.
        sealed_blocks: known by their content, owned or cached.
        used_tails: tail slots of running requests.
        used_swap_units: of the swap space, in units of a block's bytes.
        prefix_queries_total, prefix_hits_total: tokens looked for, and found, in the prefix cache.
        full_hits_total, partial_hits_total: requests that found all that they could have, or some of it.
        swap_outs_total, swap_ins_total: blocks moved to the swap space and back.
        preemptions_total: requests that had to give up their memory; of those, `recomputations_total` found the swap
            space full and were computed again.
        arrivals_total, losses_total: requests whose KV came from another engine, or should have.
        speculative_tokens: drafted for a sequence in a step now, at most; `speculation_off` says why none are.
        verifications_total: of the drafts of a sequence; of their drafted_total tokens accepted_total were right.
    """

    running: int = 0
    waiting: int = 0
    swapped: int = 0
    used_blocks: int = 0
    cached_blocks: int = 0
    sealed_blocks: int = 0
    used_tails: int = 0
    used_swap_units: int = 0
    prefix_queries_total: int = 0
    prefix_hits_total: int = 0
    full_hits_total: int = 0
    partial_hits_total: int = 0
    swap_outs_total: int = 0
    swap_ins_total: int = 0
    preemptions_total: int = 0
    recomputations_total: int = 0
    awaited: int = 0
    arrivals_total: int = 0
    losses_total: int = 0
    speculative_tokens: int = 0
    speculation_off: str = ""
    verifications_total: int = 0
    drafted_total: int = 0
    accepted_total: int = 0


class Update(msgspec.Struct, frozen=True, tag="update"):
    """What has happened since the engine last said something.

    Attributes:
        expert_tokens: what it was asked for by `CountExperts`.
    """

    tokens: list[Tokens]
    stats: EngineStats
    expert_tokens: dict[int, list[int]] | None = None


class ScheduledSpan(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Positions `start` to `end` of one sequence, to be computed in one step.

    Attributes:
        id: of the request.
        slot: the sequence's tail slot, and its row in the runner's memory of newest tokens.
        token_ids: the tokens at these positions; empty for a decode, whose one token is what was sampled last for
            `slot`, or is drafted.
        draft: 0, or of a decode: its token is the one that was drafted so many behind what was sampled last.
        blocks: the sequence's blocks, enough for `end` tokens; the scheduler adds to them when it makes the next step.
        targets: tokens behind each of the first positions, whose log-probabilities are asked for.
        num_top: how many of the most likely tokens go with them.
    """

    id: str
    slot: int
    start: int
    end: int
    blocks: list[int]
    token_ids: Sequence[int] = ()
    draft: int = 0
    targets: Sequence[int] = ()
    num_top: int = 0

    @property
    def length(self) -> int:
        return self.end - self.start


class Sample(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One token to be chosen.

    Attributes:
        id: of the request.
        span: index of the span whose last token's logits it is chosen by; forks share one.
        slot: row in the runner's memory of newest tokens.
        position: at which the token will stand.
        params, seed: how it is chosen.
        num_generated: tokens of the answer so far.
        history: the tokens so far, prompt and answer, where `params` look back and nothing was yet sampled in this slot
            for this sequence; the runner counts later ones itself.
    """

    id: str
    span: int
    slot: int
    position: int
    params: SamplingParams
    seed: int
    num_generated: int
    history: Sequence[int] = ()


class Question(msgspec.Struct, frozen=True, gc=False):
    """What a draft model is asked.

    Attributes:
        span: what it has to read of a sequence first, in blocks of its own cache.
        sample: how the first token behind that is chosen.
        may_reject: it is drawn by a number of its own, and accepted by its probability. Else it is drawn by the number
            that the model will draw by, so that both choose the same more often, and accepted if they do.
    """

    span: ScheduledSpan
    sample: Sample
    may_reject: bool


class Draft(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Tokens proposed behind a sequence's newest, which the step verifies.

    Attributes:
        slot: of the sequence.
        num_tokens: proposed; none where the draft model only computes what it has yet to read.
        token_ids: what is proposed; empty where the draft model is asked.
        question: to the draft model.
    """

    slot: int
    num_tokens: int
    token_ids: Sequence[int] = ()
    question: Question | None = None


class Memory(msgspec.Struct, frozen=True):
    """Blocks and the tail of one sequence (slot -1: it has none)."""

    blocks: list[int]
    slot: int


class Swap(msgspec.Struct, frozen=True):
    """A sequence's memory, and the units of swap space that it goes to or comes from."""

    memory: Memory
    units: list[int]


class Import(msgspec.Struct, frozen=True):
    """A sequence that another engine has computed, and where its last blocks and its tail go."""

    id: str
    memory: Memory


class Export(msgspec.Struct, frozen=True, gc=False):
    """What a step yields for another engine.

    Attributes:
        blocks: that hold what is to be sent.
        slot: the sequence's tail, where it is to be sent; else -1.
        by_layer: a layer's part is there as soon as it has run, not only when all have.
    """

    blocks: list[int]
    slot: int
    by_layer: bool


class Fork(msgspec.Struct, frozen=True):
    """Copy what two sequences cannot share: the tail, and a block that is not full (-1: there is none)."""

    source_slot: int
    source_block: int
    slot: int
    block: int


class ScheduledBatch(msgspec.Struct, frozen=True, kw_only=True):
    """One step.

    Attributes:
        spans: decodes first, then other spans of one token, then longer ones, as the KV store wants them.
        samples: what the step yields, in the order of the runner's answer. Behind a sequence's newest token come those
            that follow its drafted ones: they hold as far as each drafted token is the one sampled in its place.
        drafts: what is proposed before the model runs.
        swap_outs, wipes, swap_ins, imports: done in this order before the model runs.
        forks: done after it.
    """

    spans: list[ScheduledSpan]
    samples: list[Sample]
    drafts: list[Draft] = []
    swap_outs: list[Swap] = []
    wipes: list[Memory] = []
    swap_ins: list[Swap] = []
    imports: list[Import] = []
    forks: list[Fork] = []


class StepResult(msgspec.Struct, frozen=True):
    """What a step yielded.

    Attributes:
        token_ids: of each sample; -1 where the model's logits were not finite, `VOID` where it follows a drafted token
            that was not accepted, `VOID` - 1 if that made them not finite.
        logprobs: of each sample, None where not asked for.
        prompt_logprobs: of each span, for each of its targets.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    prompt_logprobs: list[list[TokenLogprobs]]


class EngineInfo(msgspec.Struct, frozen=True, tag="ready"):
    """What an engine says of itself once it can take requests.

    Attributes:
        model: the name asked for.
        path: the local folder that holds the model and its tokenizer.
        max_model_len: tokens of prompt and answer together.
        vocab_size: ids run from 0 to vocab_size - 1.
        eos_token_ids: ids that end an answer.
        dtype, device: as resolved, of rank 0.
        num_ranks: processes that share the model, on GPUs a device each.
        quantization: how weights are kept, as `--quantization` names it; "none": in 16 bits, or as `dtype` says.
        weight_bytes, step_bytes: of all ranks together, and those of them that a step reads.
        num_experts, ep: of each mixture in it, and the parts in which ranks have them, one behind the other.
        kv_format: one line for people.
        bits_per_element: honest bits of a packed element.
        block_size: tokens of a packed block.
        num_blocks, block_bytes: packed blocks, and the bytes of one over all layers and ranks.
        max_num_seqs, tail_bytes: sequences that run at once, and the bytes of one's tail.
        num_swap_units: blocks' worth of swap space.
        prefix_caching: prompts can share their beginnings.
        kv_address: HOST:PORT where KV arrives; empty where none does.
        kv_bytes: bytes of blocks and tails, as allocated.
        kv_tokens: tokens that fit, blocks and tails together.
        kv_tokens_16bit: tokens that the same bytes would hold at 2 bytes an element.
        draft_kv_bytes: bytes of the draft model's cache, as allocated.
        start_seconds: it took to load the model, compile kernels and capture CUDA graphs.
        compile_seconds: of those, what it took to compile the kernels of all steps, or to find them compiled.
    """

    model: str
    path: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    dtype: str
    device: str
    num_ranks: int
    quantization: str
    weight_bytes: int
    step_bytes: int
    num_experts: int
    ep: int
    kv_format: str
    bits_per_element: float
    block_size: int
    num_blocks: int
    block_bytes: int
    max_num_seqs: int
    tail_bytes: int
    num_swap_units: int
    prefix_caching: bool
    kv_bytes: int
    kv_tokens: int
    kv_tokens_16bit: int
    start_seconds: float
    compile_seconds: float
    kv_address: str = ""
    draft_kv_bytes: int = 0


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start; `error` is the one line for the user."""

    error: str
