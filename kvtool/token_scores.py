"""Log-probabilities of the tokens of a step, where requests ask for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from kvtool.kv.batch import on_device, to_host
from kvtool.request import Sample, ScheduledSpan, TokenLogprobs

SCORED_ROWS = 128  # of logits at a time: in float32 those of all rows fill the memory


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of tokens [N], and of the most likely ones at their places, ids and values [N, k]."""

    logprobs: Tensor
    top_ids: Tensor
    top_logprobs: Tensor

    def __len__(self) -> int:
        return len(self.logprobs)

    def to_host(self) -> "Scores":
        return Scores(to_host(self.logprobs), to_host(self.top_ids), to_host(self.top_logprobs))

    def rows(self, num_top: Sequence[int]) -> list[TokenLogprobs]:
        """As many of the most likely ones as each row asks for."""
        columns = (self.logprobs.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist())
        return [
            TokenLogprobs(logprob, ids[:k], values[:k])
            for logprob, ids, values, k in zip(*columns, num_top, strict=True)
        ]


def score_samples(samples: Sequence[Sample], logits: Tensor, token_ids: Tensor) -> Scores | None:
    """Scores of the samples that ask for them."""
    wanted = [(row, s.params.logprobs) for row, s in enumerate(samples) if s.params.logprobs is not None]
    if not wanted:
        return None
    rows = on_device({"rows": np.array([row for row, _ in wanted], np.int64)}, logits.device)["rows"]
    num_top = max(k for _, k in wanted)
    pieces = [token_logprobs(logits[at], token_ids[at].clamp(min=0), num_top) for at in rows.split(SCORED_ROWS)]
    return Scores(*map(torch.cat, zip(*pieces, strict=True)))


def score_prompts(spans: Sequence[ScheduledSpan], hidden: Tensor, head: Callable[[Tensor], Tensor]) -> list[Scores]:
    """Scores of all spans' targets, in pieces that follow each other.

    Args:
        hidden: [n, hidden_size], of all the spans' tokens.
        head: makes logits of hidden states.
    """
    starts = accumulate((span.length for span in spans), initial=0)
    rows = [start + i for start, span in zip(starts, spans, strict=False) for i in range(len(span.targets))]
    targets = [target for span in spans for target in span.targets]
    if not targets:
        return []
    num_top = max(span.num_top for span in spans)
    arrays = {"rows": np.array(rows, np.int64), "targets": np.array(targets, np.int64)}
    pieces = zip(*(x.split(SCORED_ROWS) for x in on_device(arrays, hidden.device).values()), strict=True)
    return [Scores(*token_logprobs(head(hidden[at]), target_ids, num_top)) for at, target_ids in pieces]


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
