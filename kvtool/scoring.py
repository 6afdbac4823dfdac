"""Teacher-forced scoring through the packed store: every token reads exactly what decoding would let it read."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from kvtool.attention import PagedAttention, block_size
from kvtool.attention.latents import LatentQueries
from kvtool.config import Bits, EngineConfig, KVOptions
from kvtool.errors import ConfigError, UnsupportedError
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.codecs import check_fits
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.plan import BITS
from kvtool.kv.store import KVStore
from kvtool.memory import MemoryParts, allocate
from kvtool.models import load_config, load_model, resolve_model, weight_bytes
from kvtool.profiling import StepProfiler, traces_folder
from kvtool.runner import attention_layers, choose_device, choose_dtype, kv_spec

SCORED_ROWS = 128  # of logits at a time
SIXTEEN_BITS = KVOptions()
DEFAULT_FORMATS = "16,8,4,2"


@dataclass(frozen=True)
class Window:
    """Tokens that the model reads together, from an empty cache.

    Attributes:
        token_ids: [n], n from 2 up; the last one is only predicted, never read.
        first: the first one that is scored, from 1 up; each is predicted from all that come before it.
    """

    token_ids: Sequence[int]
    first: int = 1

    @property
    def num_read(self) -> int:
        return len(self.token_ids) - 1

    @property
    def targets(self) -> Sequence[int]:
        """[n - first], the tokens that are scored."""
        return self.token_ids[self.first :]


class ScoringModel:
    """A model, loaded once and scored under any number of KV formats, each with a packed store of its own.

    Of `config`, `max_num_batched_tokens` bounds the tokens that are computed together, and its `kv` is not used.

    Attributes:
        path: local folder of the model.
        model_config: what the checkpoint is.
        model: the decoder, on `device` in `dtype`.
        max_model_len: tokens of the longest window.

    Raises:
        KVToolError: the model cannot be loaded.
        UnsupportedError: on several devices.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.num_ranks * config.ep > 1:
            raise UnsupportedError(f"{config.rank_options}: a model is scored on one device; leave them out")
        folder = traces_folder(config.profile) if config.profile else None
        self.config = config
        self.device = choose_device(config.device)
        self.path = resolve_model(config.model)
        self.model_config = load_config(self.path)
        self.dtype = choose_dtype(config, self.model_config, self.device)
        with torch.inference_mode():
            self.model = load_model(
                self.path,
                self.model_config,
                dtype=self.dtype,
                device=self.device,
                load_format=config.load_format,
                seed=config.seed,
                max_model_len=config.max_model_len,
            )
        self.max_model_len = min(config.max_model_len or self.model_config.max_position, self.model_config.max_position)
        self._attention_layers = attention_layers(self.model_config)
        self._profiler = StepProfiler(folder, "scoring", self.device) if folder else None

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def layout(self, kv: KVOptions) -> KVLayout:
        """Where the bytes of a cache of this model lie under `kv`.

        Raises:
            ConfigError: options that contradict each other or do not fit the model.
            UnsupportedError: a head_dim that the bits cannot pack.
        """
        spec = kv_spec(self.model_config, self.dtype)
        return KVLayout(spec, resolve(kv, spec, block_size(self.config.attention_backend)))

    def fingerprint(self) -> str:
        """Names the weights, by some thousand elements of each tensor: training again changes nearly all of them."""
        digest = hashlib.sha256(repr(self.model_config).encode())
        for name, slot in self.model.slots():
            sample = slot.to.flatten()[:: max(1, slot.to.numel() // 4096)]
            digest.update(name.encode() + sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def log_probs(self, windows: Sequence[Window], kv: KVOptions) -> Iterator[tuple[Tensor, Tensor]]:
        """Log-probabilities of all next tokens at the scored places of all windows, in their order.

        They come a few rows at a time, in the same pieces whatever `kv` is: those of several formats can be drawn in
        turn and compared without either being kept.

        Yields:
            Log-probabilities [n, vocab_size] in float32 (float64 if the model is), and the scored tokens [n] int64.

        Raises:
            UnsupportedError: the format cannot hold what the model makes of these tokens.
        """
        for window, hidden in zip(windows, self.hidden_states(windows, kv), strict=True):
            yield from self.log_probs_of(window, hidden)

    def log_probs_of(self, window: Window, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What `log_probs` yields of one window, given what `hidden_states` does."""
        targets = torch.tensor(window.targets, device=self.device)
        for rows, ids in zip(hidden.split(SCORED_ROWS), targets.split(SCORED_ROWS), strict=True):
            with torch.inference_mode():  # not across the yield: it would hold in the caller, too
                logits = self.model.logits(rows)
                log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            yield log_probs, ids

    def hidden_states(self, windows: Sequence[Window], kv: KVOptions) -> Iterator[Tensor]:
        """Final hidden states at the places that predict a window's scored tokens, [n - first, hidden_size] of each.

        `kv` is checked and its store allocated before the first one comes.

        Raises:
            CapacityError: the store does not fit beside the model.
            UnsupportedError: the format cannot hold what the model makes of these tokens.
        """
        layout, batches = self.layout(kv), _batches(windows, self.config.max_num_batched_tokens)
        num_blocks = max(sum(layout.format.num_blocks(window.num_read) for window in batch) for batch in batches)
        store = allocate(layout, max(1, num_blocks), max(map(len, batches)), self.dtype, self.device)
        attention = PagedAttention(store, self._attention_layers, self.config.attention_backend)
        for batch in batches:
            yield from self._forward(batch, attention)
        if self._profiler:
            self._profiler.rest(partial(self._held, store))

    @torch.inference_mode()
    def _forward(self, batch: Sequence[Window], attention: PagedAttention) -> list[Tensor]:
        """Run windows together, each from its own empty memory; one that is longer than a step goes in pieces."""
        store, step = attention.store, self.config.max_num_batched_tokens
        free = iter(range(store.num_blocks))
        owned = [list(islice(free, store.format.num_blocks(window.num_read))) for window in batch]
        pieces: list[list[Tensor]] = [[] for _ in batch]
        for start in range(0, max(window.num_read for window in batch), step):
            spans = [
                Span(start, min(start + step, window.num_read), blocks, slot)
                for slot, (window, blocks) in enumerate(zip(batch, owned, strict=True))
            ]
            if self._profiler:
                self._profiler.begin_step()
            kv_batch = KVBatch.build(store.format, spans, self.device)
            read = [token for w, span in zip(batch, spans, strict=True) for token in w.token_ids[span.start : span.end]]
            ids = torch.tensor(read, device=self.device)
            hidden = self.model(ids, kv_batch.positions, partial(_attend, attention, kv_batch))
            store.seal(kv_batch)
            if self._profiler:
                self._profiler.end_step(partial(self._held, store))
            for rows, piece in zip(hidden.split([span.length for span in spans]), pieces, strict=True):
                piece.append(rows)
        check_fits(not store.take_fault().item())
        return [torch.cat(piece)[window.first - 1 :] for window, piece in zip(batch, pieces, strict=True)]

    def _held(self, store: KVStore) -> MemoryParts:
        """What the device holds for the model and this store."""
        tails = len(store.tails) // max(1, store.layout.tail_bytes)
        return MemoryParts.of(store.layout, store.num_blocks, tails, weight_bytes(self.model), None)


def _attend(
    attention: PagedAttention, batch: KVBatch, layer: int, q: Tensor | LatentQueries, key: Tensor, value: Tensor
) -> Tensor:
    return attention(layer, q, key, value, batch)


def _batches(windows: Sequence[Window], most: int) -> list[list[Window]]:
    """Windows in their order, as many together as read `most` tokens, or a longer one alone.

    Those of a single token, which the store takes for decodes, stay among themselves.
    """
    batches: list[list[Window]] = []
    room = 0
    for window in windows:
        if window.num_read > room or (window.num_read == 1) != (batches[-1][0].num_read == 1):
            batches.append([])
            room = most
        batches[-1].append(window)
        room -= window.num_read
    return batches


def parse_formats(text: str | None, base: KVOptions) -> dict[str, KVOptions]:
    """Formats by the words of a list such as "16,8,4,2,fp8,k8v4,plan:FILE", in its order.

    Args:
        text: None is 16 bits and what `base` asks for; if that is nothing, 16, 8, 4 and 2 bits.
        base: the options that all of them share; what means nothing for a word is left out of it.

    Raises:
        ConfigError: a word that names no bits, one that comes twice, or bits in `base` as well as in `text`.
    """
    asked = _word(base)
    if text is None and asked is not None:
        return {"16": SIXTEEN_BITS} if asked == "16" else {"16": SIXTEEN_BITS, asked: base}
    if asked is not None:
        raise ConfigError("--formats names the bits of every format; leave out --nbits and --kv-plan")
    words = [word.strip() for word in (text if text is not None else DEFAULT_FORMATS).split(",")]
    formats = {word: _format(word, base) for word in words}
    if len(formats) < len(words):
        raise ConfigError(f"--formats {text}: names a format twice")
    return formats


def _word(kv: KVOptions) -> str | None:
    """The word for the bits of `kv`; None where it asks for none."""
    if kv.plan:
        return f"plan:{kv.plan}"
    if not (kv.nbits or kv.nbits_key or kv.nbits_value):
        return None
    key, value = (bits or kv.nbits or "16" for bits in (kv.nbits_key, kv.nbits_value))
    return key if key == value else f"k{key}v{value}"


def _format(word: str, base: KVOptions) -> KVOptions:
    if word.startswith("plan:"):
        return replace(base, plan=word.removeprefix("plan:"))
    pair = re.fullmatch("k(.+)v(.+)", word, re.IGNORECASE)
    key, value = pair.groups() if pair else (word, word)
    if key not in BITS or value not in BITS:
        raise ConfigError(f"--formats {word!r:.40}: write {', '.join(BITS)}, a pair such as k8v4, or plan:FILE")
    kv = replace(
        base,
        nbits_key=cast(Bits, key),
        nbits_value=cast(Bits, value),
        axis_key=None if key == "fp8" else base.axis_key,
        axis_value=None if value == "fp8" else base.axis_value,
    )
    if {key, value} == {"16"}:
        return SIXTEEN_BITS
    return kv if {key, value} - {"16", "fp8"} else replace(kv, rotate=None, symmetric=None, q_group_size=None)
