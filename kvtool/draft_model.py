"""The model that drafts for another: which one it is, its share of the cache, what it proposes, what holds of that."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from kvtool.attention import block_size
from kvtool.config import EngineConfig, KVOptions
from kvtool.errors import ConfigError
from kvtool.kv.batch import on_device
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.memory import CPU_KV_CACHE_MEMORY
from kvtool.models import ModelConfig, load_config, resolve_model
from kvtool.models.kv import kv_spec
from kvtool.parallel import Parallel
from kvtool.request import Draft, Sample, ScheduledBatch, ScheduledSpan
from kvtool.sampler import reject
from kvtool.tokenizer import vocabulary

EMBEDDED_DRAFTS = {"tiny": "tiny-draft"}
DRAFT_CACHE_SHARE = 0.8  # of what a GPU has left, before it is known what else a step needs
REJECTED_ROWS = 32  # of probabilities in float64


def find_draft(config: EngineConfig, path: Path, model: ModelConfig) -> Path | None:
    """The folder of the model that drafts for the one in `path`, if one is asked for.

    Raises:
        ConfigError: nobody says which one it is, or it has other tokens; what pads their embeddings may differ.
    """
    asked = config.speculation
    if asked is None or asked.method != "draft":
        return None
    name = asked.draft_model or EMBEDDED_DRAFTS.get(config.model)
    if name is None:
        raise ConfigError("--speculate draft needs --draft-model: a smaller model of the same vocabulary")
    draft_path = resolve_model(name, "--draft-model")
    draft = load_config(draft_path)
    known = [vocabulary(folder, each.vocab_size) for folder, each in ((path, model), (draft_path, draft))]
    is_same = known[0] == known[1] if all(known) else model.vocab_size == draft.vocab_size
    if not is_same or draft.vocab_size > model.vocab_size:
        raise ConfigError(f"--draft-model {name}: its vocabulary is not that of {config.model}; choose another model")
    return draft_path


def share_cache(
    path: Path, config: EngineConfig, layout: KVLayout, dtype: torch.dtype, device: torch.device, parallel: Parallel
) -> tuple[EngineConfig, EngineConfig]:
    """Configurations of the draft model in `path`, with a cache for as many tokens as that of the model it drafts for,
    and of that model, with what is left.

    Args:
        config: of both together.
        layout: of the model's cache.
        dtype, device, parallel: of the model. The draft model is whole on every rank.
    """
    model = load_config(path)
    nbits = config.speculation.draft_nbits if config.speculation else None
    kv = replace(KVOptions(nbits=nbits) if nbits else config.kv, plan=None, layer_bits=None)
    spec = kv_spec(model, dtype)
    with parallel.agreeing():
        cache = KVLayout(spec, resolve(kv, spec, block_size(config.attention_backend)))
    drafts, own = (x.block_bytes / x.format.block_size for x in (cache, layout))  # bytes of a token
    memory, part = config.kv_cache_memory, drafts / (drafts + own)
    if memory is None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        share = int(DRAFT_CACHE_SHARE * part * max(0, free - total * (1 - config.gpu_memory_utilization)))
    else:
        memory = CPU_KV_CACHE_MEMORY if memory is None else memory
        share = int(part * memory)
        config = replace(config, kv_cache_memory=memory - share)
    (share,) = parallel.least(share)
    length = config.max_model_len
    asked = replace(
        config,
        model=str(path),
        max_model_len=length and min(length, model.max_position),
        kv_cache_memory=share,
        kv=kv,
        swap_space=0,
        tp=1,
        ep=1,
        nnodes=1,
        speculation=None,
        profile=None,
        quantization=EngineConfig.quantization,
        quantize_head=EngineConfig.quantize_head,
        keep_layers=EngineConfig.keep_layers,
        calibration=None,
        handoff=None,
    )
    return asked, config


@dataclass(frozen=True)
class Proposals:
    """Tokens drawn by a draft model's probabilities.

    Attributes:
        logits: [n, its vocab_size], that they were drawn from.
        places: the row of each token's, by slot and by how many were drafted before it.
    """

    logits: Tensor
    places: Mapping[tuple[int, int], int]


class DraftModel:
    """Proposes tokens, and settles which of those drawn by its own probabilities hold.

    Args:
        draw: computes a step of it and chooses its samples, in `newest`; the logits that they are chosen by.
        newest: [slots] int64.
        vocab_size: of it.
        recent: [1 + K, slots] int64, of the model that it drafts for: what was sampled last, and what is drafted.
    """

    def __init__(
        self, draw: Callable[[ScheduledBatch], Tensor], newest: Tensor, vocab_size: int, recent: Tensor
    ) -> None:
        self._draw, self._newest, self._vocab_size, self._recent = draw, newest, vocab_size, recent
        self._proposals: Proposals | None = None  # of the step that is being launched

    def propose(self, drafts: Sequence[Draft]) -> None:
        """Read what it has yet to read, and propose tokens one after the other, in `recent`."""
        last = self._vocab_size - 1  # the vocabularies are the same, but what pads them may not be
        asked = [(draft.question, draft.num_tokens) for draft in drafts if draft.question]
        asked.sort(key=lambda item: item[0].span.length > 1)
        spans = [
            msgspec.structs.replace(question.span, token_ids=[min(token, last) for token in question.span.token_ids])
            for question, _ in asked
        ]
        pieces: list[Tensor] = []
        places: dict[tuple[int, int], int] = {}
        for index in range(max(1, *(count for _, count in asked))):
            samples = [
                msgspec.structs.replace(question.sample, span=row, position=question.sample.position + index)
                for row, (question, count) in enumerate(asked)
                if count > index
            ]
            logits = self._draw(ScheduledBatch(spans=spans, samples=samples))
            self._recent[1 + index].copy_(self._newest)
            drawn = [question for question, count in asked if count > index]
            if any(question.may_reject for question in drawn):
                first = sum(map(len, pieces))
                pieces.append(logits.clone())
                places |= {(q.span.slot, index): first + row for row, q in enumerate(drawn) if q.may_reject}
            asked = [(question, count) for question, count in asked if count > index + 1]
            ends = [(question.span, question.span.end + index) for question, _ in asked]
            spans = [
                ScheduledSpan(id=span.id, slot=span.slot, start=end, end=end + 1, blocks=span.blocks)
                for span, end in ends
            ]
        self._proposals = Proposals(torch.cat(pieces), places) if pieces else None

    def settle(self, samples: Sequence[Sample], logits: Tensor, token_ids: Tensor) -> None:
        """Replace what is sampled behind tokens drafted by a probability, a few rows of probabilities at a time.

        Args:
            samples, logits, token_ids: of the step that verifies them, [N], [N, V] and [N] int64.
        """
        if (proposals := self._proposals) is None:
            return
        starts = dict(reversed([(sample.slot, row) for row, sample in enumerate(samples)]))
        found = [
            (row, proposals.places[key], *key)
            for row, sample in enumerate(samples)
            if (key := (sample.slot, row - starts[sample.slot])) in proposals.places
        ]
        for first in range(0, len(found), REJECTED_ROWS):
            columns = np.array(found[first : first + REJECTED_ROWS], np.int64).T
            rows, at, slots, offsets = on_device({"columns": columns}, logits.device)["columns"]
            chosen = [samples[row] for row in columns[0]]
            drafted = self._recent[1 + offsets, slots]
            settled = reject(token_ids[rows], logits[rows], proposals.logits[at], drafted, chosen)
            token_ids.index_copy_(0, rows, settled)
