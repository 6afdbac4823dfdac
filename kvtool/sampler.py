"""From logits to token ids, on the device, each row by its own parameters."""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kvtool.request import Sample

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


def sample(
    logits: Tensor, samples: Sequence[Sample], eos_token_ids: Sequence[int] = (), allowed: Tensor | None = None
) -> Tensor:
    """One token id for each row of `logits` [N, V], as [N] int64; -1 for a row that is not finite.

    The logits are adjusted first; temperatures below `COLDEST` then take the largest, others draw.

    Args:
        logits: as the model gives them; left as they are.
        samples: how each row is chosen from.
        eos_token_ids: ids that end an answer, held back by min_tokens.
        allowed: [N, ceil(V / 32)] int32, bit i % 32 of word i // 32 being set where token i may follow.
    """
    finite = logits.isfinite().all(-1)
    logits = adjust(logits, samples, eos_token_ids, allowed)
    token_ids = logits.argmax(-1)
    if any(s.params.temperature >= COLDEST for s in samples):
        warm = torch.tensor([s.params.temperature >= COLDEST for s in samples], device=logits.device)
        token_ids = torch.where(warm, _draw(logits, samples), token_ids)
    return torch.where(finite, token_ids, -1)


def adjust(
    logits: Tensor, samples: Sequence[Sample], eos_token_ids: Sequence[int] = (), allowed: Tensor | None = None
) -> Tensor:
    """`logits` [N, V] after grammar, min_tokens, logit_bias and penalties, in this order, as in vLLM.

    Where the grammar allows nothing but what min_tokens holds back, the grammar has the last word. A row that asks for
    nothing keeps its values; if none asks, the answer is `logits` itself.
    """
    if allowed is not None:
        bits = torch.arange(32, dtype=torch.int32, device=logits.device)
        may_follow = (allowed[:, :, None] >> bits & 1).flatten(1)[:, : logits.shape[1]] > 0
        logits = logits.masked_fill(~may_follow, -torch.inf)
    held_back = [
        {*eos_token_ids, *s.params.stop_token_ids} if s.num_generated < s.params.min_tokens else () for s in samples
    ]
    if any(held_back):
        others = logits.index_put(_at(held_back, logits), logits.new_tensor(-torch.inf))
        logits = torch.where((others > -torch.inf).any(-1, keepdim=True), others, logits)
    biases = [s.params.logit_bias for s in samples]
    if any(biases):
        values = [value for bias in biases for value in bias.values()]
        logits = logits.double()
        logits = logits.index_put(_at(biases, logits), logits.new_tensor(values), accumulate=True)
    rows = [row for row, s in enumerate(samples) if s.params.looks_back]
    if rows:
        penalised = _penalise(logits[rows].double(), [samples[row] for row in rows])
        logits = logits.double().index_copy(0, torch.tensor(rows, device=logits.device), penalised)
    return logits


def _penalise(logits: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Repetition penalty (Keskar et al., 2019) over prompt and answer, presence and frequency over the answer alone."""
    params = [s.params for s in samples]
    one = logits.new_ones(())
    answered = torch.zeros_like(logits).index_put_(_at([s.answer for s in samples], logits), one, accumulate=True)
    seen = answered.index_put(_at([s.prompt for s in samples], logits), one, accumulate=True) > 0
    repetition = _column([p.repetition_penalty for p in params], logits)
    logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    presence = _column([p.presence_penalty for p in params], logits)
    frequency = _column([p.frequency_penalty for p in params], logits)
    return logits - presence * (answered > 0) - frequency * answered


def _draw(logits: Tensor, samples: Sequence[Sample]) -> Tensor:
    """One id for each row [N] of adjusted logits [N, V], by inverse transform of the row's own uniform number.

    After the temperature min_p, top_k and top_p, in this order, keep the most likely tokens, always at least one.
    """
    params = [s.params for s in samples]
    temperature = _column([max(p.temperature, COLDEST) for p in params], logits)
    min_p, top_p = _column([p.min_p for p in params], logits), _column([p.top_p for p in params], logits)
    top_k = _column([p.top_k or logits.shape[-1] for p in params], logits)
    # Stable: among equals, which is kept must not depend on the batch.
    probs, ids = (logits.double() / temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    probs[probs < min_p * probs[:, :1]] = 0
    probs[torch.arange(probs.shape[-1], device=logits.device) >= top_k] = 0
    before = probs.cumsum(-1) - probs
    probs[before >= top_p * probs.sum(-1, keepdim=True)] = 0
    cumulative = probs.cumsum(-1)
    uniforms = _column([uniform(s.seed, s.position) for s in samples], logits)
    drawn = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)
    kept = (probs > 0).sum(-1, keepdim=True).clamp_(min=1)
    return ids.gather(-1, drawn.minimum(kept - 1))[:, 0]


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of `token_ids` [N], then ids and log-probabilities of the `num_top` most likely [N, num_top].

    By the model's own `logits` [N, V], in float32 or, if they are, float64: all are one logit less one normaliser, so a
    token has the very same number in both places. The greedy token, the first of equals, leads the most likely ones.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normaliser = logits.logsumexp(-1, keepdim=True)
    greedy = logits.argmax(-1, keepdim=True)
    top_ids = logits.scatter(-1, greedy, torch.inf).topk(num_top).indices
    chosen = logits.gather(-1, token_ids[:, None]) - normaliser
    return chosen[:, 0], top_ids, logits.gather(-1, top_ids) - normaliser


def _at(ids: Sequence[Iterable[int]], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Where in `logits` the ids of each row are, as an index."""
    pairs = [(row, token_id) for row, row_ids in enumerate(ids) for token_id in row_ids]
    rows, columns = torch.tensor(pairs, dtype=torch.int64, device=logits.device).reshape(-1, 2).unbind(1)
    return rows, columns


def _column(values: Sequence[float], logits: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]
