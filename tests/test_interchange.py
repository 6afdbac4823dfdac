"""Quantisers of others in our packing, beside ours: the same blocks, groups and `visible(t)`, other scales and zeros.

`pytest -s tests/test_interchange.py` prints the table.
"""

from dataclasses import asdict, dataclass

import pytest
import torch
from torch import Tensor

from commands.output import Column, Report, as_text
from kvtool.config import EngineConfig, KVOptions
from kvtool.kv.codecs import CODECS, Arrays, pack, unpack
from kvtool.kv.format import StreamFormat
from kvtool.perplexity import FormatScore, score_formats
from kvtool.protocols import SAMPLE, make_task
from kvtool.scoring import ScoringModel
from kvtool.tokenizer import Tokenizer


def groups_last(x: Tensor, fmt: StreamFormat) -> Tensor:
    """[..., tokens, D] with the elements that share a scale in a last dimension of their own."""
    return x.transpose(-1, -2) if fmt.axis == "channel" else x.unflatten(-1, (-1, fmt.group))


def from_groups(groups: Tensor, fmt: StreamFormat) -> Tensor:
    return groups.transpose(-1, -2) if fmt.axis == "channel" else groups.flatten(-2)


def as_stored(x: Tensor, fmt: StreamFormat) -> Tensor:
    """One number a group, in fp16, as the layout has it: a row of channels for a block, or a column for each token."""
    return (x.transpose(-1, -2) if fmt.axis == "channel" else x.squeeze(-1)).half()


def as_computed(stored: Tensor, fmt: StreamFormat) -> Tensor:
    return (stored.transpose(-1, -2) if fmt.axis == "channel" else stored.unsqueeze(-1)).float()


@dataclass(frozen=True)
class Quanto:
    """Hugging Face's QuantoQuantizedCache: optimum-quanto's MaxOptimizer and `quantize_affine`.

    The zero is the group's minimum and the scale its range over the levels, both to the nearest.
    """

    bits: int

    def encode(self, x: Tensor, fmt: StreamFormat) -> Arrays:
        groups, levels = groups_last(x.float(), fmt), 2**self.bits - 1
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale, zero = as_stored((high - low) / levels, fmt), as_stored(low, fmt)
        codes = ((groups - as_computed(zero, fmt)) / as_computed(scale, fmt)).round().clamp(0, levels)
        return {"codes": pack(from_groups(codes, fmt).to(torch.uint8), self.bits), "scale": scale, "zero": zero}

    def decode(self, arrays: Arrays, fmt: StreamFormat, dtype: torch.dtype) -> Tensor:
        codes = groups_last(unpack(arrays["codes"], self.bits).float(), fmt)
        decoded = codes * as_computed(arrays["scale"], fmt) + as_computed(arrays["zero"], fmt)
        return from_groups(decoded, fmt).to(dtype)


@dataclass(frozen=True)
class KVTunerVanilla:
    """KVTuner's VanillaQuantizer (arXiv:2502.04420): as quanto's, but the zero is a whole number of steps."""

    bits: int

    def encode(self, x: Tensor, fmt: StreamFormat) -> Arrays:
        groups, levels = groups_last(x.float(), fmt), 2**self.bits - 1
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = as_stored((high - low).clamp(min=1e-5) / levels, fmt)
        zero = as_stored((low / as_computed(scale, fmt)).round(), fmt)
        codes = (groups / as_computed(scale, fmt) - as_computed(zero, fmt)).round().clamp(0, levels)
        return {"codes": pack(from_groups(codes, fmt).to(torch.uint8), self.bits), "scale": scale, "zero": zero}

    def decode(self, arrays: Arrays, fmt: StreamFormat, dtype: torch.dtype) -> Tensor:
        codes = groups_last(unpack(arrays["codes"], self.bits).float(), fmt)
        decoded = (codes + as_computed(arrays["zero"], fmt)) * as_computed(arrays["scale"], fmt)
        return from_groups(decoded, fmt).to(dtype)


QUANTISERS = {"kvtool": None, "quanto": Quanto, "KVTuner": KVTunerVanilla}
AXES = {"K channel, V token": "channel", "K token, V token": "token"}


Scores = dict[tuple[str, str, int], FormatScore]  # by quantiser, axes and bits


