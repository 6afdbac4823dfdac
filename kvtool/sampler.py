"""From logits to token ids, on the device, each row by its own parameters."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from kvtool.request import Sample

COLDEST = 1e-5  # a lower temperature is greedy in all but name


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on a request's seed and the token's position alone, so not on the batch."""
    digest = hashlib.blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(
    logits: Tensor, samples: Sequence[Sample], eos_token_ids: Sequence[int] = (), allowed: Tensor | None = None
) -> Tensor:
    """One token id for each row of `logits` [N, V], as [N] int64.

    Temperatures below `COLDEST` take the largest logit. Otherwise top_k and then top_p keep the most likely tokens
    (always at least one), and the row's uniform number picks among them by inverse transform. A row that is not finite
    gives -1.
    """
    params = [s.params for s in samples]
    uniforms = [uniform(s.seed, s.position) for s in samples]
    greedy = logits.argmax(-1)
    greedy = torch.where(logits.isfinite().all(-1), greedy, -1)
    if all(p.temperature < COLDEST for p in params):
        return greedy

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    temperature = column([max(p.temperature, COLDEST) for p in params])
    top_k = column([p.top_k or logits.shape[-1] for p in params])
    top_p = column([p.top_p for p in params])
    probs, ids = (logits.double() / temperature).softmax(-1).sort(-1, descending=True)
    probs[torch.arange(probs.shape[-1], device=logits.device) >= top_k] = 0
    before = probs.cumsum(-1) - probs
    probs[before >= top_p * probs.sum(-1, keepdim=True)] = 0
    cumulative = probs.cumsum(-1)
    drawn = torch.searchsorted(cumulative, column(list(uniforms)) * cumulative[:, -1:], right=True)
    kept = (probs > 0).sum(-1, keepdim=True).clamp_(min=1)
    sampled = ids.gather(-1, drawn.minimum(kept - 1))[:, 0]
    return torch.where((temperature[:, 0] > COLDEST) & (greedy >= 0), sampled, greedy)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.double().log_softmax(-1)
    top = logprobs.topk(num_top, -1)
    return logprobs.gather(-1, token_ids[:, None])[:, 0], top.indices, top.values
