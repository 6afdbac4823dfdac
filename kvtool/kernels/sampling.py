"""One token for each row of logits, without a word from the host and without sorting a vocabulary.

A first kernel looks at all logits, chunk by chunk. A second one, a program for each row, bisects for the boundary that
top_k and top_p draw: what lies above a value is found in those chunks alone whose largest logit does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvtool.kernels.launch import await_inputs, chained, power_of_2

CHUNK = 1024
GREEDY_CHUNK = 4096
GROUP = 4  # chunks that are read at a time
COLUMNS = 10  # of parameters


def choose(
    logits: Tensor,
    parameters: Tensor,
    bias_ends: Tensor,
    bias_ids: Tensor,
    biases: Tensor,
    allowed: Tensor | None,
    counts: Tensor | None,
    newest: Tensor,
) -> Tensor:
    """What `kvtool.sampler.choose` defines, in fp32: another token than in float64 is chosen only where the uniform
    number lies within 1e-5 of the boundary between the two, or one's share within 1e-5 of what top_p or min_p keep.

    Args:
        logits: [N, V], as the model gives them.
        parameters: [N, 10] float64, `kvtool.sampler.Row` for each.
        bias_ends: [N + 1] float64, where each row's biases end, after a 0; bias_ids, biases: [E] float64.
        allowed: [N, ceil(V / 32)] int32, or None where all is allowed.
        counts: [slots, V] int32, twice how often the answer holds a token, and 1 more if the prompt does; counts on.
        newest: [slots] int64, where each slot's token goes, 0 for a row that is not finite.

    Returns:
        [N] int64, -1 for a row that is not finite.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    chunks = -(-vocab // CHUNK)
    width = power_of_2(max(chunks, GROUP))
    stats = torch.empty(3, rows, width, dtype=torch.float32, device=logits.device)
    scratch = torch.empty(3, rows, width, dtype=torch.int32, device=logits.device)
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    inputs = (
        logits,
        logits.stride(0),
        vocab,
        parameters,
        bias_ends,
        bias_ids,
        biases,
        logits if allowed is None else allowed,
        logits if counts is None else counts,
    )
    kinds = {"MASKED": allowed is not None, "COUNTED": counts is not None, "CHUNK": CHUNK, "COLUMNS": COLUMNS}
    _survey[(rows, chunks)](*inputs, stats, WIDTH=width, **kinds, num_warps=4)
    _choose[(rows,)](*inputs, stats, scratch, newest, token_ids, chunks, WIDTH=width, GROUP=GROUP, **kinds, num_warps=8)
    return token_ids


def greedy(logits: Tensor, newest: Tensor, slots: Tensor) -> Tensor:
    """What `kvtool.sampler.greedy` defines, in two launches."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    chunks = -(-vocab // GREEDY_CHUNK)
    width = power_of_2(chunks)
    largest = torch.empty(rows, width, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, width, dtype=torch.int32, device=logits.device)
    token_ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    options = {"WIDTH": width, "num_warps": 4, **chained(logits.device)}
    _largest[(rows, chunks)](logits, logits.stride(0), vocab, largest, ids, CHUNK=GREEDY_CHUNK, **options)
    _first_largest[(rows,)](largest, ids, chunks, slots, newest, token_ids, **options)
    return token_ids


def verify(token_ids: Tensor, slots: Tensor, firsts: Tensor, counts: Tensor, recent: Tensor, void: int) -> Tensor:
    """What `kvtool.sampler.verify` defines, in one launch, a program for each sequence; `void` is its `VOID`."""
    settled = torch.empty_like(token_ids)
    width = power_of_2(len(recent))
    _verify[(len(slots),)](
        token_ids, slots, firsts, counts, recent, recent.stride(0), settled, WIDTH=width, VOID=void, num_warps=1
    )
    return settled


def known(ids: Tensor, recent: Tensor) -> Tensor:
    """What `kvtool.cuda_graph.known` defines, in one launch."""
    assert ids.is_contiguous() and recent.is_contiguous()
    out, block = torch.zeros_like(ids), 256  # ids also where kernels are compiled without being run
    _known[(-(-len(ids) // block),)](ids, recent, out, len(ids), BLOCK=block, num_warps=1)
    return out


@triton.jit(do_not_specialize=["count"])
def _known(ids, recent, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    given = tl.load(ids + at, mask=at < count, other=0)
    token = tl.load(recent - 1 - given, mask=given < 0, other=0)
    tl.store(out + at, tl.where(given < 0, token, given), mask=at < count)


@triton.jit
def _verify(
    token_ids, slots, firsts, counts, recent, row_stride, settled, WIDTH: tl.constexpr, VOID: tl.constexpr
):  # fmt: skip
    sequence = tl.program_id(0)
    count = tl.load(counts + sequence)
    newest = recent + tl.load(slots + sequence)
    first = tl.load(firsts + sequence)
    at = tl.arange(0, WIDTH)
    tokens = tl.load(token_ids + first + at, mask=at <= count, other=0)
    drafted = tl.load(newest + (1 + at) * row_stride, mask=at < count, other=0)
    num_accepted = tl.min(tl.where((tokens == drafted) & (at < count), WIDTH, at), 0)
    last = tl.sum(tl.where(at == num_accepted, tokens, 0), 0)
    tl.store(newest, tl.maximum(last, 0))
    settled_tokens = tl.where(at > num_accepted, VOID - (tokens < 0).to(tl.int64), tokens)
    tl.store(settled + first + at, settled_tokens, mask=at <= count)


@triton.jit
def _largest(logits, row_stride, vocab, largest, ids, CHUNK: tl.constexpr, WIDTH: tl.constexpr, CHAINED: tl.constexpr):
    """Program (row, chunk): the largest logit, NaN where one is not finite, and the first id that has it."""
    await_inputs(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    z = tl.load(logits + row * row_stride + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    is_finite = tl.min(((tl.abs(z) < float("inf")) | (at >= vocab)).to(tl.int32), 0) == 1
    tl.store(largest + row * WIDTH + chunk, tl.where(is_finite, tl.max(z, 0), float("nan")))
    tl.store(ids + row * WIDTH + chunk, chunk * CHUNK + tl.argmax(z, 0).to(tl.int32))


@triton.jit
def _first_largest(largest, ids, chunks, slots, newest, token_ids, WIDTH: tl.constexpr, CHAINED: tl.constexpr):
    await_inputs(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, WIDTH)
    z = tl.load(largest + row * WIDTH + chunk, mask=chunk < chunks, other=float("-inf"))
    is_finite = tl.max((z != z).to(tl.int32), 0) == 0
    top = tl.max(tl.where(z != z, float("-inf"), z), 0)
    first = tl.min(tl.where(z == top, chunk, WIDTH - 1), 0)
    token = tl.where(is_finite, tl.load(ids + row * WIDTH + first), -1).to(tl.int64)
    tl.store(token_ids + row, token)
    tl.store(newest + tl.load(slots + row), tl.maximum(token, 0))


UNALIGNED = ["parameters", "bias_ends", "bias_ids", "biases"]  # they lie behind each other


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _survey(
    logits,
    row_stride,
    vocab,
    parameters,
    bias_ends,
    bias_ids,
    biases,
    allowed,
    counts,
    stats,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    COUNTED: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (row, chunk): the largest score, the first id that has it, and the sum of exponentials beside it.

    A NaN stands for the largest where the model's logits are not finite.
    """
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inputs = (logits + row * row_stride, parameters + row * COLUMNS, bias_ends + row, bias_ids, biases)
    raw = tl.load(logits + row * row_stride + ids, mask=ids < vocab, other=0).to(tl.float32)
    is_finite = tl.min((tl.abs(raw) < float("inf")).to(tl.int32), 0) == 1
    z = _scores(ids, ids < vocab, row, vocab, inputs, allowed, counts, MASKED, COUNTED)
    most = tl.max(z, 0)
    mass = tl.sum(tl.exp(z - tl.where(most == float("-inf"), 0.0, most)), 0)
    at = stats + row * WIDTH + chunk
    plane = tl.num_programs(0).to(tl.int64) * WIDTH
    tl.store(at, tl.where(is_finite, most, float("nan")))
    tl.store(at + plane, mass)
    tl.store(at + 2 * plane, tl.argmax(z, 0).to(tl.float32))


@triton.jit(do_not_specialize_on_alignment=UNALIGNED)
def _choose(
    logits,
    row_stride,
    vocab,
    parameters,
    bias_ends,
    bias_ids,
    biases,
    allowed,
    counts,
    stats,
    scratch,
    newest,
    token_ids,
    chunks,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
    COUNTED: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64) * WIDTH
    chunk = tl.arange(0, WIDTH)
    parameters += row * COLUMNS
    inputs = (logits + row * row_stride, parameters, bias_ends + row, bias_ids, biases)
    stats += row * WIDTH
    maxima = tl.load(stats + chunk, mask=chunk < chunks, other=float("-inf"))
    is_finite = tl.max((maxima != maxima).to(tl.int32), 0) == 0
    top = tl.max(tl.where(maxima != maxima, float("-inf"), maxima), 0)
    slot = tl.load(parameters).to(tl.int64)
    token = -1
    if is_finite:
        if (tl.load(parameters + 1) == 0) | (top == float("-inf")):
            first = tl.min(tl.where(maxima == top, chunk, WIDTH), 0)
            token = first * CHUNK + tl.load(stats + 2 * plane + first).to(tl.int32)
        else:
            lists = scratch + row * WIDTH
            # What is kept: all above `bound`, and of its equals the first `quota`.
            min_p = tl.load(parameters + 4).to(tl.float32)
            bound = tl.where(min_p > 0, top + tl.log(min_p), float("-inf"))
            quota = vocab
            top_k = tl.load(parameters + 2).to(tl.int32)
            top_p = tl.load(parameters + 3).to(tl.float32)
            limited = top_k > 0
            masses = tl.load(stats + plane + chunk, mask=chunk < chunks, other=0)
            total = tl.sum(tl.where(maxima > float("-inf"), masses * tl.exp(maxima - top), 0.0), 0)
            if limited:
                bound, count, mass = _boundary(
                    top_k, bound, top, maxima, chunk, lists, row, vocab, inputs, allowed, counts,
                    False, GROUP, CHUNK, MASKED, COUNTED,
                )  # fmt: skip
                quota = top_k - count
            if top_p < 1:
                if limited | (min_p > 0):
                    total = _kept_mass(
                        bound, quota, top, maxima, chunk, lists, row, vocab, inputs, allowed, counts,
                        GROUP, CHUNK, MASKED, COUNTED,
                    )  # fmt: skip
                lower, count, mass = _boundary(
                    top_p * total, bound, top, maxima, chunk, lists, row, vocab, inputs, allowed, counts,
                    True, GROUP, CHUNK, MASKED, COUNTED,
                )  # fmt: skip
                weight = tl.exp(lower - top)
                # As many equals as it takes to reach top_p.
                needed = tl.minimum(tl.ceil((top_p * total - mass) / tl.maximum(weight, 1e-38)), vocab).to(tl.int32)
                quota = tl.where(lower > bound, needed, tl.minimum(quota, needed))
                bound = lower
            uniform = tl.load(parameters + 9).to(tl.float32)
            token = _drawn(
                uniform, bound, quota, top, maxima, chunk, lists, plane, row, vocab, inputs, allowed, counts,
                GROUP, CHUNK, MASKED, COUNTED,
            )  # fmt: skip
        if COUNTED:  # noqa: SIM102 (one is known when compiling, the other when running)
            if tl.load(parameters + 8) != 0:
                tl.atomic_add(counts + slot * vocab + token, 2)
    tl.store(newest + slot, tl.maximum(token, 0).to(tl.int64))
    tl.store(token_ids + row, token.to(tl.int64))


@triton.jit
def _scores(ids, inside, row, vocab, inputs, allowed, counts, MASKED: tl.constexpr, COUNTED: tl.constexpr):
    """Logits after grammar, biases and penalties, over the temperature; -inf where an id is not `inside`."""
    logits, parameters, bias_ends, bias_ids, biases = inputs
    z = tl.load(logits + ids, mask=inside, other=float("-inf")).to(tl.float32)
    if MASKED:
        word = tl.load(allowed + row * tl.cdiv(vocab, 32) + ids // 32, mask=inside, other=0)
        z = tl.where((word >> (ids % 32)) & 1 != 0, z, float("-inf"))
    for index in range(tl.load(bias_ends).to(tl.int32), tl.load(bias_ends + 1).to(tl.int32)):
        z += tl.where(ids == tl.load(bias_ids + index).to(tl.int32), tl.load(biases + index).to(tl.float32), 0.0)
    if COUNTED:  # noqa: SIM102
        if tl.load(parameters + 8) != 0:
            slot = tl.load(parameters).to(tl.int64)
            repetition = tl.load(parameters + 5).to(tl.float32)
            presence = tl.load(parameters + 6).to(tl.float32)
            frequency = tl.load(parameters + 7).to(tl.float32)
            count = tl.load(counts + slot * vocab + ids, mask=inside, other=0)
            z = tl.where(count > 0, tl.where(z > 0, z / repetition, z * repetition), z)
            z -= tl.where(count > 1, presence, 0.0) + frequency * (count >> 1).to(tl.float32)
    temperature = tl.load(parameters + 1).to(tl.float32)
    return z / tl.where(temperature == 0, 1.0, temperature)


@triton.jit
def _listed(chosen, chunk, lists):
    """Note the `chosen` chunks down, in order; returns how many they are."""
    tl.debug_barrier()  # until the last list has been read
    tl.store(lists + tl.cumsum(chosen.to(tl.int32), 0) - 1, chunk, mask=chosen)
    tl.debug_barrier()
    return tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def _listed_scores(
    start, count, lists, row, vocab, inputs, allowed, counts,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Scores of the next chunks on the list, [GROUP, CHUNK]."""
    at = start + tl.arange(0, GROUP)
    ids = tl.load(lists + at, mask=at < count, other=0)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = (at < count)[:, None] & (ids < vocab)
    return _scores(ids, inside, row, vocab, inputs, allowed, counts, MASKED, COUNTED)


@triton.jit
def _boundary(
    target, bound, top, maxima, chunk, lists, row, vocab, inputs, allowed, counts,
    BY_MASS: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """The largest score of which those at least as large reach `target`, by number or by mass, or else `bound`.

    Returns it with the number and the mass of those that are larger. Mass is exp(score - top).
    """
    nearest = top  # the largest score of which it is not known whether those above it fall short
    count = 0
    mass = 0.0
    step = 2.0
    while nearest > bound:
        pivot = tl.minimum(tl.maximum(0.5 * bound + 0.5 * nearest, top - step), nearest)
        pivot = tl.where(pivot > bound, pivot, nearest)
        chosen = maxima >= pivot
        num_listed = _listed(chosen, chunk, lists)
        count_above = 0
        mass_above = 0.0
        least = float("inf")
        below = tl.max(tl.where(chosen, float("-inf"), maxima), 0)
        for start in range(0, num_listed, GROUP):
            z = _listed_scores(
                start, num_listed, lists, row, vocab, inputs, allowed, counts, GROUP, CHUNK, MASKED, COUNTED
            )
            above = z >= pivot
            count_above += tl.sum(tl.sum(above.to(tl.int32), 1), 0)
            mass_above += tl.sum(tl.sum(tl.where(above, tl.exp(z - top), 0.0), 1), 0)
            least = tl.minimum(least, tl.min(tl.min(tl.where(above, z, float("inf")), 1), 0))
            below = tl.maximum(below, tl.max(tl.max(tl.where(above, float("-inf"), z), 1), 0))
        reached = mass_above >= target if BY_MASS else count_above >= target
        bound = tl.where(reached, least, bound)
        nearest = tl.where(reached, nearest, below)
        count = tl.where(reached, count, count_above)
        mass = tl.where(reached, mass, mass_above)
        step = tl.where(reached, step, 4 * step)
    return bound, count, mass


@triton.jit
def _kept_mass(
    bound, quota, top, maxima, chunk, lists, row, vocab, inputs, allowed, counts,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Mass of all above `bound` and of `quota` of its equals."""
    num_listed = _listed(maxima >= bound, chunk, lists)
    mass = 0.0
    equals = 0
    for start in range(0, num_listed, GROUP):
        z = _listed_scores(start, num_listed, lists, row, vocab, inputs, allowed, counts, GROUP, CHUNK, MASKED, COUNTED)
        mass += tl.sum(tl.sum(tl.where(z > bound, tl.exp(z - top), 0.0), 1), 0)
        equals += tl.sum(tl.sum((z == bound).to(tl.int32), 1), 0)
    return mass + tl.minimum(equals, quota).to(tl.float32) * tl.exp(bound - top)


@triton.jit
def _drawn(
    uniform, bound, quota, top, maxima, chunk, lists, plane, row, vocab, inputs, allowed, counts,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """The id at which the mass of what is kept, summed up in order of ids, passes `uniform` of it all."""
    num_listed = _listed(maxima >= bound, chunk, lists)
    masses = (lists + plane).to(tl.pointer_type(tl.float32), bitcast=True)
    numbers = lists + 2 * plane
    for start in range(0, num_listed, GROUP):
        z = _listed_scores(start, num_listed, lists, row, vocab, inputs, allowed, counts, GROUP, CHUNK, MASKED, COUNTED)
        at = start + tl.arange(0, GROUP)
        tl.store(masses + at, tl.sum(tl.where(z > bound, tl.exp(z - top), 0.0), 1), mask=at < num_listed)
        tl.store(numbers + at, tl.sum((z == bound).to(tl.int32), 1), mask=at < num_listed)
    tl.debug_barrier()
    number = tl.load(numbers + chunk, mask=chunk < num_listed, other=0)
    kept = tl.minimum(tl.maximum(quota - (tl.cumsum(number, 0) - number), 0), number)  # of equals, in each chunk
    mass = tl.load(masses + chunk, mask=chunk < num_listed, other=0) + kept.to(tl.float32) * tl.exp(bound - top)
    until = tl.cumsum(mass, 0)
    target = uniform * tl.max(until, 0)
    found = tl.min(tl.where((until > target) & (mass > 0), chunk, num_listed), 0)
    found = tl.where(found < num_listed, found, tl.max(tl.where(mass > 0, chunk, 0), 0))  # where rounding took it away
    before = tl.sum(tl.where(chunk == found, until - mass, 0.0), 0)
    quota = tl.sum(tl.where(chunk == found, kept, 0), 0)

    ids = tl.load(lists + found) * CHUNK + tl.arange(0, CHUNK)
    z = _scores(ids, ids < vocab, row, vocab, inputs, allowed, counts, MASKED, COUNTED)
    equal = (z == bound).to(tl.int32)
    is_kept = (z > bound) | ((equal == 1) & (tl.cumsum(equal, 0) <= quota))
    weight = tl.where(is_kept, tl.exp(z - top), 0.0)
    token = tl.min(tl.where((before + tl.cumsum(weight, 0) > target) & (weight > 0), ids, vocab), 0)
    return tl.where(token < vocab, token, tl.max(tl.where(weight > 0, ids, 0), 0))