@pytest.fixture(scope="module")
def scores() -> Scores:
    model = ScoringModel(EngineConfig(device="cpu"))
    tokenizer = Tokenizer.load(model.path, model.model_config.vocab_size)
    task = make_task("gptq", [SAMPLE.read_text("utf-8")], tokenizer, 2048, window=512, max_tokens=1024)
    cases = [(axes, bits) for bits in (4, 2) for axes in AXES]
    formats = {f"{case}": KVOptions(nbits=str(case[1]), axis_key=AXES[case[0]]) for case in cases}  # type: ignore[arg-type]
    found = {}
    for name, quantiser in QUANTISERS.items():
        with pytest.MonkeyPatch.context() as patch:
            for bits in (4, 2) if quantiser else ():
                patch.setitem(CODECS, str(bits), quantiser(bits))
            found |= {
                (name, *case): score for case, score in zip(cases, score_formats(model, task, formats), strict=True)
            }
    return found


def test_one_table(scores: Scores) -> None:
    rows = [{"quantiser": name, "axes": axes, **asdict(score)} for (name, axes, _), score in scores.items()]
    rows.sort(key=lambda row: (-row["bits_per_element"], row["axes"]))
    columns = [
        Column("quantiser", "quantiser"),
        Column("axes", "axes"),
        Column("bits", "bits_per_element", ".1f"),
        Column("PPL", "perplexity", ".3f"),
        Column("ΔPPL", "perplexity_change", "+.2%"),
        Column("±", "perplexity_change_error", ".2%"),
        Column("KLD", "kld_mean", ".2e"),
        Column("±", "kld_error", ".0e"),
    ]
    table = as_text(Report("interchange", {}, rows, columns))
    print(table)
    assert [line.split()[0] for line in table.splitlines()[3:] if line] == [*QUANTISERS] * 4


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("bits", [4, 2])
def test_quanto_s_roundings_change_next_to_nothing(scores: Scores, axes: str, bits: int) -> None:
    ours, theirs = scores["kvtool", axes, bits], scores["quanto", axes, bits]
    assert theirs.kld_mean == pytest.approx(ours.kld_mean, rel=0.1)
    assert theirs.perplexity == pytest.approx(ours.perplexity, rel=0.03)
    assert theirs.kld_mean != ours.kld_mean


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("bits", [4, 2])
def test_kvtuner_s_zeros_are_of_the_same_quality(scores: Scores, axes: str, bits: int) -> None:
    ours, theirs = scores["kvtool", axes, bits], scores["KVTuner", axes, bits]
    assert 0.5 < theirs.kld_mean / ours.kld_mean < 2
    assert theirs.kld_mean != ours.kld_mean


@pytest.mark.parametrize("quantiser", list(QUANTISERS))
@pytest.mark.parametrize("bits", [4, 2])
def test_axes_matter_more_than_roundings(scores: Scores, quantiser: str, bits: int) -> None:
    channel, token = (scores[quantiser, axes, bits].kld_mean for axes in AXES)
    assert token > 5 * channel


# Where the packages themselves are installed: the references above are what these do.


def sample(axis: str) -> tuple[Tensor, StreamFormat]:
    """[heads, 64 tokens, D] with an outlier channel, and a format of groups of 64."""
    x = torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(1))
    x[..., 5] = x[..., 5] * 3 + 20
    return x, StreamFormat("4", axis, 64, symmetric=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [4, 2])
def test_reference_is_quanto(axis: str, bits: int) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    x, fmt = sample(axis)
    arrays = Quanto(bits).encode(x, fmt)
    for head in range(len(x)):
        quanto_axis = 0 if axis == "token" else -1
        scale, shift = quanto.MaxOptimizer()(x[head], quanto.qtypes[f"qint{bits}"], quanto_axis, 64)
        scale, shift = scale.half().float(), shift.half().float()  # as a model in fp16 has them
        codes = torch.ops.quanto.quantize_affine(x[head], bits, quanto_axis, 64, scale, shift)
        assert torch.equal(unpack(arrays["codes"][head], bits), quanto.ungroup(codes, quanto_axis, x[head].shape))
        decoded = quanto.ungroup(codes * scale - shift, quanto_axis, x[head].shape)
        torch.testing.assert_close(Quanto(bits).decode(arrays, fmt, torch.float32)[head], decoded)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_reference_is_kvtuner(axis: str, bits: int) -> None:
    kvtuner = pytest.importorskip("flexible_quant.vanilla_quantizer")
    x, fmt = sample(axis)
    ours = KVTunerVanilla(bits).decode(KVTunerVanilla(bits).encode(x, fmt), fmt, torch.float32)
    theirs = kvtuner.VanillaQuantizer(bits, True, torch.float32).quantize(x, 64, 0 if axis == "token" else 1)
    step = theirs.scaling.max()
    difference = (ours - theirs.dequantize()).abs()
    assert difference.max() <= 1.01 * step  # a tie that fp16's scale decides otherwise
    assert difference.mean() < 0.02 * step
