"""Which weights are kept in fewer bits, and how those of a 16-bit checkpoint get there while it is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from kvtool.errors import ConfigError, UnsupportedError
from kvtool.layers.embedding import Embedding
from kvtool.layers.linear import Linear, RowLinear
from kvtool.layers.moe import Experts, MoE, PackedExperts
from kvtool.layers.quantized import Matrix, group_size, rounded
from kvtool.models.calibrate import Calibration
from kvtool.models.config import ModelConfig
from kvtool.models.decoder import Decoder, DecoderLayer

LEAST_CAPABILITY = {"fp8": (8, 9), "w8a8": (7, 5)}  # of GPUs whose tensor cores multiply such numbers


@dataclass(frozen=True)
class Quantization:
    """What becomes of a 16-bit checkpoint's linear layers. The embedding stays as it is; so do gates, what makes keys
    and values of latents, and of experts all but what "w4a16" rounds.

    Attributes:
        head: the output projection is rounded, too; of one that is the embedding a copy.
        keep: globs of layers' names, as checkpoints have them, that stay as they are, too; of a fused layer all does
            where one part does.
        windows: ids of pieces of a text, all of one length, that "gptq", "awq" and "fp8" look at; none: "fp8" rounds to
            the nearest.
    """

    method: Literal["w8a8", "fp8", "w4a16", "gptq", "awq"]
    head: bool = False
    keep: tuple[str, ...] = ()
    windows: Sequence[Sequence[int]] = ()

    def check(self, plan: Decoder) -> None:
        """Raises ConfigError where `keep` names no layer of this model."""
        if not self.keep:
            return
        layers = map(int, plan.layers)
        paths = [path for layer in layers for path in (*plan.linears(layer), *plan.mixtures(layer))]
        names = [name for path in paths for name in named(plan, path)]
        for glob in self.keep:
            if not any(_matches(name, glob) for name in names):
                raise ConfigError(f"--keep-layers {glob:.80}: the model has no such layer; one of its is {names[-1]}")

    def keeps(self, model: Decoder, path: str) -> bool:
        return any(_matches(name, glob) for name in named(model, path) for glob in self.keep)


class Conversion:
    """A `Quantization` on its way through a model's layers, one after the other.

    Args:
        model: everything but its layers is filled.
        group: columns to a scale, of 4-bit weights.
    """

    def __init__(self, quantization: Quantization, model: Decoder, group: int) -> None:
        self.quantization, self.model, self.group = quantization, model, group
        self.calibration: Calibration | None = None
        if quantization.windows:
            assert quantization.method in ("gptq", "awq", "fp8")
            self.calibration = Calibration(model, quantization.method, group, quantization.windows)
        if quantization.head and model.head is not None:
            self._round(model.head)

    def _round(self, head: Embedding) -> None:
        method = "w4a16" if self.quantization.method in ("gptq", "awq") else self.quantization.method
        head.scorer = rounded(head.weight, method, self.group)
        if head is self.model.lm_head:
            del head.weight

    def prepare(self, layer: int) -> None:
        """Before a layer's weights are filled: what they must be like."""
        rows = [linear for linear in self._taken(layer) if isinstance(linear, RowLinear)]
        for linear in rows if self.quantization.method == "w4a16" else ():
            if linear.inputs.size % self.group:
                linear.share_outputs()

    def __call__(self, layer: int) -> None:
        """Quantise a layer that is filled."""
        if self.calibration:
            module = self.model.layers[str(layer)]
            assert isinstance(module, DecoderLayer)
            self.calibration.quantize(module, self._taken(layer))
            return
        for linear in self._taken(layer):
            linear.replace(self._rounded(linear.dense(self.model.dtype)))
        if self.quantization.method == "w4a16":
            for path, mixture in self.model.mixtures(layer).items():
                if not self.quantization.keeps(self.model, path):
                    self._round_experts(mixture)

    def _round_experts(self, mixture: MoE) -> None:
        experts = mixture.experts
        assert isinstance(experts, Experts)
        if experts.inner.size % self.group:
            raise UnsupportedError(
                f"--tp: cuts groups of {self.group} quantised columns of experts; use --ep, or --keep-layers "
                "'*.experts.*'"
            )
        gate_up, down = (self._rounded(weight.flatten(0, 1)) for weight in (experts.gate_up, experts.down))
        mixture.experts = PackedExperts(experts.experts, gate_up, down)

    def _rounded(self, weight: Tensor) -> Matrix:
        return rounded(weight, self.quantization.method, self.group)

    def _taken(self, layer: int) -> list[Linear]:
        linears = self.model.linears(layer)
        return [linear for path, linear in linears.items() if not self.quantization.keeps(self.model, path)]


def common_group(plan: Decoder) -> int:
    """Columns to a scale that fit all matrices of a model's layers."""
    return group_size(*{slot.shape[1] for _, slot in plan.slots("layers.") if len(slot.shape) == 2})


def named(model: Decoder, path: str) -> list[str]:
    """The names under which checkpoints have a module's weight and its parts."""
    return [name.removesuffix(".weight") for name, _ in model.slots(path) if name.endswith(".weight")]


def _matches(name: str, glob: str) -> bool:
    return fnmatchcase(name, glob.removeprefix("model."))


def check_quantization(asked: str, keep: Sequence[str], head: bool, model: ModelConfig, device: torch.device) -> None:
    """Check that weights can be kept as asked, or as the checkpoint has them.

    Args:
        asked: "auto", as the checkpoint has them, or a method.
        keep, head: as of `Quantization`.

    Raises:
        ConfigError: what was asked for contradicts the checkpoint, or itself.
        UnsupportedError: the model, or the GPU, cannot do it.
    """
    stored = model.quantization and model.quantization.method
    if stored and asked not in ("auto", stored):
        raise ConfigError(f"--quantization {asked}: the checkpoint's weights are quantised already, as {stored}")
    if (keep or head) and (stored or asked == "auto"):
        name = "--keep-layers" if keep else "--quantize-head"
        raise ConfigError(f"{name} goes with a --quantization of a 16-bit checkpoint")
    method = stored or asked
    if method == "auto":
        return
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < LEAST_CAPABILITY.get(method, (0, 0)):
        name, least = torch.cuda.get_device_name(device), LEAST_CAPABILITY[method]
        raise UnsupportedError(
            f"--quantization {method}: {name} cannot multiply such numbers, GPUs of compute capability "
            f"{least[0]}.{least[1]} can; use w4a16"
        )
