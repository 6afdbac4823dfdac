"""Attention over the packed store against its definition, without the engine."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.attention import PagedAttention
from kvtool.attention.latents import LatentQueries
from kvtool.attention.layer import AttentionLayer
from kvtool.attention.reference import attention_reference
from kvtool.config import KVOptions
from kvtool.kv.batch import KVBatch, Span
from kvtool.kv.codecs import CODECS
from kvtool.kv.format import KVFormat, StreamFormat, resolve
from kvtool.kv.hadamard import hadamard
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.store import KVStore

OPTIONS = [
    KVOptions(),
    KVOptions(nbits="8"),
    KVOptions(nbits="4"),
    KVOptions(nbits="2", q_group_size=32),
    KVOptions(nbits="4", residual_length=64),
    KVOptions(nbits="2", q_group_size=32, residual_length=40),
    KVOptions(nbits="4", axis_key="token"),
    KVOptions(nbits="8", axis_key="token", symmetric=True),
    KVOptions(nbits="4", axis_key="token", rotate=True),
    KVOptions(nbits="2", axis_key="token", rotate=True, residual_length=32),
    KVOptions(nbits="fp8"),
    KVOptions(nbits_key="16", nbits_value="2"),
    KVOptions(nbits_key="4", nbits_value="16"),
    KVOptions(nbits="4", axis_key="channel", axis_value="channel", symmetric=True),
    KVOptions(nbits="4", axis_key="token", axis_value="channel"),
]

# Heads of keys and values, and latents with their rope key.
SHAPES = [
    (KVSpec(1, StreamSpec(kv_heads, 32), StreamSpec(kv_heads, 32), 8), AttentionLayer(num_heads, kv_heads, 32, 0.2))
    for num_heads, kv_heads in [(1, 1), (4, 2), (6, 1)]
]
SHAPES.append(
    (KVSpec(1, StreamSpec(1, 16), StreamSpec(1, 64), 8, latent=True), AttentionLayer(4, 1, 80, 0.2, latent_dim=64))
)


def seen(x: torch.Tensor, fmt: StreamFormat, block_size: int) -> torch.Tensor:
    """`x` [T, heads, D] as its packed blocks give it back; the last, unfinished block is filled with its last token."""
    missing = -len(x) % block_size
    padded = (
        torch.cat([x, x[-1:].expand(missing, -1, -1)]) if fmt.axis == "token" else x[: len(x) - len(x) % block_size]
    )
    blocks = padded.unflatten(0, (-1, block_size)).transpose(1, 2)
    codec = CODECS[fmt.bits]
    decoded = codec.decode(codec.encode(blocks, fmt), fmt, x.dtype)
    return decoded.transpose(1, 2).flatten(0, 1)[: len(x)]


def defined(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, fmt: KVFormat, layer: AttentionLayer):
    """`attention_reference` on what blocks of `fmt` make of `key` and `value`."""
    formats = fmt.layers[0]
    rotate = [hadamard if stream.rotate else (lambda x: x) for stream in (formats.key, formats.value)]
    seen_key = rotate[0](seen(rotate[0](key), formats.key, fmt.block_size))
    seen_value = rotate[1](seen(rotate[1](value), formats.value, fmt.block_size))
    return attention_reference(q, key, value, seen_key, seen_value, fmt, layer)


class Stored:
    """One sequence in a store of one layer, fed in spans."""

    def __init__(self, fmt: KVFormat, spec: KVSpec, layer: AttentionLayer, num_tokens: int, seed: int) -> None:
        self.fmt = fmt
        self.store = KVStore(KVLayout(spec, fmt), num_blocks=40, num_tail_slots=3, dtype=torch.float64)
        self.store.blocks.copy_(torch.randint(0, 100, self.store.blocks.shape, dtype=torch.uint8))  # poison
        self.attend = PagedAttention(self.store, [layer])
        order = torch.randperm(40, generator=torch.Generator().manual_seed(seed)).tolist()
        self.blocks = order[: fmt.num_blocks(num_tokens)]

    def run(
        self, q: torch.Tensor | LatentQueries, key: torch.Tensor, value: torch.Tensor, cuts: list[int]
    ) -> torch.Tensor:
        outs = []
        for start, end in zip([0, *cuts], [*cuts, len(key)], strict=True):
            batch = KVBatch.build(self.fmt, [Span(start, end, self.blocks[: self.fmt.num_blocks(end)], 1)])
            queries = q[start:end] if isinstance(q, torch.Tensor) else q.rows(slice(start, end))
            outs.append(self.attend(0, queries, key[start:end], value[start:end], batch))
            self.store.seal(batch)
        return torch.cat(outs)


@settings(deadline=None, max_examples=60)
@given(
    options=st.sampled_from(OPTIONS),
    num_tokens=st.integers(1, 200),
    shape=st.sampled_from(SHAPES),
    window=st.sampled_from([None, 1, 40]),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_any_chunking_equals_the_definition(options, num_tokens, shape, window, seed, data):
    torch.manual_seed(seed)
    spec, layer = shape[0], replace(shape[1], sliding_window=window)
    fmt = resolve(options, spec)
    q = torch.randn(num_tokens, layer.num_heads, layer.head_dim, dtype=torch.float64)
    key, value = (torch.randn(num_tokens, s.heads, s.dim, dtype=torch.float64) for s in (spec.key, spec.value))
    cuts = sorted(data.draw(st.sets(st.integers(1, num_tokens - 1), max_size=8))) if num_tokens > 1 else []

    out = Stored(fmt, spec, layer, num_tokens, seed).run(q, key, value, cuts)

    assert out.shape == (num_tokens, layer.num_heads, spec.value.dim)
    torch.testing.assert_close(out, defined(q, key, value, fmt, layer), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(options=st.sampled_from(OPTIONS), num_tokens=st.integers(1, 250), seed=st.integers(0, 2**31), data=st.data())
def test_expanded_latents_equal_absorbed_ones(options, num_tokens, seed, data):
    """Prompts in any chunking, of which some expand and some absorb, against the absorbed definition."""
    torch.manual_seed(seed)
    (spec, layer), (num_nope, num_value) = SHAPES[-1], (12, 20)
    fmt = resolve(options, spec)
    key, value = (torch.randn(num_tokens, 1, s.dim, dtype=torch.float64) for s in (spec.key, spec.value))
    queries = LatentQueries(
        torch.randn(num_tokens, layer.num_heads, num_nope, dtype=torch.float64),
        torch.randn(num_tokens, layer.num_heads, layer.head_dim, dtype=torch.float64),
        torch.randn(layer.num_heads, num_nope + num_value, spec.value.dim, dtype=torch.float64) / 8,
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, num_tokens - 1), max_size=4))) if num_tokens > 1 else []

    out = Stored(fmt, spec, layer, num_tokens, seed).run(queries, key, value, cuts)

    expected = queries.values(defined(queries.absorbed(), key, value, fmt, layer))
    assert out.shape == (num_tokens, layer.num_heads, num_value)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_a_prompt_expands_where_that_costs_less():
    """Multiplications of both ways, counted pair by pair at DeepSeek-V2-Lite's sizes."""
    latent, rope, nope, value = 512, 64, 128, 128
    queries = LatentQueries(torch.empty(1, 1, nope), torch.empty(1, 1, latent + rope), torch.empty(1, 256, latent))
    for start, end in ((0, 2), (0, 5000), (1000, 1150), (1000, 1155), (100_000, 100_170), (100_000, 100_171)):
        batch = KVBatch.build(resolve(KVOptions(), SHAPES[-1][0]), [Span(start, end, range(-(-end // 64)), 0)])
        pairs = sum(t + 1 for t in range(start, end))
        absorbed = (end - start) * latent * (nope + value) + pairs * (2 * latent + rope)
        expanded = end * latent * (nope + value) + pairs * (nope + rope + value)
        assert queries.expand(batch.prompts.spans) == (expanded < absorbed)
