"""Ablations: one choice of a format varied while all others stay as they are."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from kvtool.config import Axis, EngineConfig, KVOptions
from kvtool.errors import ConfigError, UnsupportedError
from kvtool.kv.format import GROUP_SIZES, KEY_AXIS, VALUE_AXIS, KVFormat, resolve
from kvtool.kv.spec import KVSpec
from kvtool.perplexity import parse_formats
from kvtool.quantize.journal import Journal
from kvtool.quantize.report import Exam, Examiner, OnProgress, Progress, model_spec

BITS = "16,8,4,2,k8v4,k4v2"
RESIDUALS = (0, 32, 128, 512)


@dataclass(frozen=True)
class Variant:
    """One row of an ablation.

    Attributes:
        ablation, name: what is varied, and to what.
        kv: the options that ask for it.
        format: what they mean for the model; None where it does not allow them.
        reason: why not.
    """

    ablation: str
    name: str
    kv: KVOptions
    format: KVFormat | None
    reason: str = ""


def ablate(
    config: EngineConfig, asked: str, exam: Exam, journal_path: Path | None, progress: Progress
) -> list[dict[str, Any]]:
    """Measure each variation of `config.kv` that the ablations in `asked` call for; one row of plain values each.

    A format that comes twice is measured once. What an earlier run has left at `journal_path` is not measured again.

    Args:
        asked: a list such as "bits,axis", or "all".
        journal_path: results are kept here as they come; None: nowhere.

    Raises:
        ConfigError: an ablation that there is not or that the format allows nothing of, or a journal of another run.
    """
    rows = variants(asked, config.kv, model_spec(config))
    formats = {_digest(row.format): row.kv for row in rows if row.format is not None}
    with TemporaryDirectory(prefix="kvtool-") as folder:
        with progress("reading the text, 16 bits") as on_progress:
            examiner = Examiner(config, exam, Path(folder) / "baseline.safetensors", on_progress)
        with closing(examiner):
            journal = Journal(journal_path, examiner.identity(), dict)
            missing = {digest: kv for digest, kv in formats.items() if digest not in journal.rows}
            with progress(f"{len(missing)} formats") as on_progress:
                for done, (digest, kv) in enumerate(missing.items()):
                    part = partial(_report_part, on_progress, done, len(missing))
                    journal.record(digest, examiner.measure(kv, part).row())
    return [
        {
            "ablation": row.ablation,
            "variant": row.name,
            "reason": row.reason or None,
            **({} if row.format is None else journal.rows[_digest(row.format)]),
        }
        for row in rows
    ]


def variants(asked: str, base: KVOptions, spec: KVSpec) -> tuple[Variant, ...]:
    """The rows of the ablations in `asked`.

    Args:
        base: the format that is varied.

    Raises:
        ConfigError: an ablation that there is not, or one of which the base allows no row.
    """
    names = list(ABLATIONS) if asked == "all" else [name.strip() for name in asked.split(",")]
    unknown = [name for name in names if name not in ABLATIONS]
    if unknown:
        raise ConfigError(f"--ablate {unknown[0]!r:.40}: must be all, or of {', '.join(ABLATIONS)}")
    # Bits bring their own default window; where anything else is varied, it stays what it is.
    windowed = replace(base, residual_length=resolve(base, spec).residual)
    rows = []
    for ablation in dict.fromkeys(names):
        choices = ABLATIONS[ablation](base if ablation == "bits" else windowed)
        varied = [_variant(ablation, name, kv, spec) for name, kv in choices.items()]
        if all(variant.format is None for variant in varied):
            raise ConfigError(f"--ablate {ablation}: {varied[0].reason}")
        rows += varied
    return tuple(rows)


def _bits(base: KVOptions) -> dict[str, KVOptions]:
    return parse_formats(BITS, replace(base, nbits=None, nbits_key=None, nbits_value=None, plan=None, layer_bits=None))


def _axis(base: KVOptions) -> dict[str, KVOptions]:
    axes = get_args(Axis)
    pairs = [(axis, axis) for axis in axes] + list(zip(axes, reversed(axes), strict=True))
    return {f"{key}/{value}": replace(base, axis_key=key, axis_value=value) for key, value in pairs}


def _symmetry(base: KVOptions) -> dict[str, KVOptions]:
    return {"asymmetric": replace(base, symmetric=False), "symmetric": replace(base, symmetric=True)}


def _residual(base: KVOptions) -> dict[str, KVOptions]:
    return {str(tokens): replace(base, residual_length=tokens) for tokens in RESIDUALS}


def _group(base: KVOptions) -> dict[str, KVOptions]:
    return {str(size): replace(base, q_group_size=size) for size in GROUP_SIZES}


def _rotation(base: KVOptions) -> dict[str, KVOptions]:
    """Rotation needs scales per token; the axes as asked stand beside it."""
    token = replace(base, axis_key="token", axis_value="token", rotate=False)
    as_asked = replace(base, rotate=False)
    name = f"{base.axis_key or KEY_AXIS}/{base.axis_value or VALUE_AXIS}"
    return {name: as_asked, "token/token": token, "token, rotated": replace(token, rotate=True)}


ABLATIONS: dict[str, Callable[[KVOptions], dict[str, KVOptions]]] = {
    "bits": _bits,
    "axis": _axis,
    "symmetry": _symmetry,
    "residual": _residual,
    "group": _group,
    "rotation": _rotation,
}


def _variant(ablation: str, name: str, kv: KVOptions, spec: KVSpec) -> Variant:
    try:
        fmt = resolve(kv, spec)
    except (ConfigError, UnsupportedError) as error:
        return Variant(ablation, name, kv, None, str(error))
    streams = [stream for layer in fmt.layers for stream in (layer.key, layer.value)]
    cut = {stream.group for stream in streams if stream.bits in ("8", "4", "2")} - {kv.q_group_size}
    if ablation == "group" and cut:
        return Variant(ablation, name, kv, None, f"head_dim {spec.value.dim} holds no groups of {name}")
    if kv.residual_length is not None and fmt.residual != kv.residual_length:  # in whole blocks
        name += f" → {fmt.residual}" if ablation == "residual" else f", window {fmt.residual}"
    return Variant(ablation, name, kv, fmt)


def _digest(fmt: KVFormat) -> str:
    return sha256(repr(fmt).encode()).hexdigest()[:16]


def _report_part(on_progress: OnProgress, before: int, count: int, done: float, total: float) -> None:
    on_progress(before + done / total, count)
