"""A request on its way through the engine."""

from dataclasses import dataclass, field

from kvtool.request import Request, SamplingParams, TokenLogprobs
from kvtool.speculation import NGrams


@dataclass(eq=False, slots=True)
class Sequence:
    """What the scheduler knows of a request.

    Attributes:
        tokens: the prompt and what has been generated so far.
        max_length: tokens at which it ends.
        seed: the request's, or the engine's choice.
        root: digest that stands before its first block's.
        num_known_tokens: how many there were when it was admitted; later ones the runner has sampled itself.
        num_computed_tokens: how many have, or in the steps under way get, their keys and values in the store.
        num_pending: tokens that steps under way will yield; they come after `tokens`.
        num_cached_tokens: of the prompt, found in the prefix cache at its first admission; -1 before that.
        num_told: tokens of the answer that have been given out.
        is_imported: another engine has computed the prompt, and what it has made of it waits outside the store.
        origin: the format in which it has, where that is another one than ours.
        blocks: packed blocks it owns or shares, in order of position.
        num_held_tokens: how many tokens they and the tail have room for.
        num_sealed: how many of them, from the first, are known by their digests.
        digests: of its first complete blocks, as far as they were needed.
        slot: its tail slot and its row in the runner's memory of newest tokens; -1 while it waits.
        units: of the swap space, which hold its computed blocks and its tail while it waits.
        prompt_logprobs: as far as they have been computed.
        is_counted: the runner knows what it has seen, by its slot, if it looks back.
        num_drafted: of the tokens that the step under way computes for it, how many are drafted.
        acceptance: running average of how often a token drafted for it is right.
        may_draft: it may have some; not any more once they may have been to blame for a step that failed.
        ngrams: of its tokens, where drafts are looked for among them.
        draft_blocks: of the draft model's cache, its own alone.
        num_draft_computed_tokens: how many of its tokens the draft model has read.
        alone: until its next token it is computed in steps of its own; one that failed may have been its fault.
        ended: nothing more is said of it. It keeps its memory until the step under way, which writes there, is done.
        unfit: what it stored may not be finite.
    """

    request: Request
    tokens: list[int]
    max_length: int
    seed: int
    root: bytes
    num_known_tokens: int = 0
    num_computed_tokens: int = 0
    num_pending: int = 0
    num_cached_tokens: int = -1
    num_told: int = 0
    is_imported: bool = False
    origin: str = ""
    blocks: list[int] = field(default_factory=list)
    num_held_tokens: int = 0
    num_sealed: int = 0
    digests: list[bytes] = field(default_factory=list)
    slot: int = -1
    units: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    is_counted: bool = False
    num_drafted: int = 0
    acceptance: float = 1.0
    may_draft: bool = True
    ngrams: NGrams = field(default_factory=NGrams)
    draft_blocks: list[int] = field(default_factory=list)
    num_draft_computed_tokens: int = 0
    alone: bool = False
    ended: bool = False
    unfit: bool = False

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def length(self) -> int:
        """Tokens, those on their way among them."""
        return len(self.tokens) + self.num_pending

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed_tokens < self.num_known_tokens and not self.ended

    @property
    def is_decoding(self) -> bool:
        """It can compute its newest token, which may be on its way, to get one more; not where drafts stand between."""
        is_known = self.num_known_tokens <= self.num_computed_tokens < self.length < self.max_length
        return is_known and not self.num_drafted and not self.ended
