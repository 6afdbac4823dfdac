"""From logits to token ids, on the device, each row by its own parameters."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kvtool.kernels import takes
from kvtool.kv.batch import on_device
from kvtool.request import VOID, Sample
from kvtool.speculation import other_seed

COLDEST = 1e-5  # a lower temperature is greedy in all but name


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on a request's seed and the token's position alone, so not on the batch."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def is_greedy(sample: Sample) -> bool:
    """The largest of the model's own logits is this sample's token."""
    params = sample.params
    adjusted = params.looks_back or params.logit_bias or params.grammar or sample.num_generated < params.min_tokens
    return params.temperature < COLDEST and not adjusted


def greedy(logits: Tensor, newest: Tensor, slots: Tensor) -> Tensor:
    """Ids of the largest logits [N, V], the first of equals, as [N] int64; -1 for a row that is not finite.

    They also go to `newest` at `slots` [N], 0 for a row that is not finite.
    """
    if takes(logits):
        from kvtool.kernels import sampling

        return sampling.greedy(logits, newest, slots)
    token_ids = torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)
    newest.index_put_((slots,), token_ids.clamp(min=0))
    return token_ids


class Row(NamedTuple):
    """What the device is told of one sample; temperature 0 is greedy. The rest is as in `SamplingParams`."""

    slot: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    looks_back: bool
    uniform: float

    @classmethod
    def of(cls, sample: Sample) -> "Row":
        params = sample.params
        return cls(
            sample.slot,
            params.temperature if params.temperature >= COLDEST else 0.0,
            params.top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            params.looks_back,
            uniform(sample.seed, sample.position),
        )


@dataclass(frozen=True)
class Choices:
    """How the tokens of a step are chosen, on the device; all in float64, as one transfer brings them.

    Attributes:
        rows: [N, len(Row._fields)], a `Row` for each sample.
        bias_ends: [N + 1], where each row's biases end, after a 0.
        bias_ids, biases: [E], what is added to the logits of which ids.
        new_slots: of samples that bring their history.
        history: [H, 3], slot, id and count of what they have seen.
    """

    rows: Tensor
    bias_ends: Tensor
    bias_ids: Tensor
    biases: Tensor
    new_slots: Tensor
    history: Tensor

    @classmethod
    def send(cls, samples: Sequence[Sample], device: torch.device) -> "Choices":
        biases = [sample.params.logit_bias for sample in samples]
        new = [sample for sample in samples if sample.history]
        parts: list[list[float]] = [
            [value for sample in samples for value in Row.of(sample)],
            list(accumulate(map(len, biases), initial=0)),
            [token_id for bias in biases for token_id in bias],
            [value for bias in biases for value in bias.values()],
            [sample.slot for sample in new],
            [
                value
                for sample in new
                for token_id, n in _counts(sample).items()
                for value in (sample.slot, token_id, n)
            ],
        ]
        flat = torch.tensor([value for part in parts for value in part], dtype=torch.float64)
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        rows, bias_ends, bias_ids, values, new_slots, history = flat.split(list(map(len, parts)))
        return cls(rows.view(len(samples), -1), bias_ends, bias_ids, values, new_slots, history.view(-1, 3))

    def column(self, name: str) -> Tensor:
        """[N, 1] of a field of `Row`."""
        at = Row._fields.index(name)
        return self.rows[:, at : at + 1]


def _counts(sample: Sample) -> Counter[int]:
    """Twice how often the answer holds each token, and 1 more for those of the prompt."""
    start = len(sample.history) - sample.num_generated
    counts = Counter({token_id: 2 * n for token_id, n in Counter(sample.history[start:]).items()})
    counts.update(set(sample.history[:start]))
    return counts


class Sampler:
    """Chooses the tokens of a step where the logits are, and waits for none of them.

    What sequences that look back have seen stays on the device, by slot: a sequence brings its history when it is first
    sampled in its slot, and from then on its own tokens are counted as they are chosen. The memory, 4 bytes for each
    slot and token of the vocabulary, is taken when the first of them comes.

    Args:
        newest: [slots] int64, where what was chosen last goes.
        eos_token_ids: ids that end an answer, held back by min_tokens.
    """

    def __init__(self, newest: Tensor, eos_token_ids: Iterable[int] = ()) -> None:
        self._newest, self._eos_token_ids = newest, frozenset(eos_token_ids)
        self._counts: Tensor | None = None  # [slots, V] int32, as `_counts` gives them

    def sample(self, logits: Tensor, samples: Sequence[Sample], allowed: NDArray[np.int32] | None = None) -> Tensor:
        """One token id for each row of `logits` [N, V], as [N] int64; -1 for a row that is not finite.

        The logits are adjusted first; greedy rows then take the largest, others draw.

        Args:
            logits: as the model gives them; left as they are.
            samples: how each row is chosen from; of one slot none but those that `verify` judges look at `newest`.
            allowed: [N, ceil(V / 32)], bit i % 32 of word i // 32 being set where token i may follow.
        """
        choices, mask, counts = self.prepare(samples, logits, allowed)
        if takes(logits):
            from kvtool.kernels import sampling

            c = choices
            return sampling.choose(logits, c.rows, c.bias_ends, c.bias_ids, c.biases, mask, counts, self._newest)
        token_ids = choose(logits, choices, mask, counts)
        slots = choices.column("slot")[:, 0].long()
        self._newest[slots] = token_ids.clamp(min=0)
        if counts is not None:
            counted = (choices.column("looks_back")[:, 0] > 0) & (token_ids >= 0)
            counts[slots[counted], token_ids[counted]] += 2
        return token_ids

    def prepare(
        self, samples: Sequence[Sample], logits: Tensor, allowed: NDArray[np.int32] | None = None
    ) -> tuple[Choices, Tensor | None, Tensor | None]:
        """What `choose` needs beside the logits: choices, mask, and counts up to date."""
        choices = Choices.send(samples, logits.device)
        counts = self._remember(choices, logits) if any(sample.params.looks_back for sample in samples) else None
        words = _may_follow(samples, logits.shape[1], self._eos_token_ids, allowed)
        if words is None:
            return choices, None, counts
        mask = torch.from_numpy(words)
        if logits.is_cuda:
            mask = mask.pin_memory().to(logits.device, non_blocking=True)
        return choices, mask, counts

    def _remember(self, choices: Choices, logits: Tensor) -> Tensor:
        """Counts by slot, with the histories that this step brings."""
        if self._counts is None:
            shape = (len(self._newest), logits.shape[1])
            self._counts = torch.zeros(shape, dtype=torch.int32, device=logits.device)
        if len(choices.new_slots):
            slots, ids, counts = choices.history.long().unbind(1)
            self._counts.index_fill_(0, choices.new_slots.long(), 0)
            self._counts[slots, ids] = counts.int()
        return self._counts


def _may_follow(
    samples: Sequence[Sample], vocab_size: int, eos_token_ids: frozenset[int], allowed: NDArray[np.int32] | None
) -> NDArray[np.int32] | None:
    """`allowed` less what min_tokens holds back, None where all may follow.

    Where the grammar allows nothing but what min_tokens holds back, the grammar has the last word.
    """
    held_back = {
        row: eos_token_ids.union(sample.params.stop_token_ids)
        for row, sample in enumerate(samples)
        if sample.num_generated < sample.params.min_tokens
    }
    if not any(held_back.values()):
        return allowed
    words = np.full((len(samples), -(-vocab_size // 32)), -1, np.int32) if allowed is None else allowed.copy()
    ids = np.arange(vocab_size)
    for row, held in held_back.items():
        others = words[row].copy()
        for token_id in held:
            others.view(np.uint32)[token_id // 32] &= ~np.uint32(1 << token_id % 32)
        if (others[ids // 32] >> (ids % 32) & 1).any():
            words[row] = others
    return words


def choose(logits: Tensor, choices: Choices, mask: Tensor | None, counts: Tensor | None) -> Tensor:
    """What `Sampler.sample` answers, in float64.

    Args:
        mask: [N, ceil(V / 32)] int32, which tokens may follow; None: all.
        counts: [slots, V], as `_counts` gives them; None: no row looks back.
    """
    finite = logits.isfinite().all(-1)
    logits = adjust(logits, choices, mask, counts)
    token_ids, warm = logits.argmax(-1), choices.column("temperature")[:, 0] > 0
    if warm.any():
        token_ids = torch.where(warm, _draw(logits, choices), token_ids)
    return torch.where(finite, token_ids, -1)


def adjust(logits: Tensor, choices: Choices, mask: Tensor | None, counts: Tensor | None) -> Tensor:
    """`logits` [N, V] after grammar and min_tokens, logit_bias and penalties, in this order, as in vLLM.

    A row that asks for nothing keeps its values; if none asks, the answer is `logits` itself.
    """
    if mask is not None:
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        may_follow = (mask[:, :, None] >> bits & 1).flatten(1)[:, : logits.shape[1]] > 0
        logits = logits.masked_fill(~may_follow, -torch.inf)
    if len(choices.biases):
        ends = choices.bias_ends.long()
        rows = torch.arange(len(logits), device=logits.device).repeat_interleave(ends.diff())
        logits = logits.double().index_put((rows, choices.bias_ids.long()), choices.biases, accumulate=True)
    if counts is not None:
        penalised = _penalise(logits.double(), choices, counts)
        logits = torch.where(choices.column("looks_back") > 0, penalised, logits.double())
    return logits


def _penalise(logits: Tensor, choices: Choices, counts: Tensor) -> Tensor:
    """Repetition penalty (Keskar et al., 2019) over prompt and answer, presence and frequency over the answer alone."""
    repetition = choices.column("repetition_penalty")
    presence, frequency = choices.column("presence_penalty"), choices.column("frequency_penalty")
    seen = counts[choices.column("slot")[:, 0].long()]
    answered = seen >> 1
    logits = torch.where(seen > 0, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return logits - presence * (answered > 0) - frequency * answered


def _draw(logits: Tensor, choices: Choices) -> Tensor:
    """One id for each row [N] of adjusted logits [N, V], by inverse transform of the row's own uniform number.

    After the temperature min_p, top_k and top_p, in this order, keep the most likely tokens, always at least one; among
    equals the first ids. Probabilities are then summed up in order of ids.
    """
    top_k, top_p, min_p = (choices.column(name) for name in ("top_k", "top_p", "min_p"))
    is_narrowed = bool(((top_k > 0) | (top_p < 1) | (min_p > 0)).any())
    return _drawn(_kept(logits, choices, is_narrowed), choices.column("uniform"))


def _kept(logits: Tensor, choices: Choices, is_narrowed: bool) -> Tensor:
    """Probabilities [N, V] of what is kept, 0 of all else; they sum up to less than 1 if something is narrowed."""
    temperature, top_k = choices.column("temperature"), choices.column("top_k")
    min_p, top_p = choices.column("min_p"), choices.column("top_p")
    kept = (logits.double() / temperature.clamp(min=COLDEST)).softmax(-1)
    if is_narrowed:
        probs, ids = kept.sort(stable=True, dim=-1, descending=True)
        probs[probs < min_p * probs[:, :1]] = 0
        rank = torch.arange(probs.shape[-1], device=logits.device)
        probs[(rank >= top_k) & (top_k > 0)] = 0
        before = probs.cumsum(-1) - probs
        probs[before >= top_p * probs.sum(-1, keepdim=True)] = 0
        kept = torch.zeros_like(probs).scatter(-1, ids, probs)
    return kept


def _drawn(kept: Tensor, uniform: Tensor) -> Tensor:
    """The id [N] at which the sum of `kept` [N, V] passes `uniform` [N, 1] of it all."""
    cumulative = kept.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
    last = kept.shape[-1] - 1 - (kept > 0).flip(-1).int().argmax(-1)
    return drawn.minimum(last)


class Drafts(NamedTuple):
    """Which of a step's N samples belong together, each [G] or [N] int64: a sequence's newest token, and those behind
    its drafted ones.

    Attributes:
        slots, firsts, counts: of each of G sequences: its slot, its first sample, and how many are behind that.
        owners, offsets: of each sample: its sequence, and how far behind its first it comes.
    """

    slots: Tensor
    firsts: Tensor
    counts: Tensor
    owners: Tensor
    offsets: Tensor

    @classmethod
    def send(cls, samples: Sequence[Sample], device: torch.device) -> "Drafts":
        slots = np.array([sample.slot for sample in samples], np.int64)
        firsts = np.flatnonzero(np.diff(slots, prepend=-1))
        counts = np.diff(firsts, append=len(slots)) - 1
        owners = np.arange(len(firsts)).repeat(counts + 1)
        offsets = np.arange(len(slots)) - firsts[owners]
        arrays = (slots[firsts], firsts, counts, owners, offsets)
        return cls(**on_device(dict(zip(cls._fields, arrays, strict=True)), device))


def reject(
    token_ids: Tensor,
    logits: Tensor,
    draft_logits: Tensor,
    drafted: Tensor,
    samples: Sequence[Sample],
) -> Tensor:
    """Modified rejection sampling (Leviathan et al., 2023; Chen et al., 2023) of drafts drawn from a distribution q: a
    drafted d is accepted with probability min(1, p(d) / q(d)), p being the target's; what replaces it otherwise is
    drawn from max(0, p - q), so that what comes out has p.

    Args:
        token_ids: [N] as sampled, -1 where logits were not finite.
        logits: [N, V] of the target, at most so many of the draft.
        drafted: [N], from `draft_logits` by the rows' parameters.
        samples: the N of the target; their own numbers draw what replaces.

    Returns:
        [N] int64, what stands in each place: as drafted if that is accepted.
    """
    choices, at = Choices.send(samples, logits.device), drafted[:, None]
    numbers = torch.tensor([uniform(other_seed(s.seed), other_seed(s.position)) for s in samples], dtype=torch.float64)
    if logits.is_cuda:
        numbers = numbers.pin_memory().to(logits.device, non_blocking=True)
    is_narrowed = any(s.params.top_k > 0 or s.params.top_p < 1 or s.params.min_p > 0 for s in samples)
    p, q = (_kept(x, choices, is_narrowed) for x in (logits, draft_logits))
    p, q = p / p.sum(-1, keepdim=True), F.pad(q / q.sum(-1, keepdim=True), (0, p.shape[1] - q.shape[1]))
    is_accepted = numbers * q.gather(-1, at)[:, 0] < p.gather(-1, at)[:, 0]
    others = _drawn((p - q).clamp_(min=0), choices.column("uniform"))
    return torch.where(token_ids < 0, token_ids, torch.where(is_accepted, drafted, others))


def verify(token_ids: Tensor, drafts: Drafts, recent: Tensor) -> Tensor:
    """How far drafts hold: tokens count up to the first that is not as drafted.

    Where the tokens are those that the target samples by itself, this is modified rejection sampling of drafts of one
    token each. Such a draft d is a distribution with all its mass on d: it is to be accepted with the target's
    probability p(d), and what replaces it otherwise comes from p without d. A token drawn from p is both at once: it is
    d with probability p(d), and else one of the others in proportion to p. So a seed gives the same tokens with drafts
    as without, whatever is drafted and however far (Daliri et al., 2025, drafter invariance).

    Args:
        token_ids: [N] as sampled, -1 where logits were not finite.
        recent: [1 + K, slots], of each slot what was sampled last, which is brought up to date, and what was drafted.

    Returns:
        token_ids, `VOID` for those that follow a drafted token that was not accepted, and `VOID` - 1 if those were -1.
    """
    if takes(recent):
        from kvtool.kernels import sampling

        return sampling.verify(token_ids, drafts.slots, drafts.firsts, drafts.counts, recent, VOID)
    steps = torch.arange(len(recent) - 1, device=recent.device)
    rows = drafts.firsts[:, None] + steps.minimum(drafts.counts[:, None])
    is_right = (token_ids[rows] == recent[1:, drafts.slots].T) & (steps < drafts.counts[:, None])
    num_accepted = is_right.long().cumprod(1).sum(1)
    recent[0].index_copy_(0, drafts.slots, token_ids[drafts.firsts + num_accepted].clamp(min=0))
    return torch.where(drafts.offsets > num_accepted[drafts.owners], VOID - (token_ids < 0).long(), token_ids)
