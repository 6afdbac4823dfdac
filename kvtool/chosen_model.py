"""The model that an engine's options ask for: which one it is, where it runs, in which numbers."""

from dataclasses import dataclass
from pathlib import Path

import torch

from kvtool.calibration import choose_quantization
from kvtool.config import EngineConfig
from kvtool.device import choose_device, choose_dtype
from kvtool.models import Decoder, ModelConfig, Quantization, load_config, load_model, resolve_model
from kvtool.parallel import Parallel


@dataclass(frozen=True)
class ChosenModel:
    """A model of which no weights have been read yet.

    Attributes:
        path: its local folder.
        config: what the checkpoint is.
        device, dtype: where it will be, and what its layers compute in.
        quantization: what becomes of its weights when they are loaded; None: they stay as they are.
    """

    path: Path
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization | None

    @property
    def method(self) -> str:
        """How its weights will be kept, as `--quantization` names it; "none": in 16 bits, or as the dtype says."""
        kept = self.config.quantization or self.quantization
        return kept.method if kept else "none"

    def load(self, engine: EngineConfig, parallel: Parallel) -> Decoder:
        """The model, or this rank's part of it; all ranks call this.

        Raises:
            KVToolError: as `load_model` says, on all ranks.
        """
        with torch.inference_mode(), parallel.agreeing():
            return load_model(
                self.path,
                self.config,
                dtype=self.dtype,
                device=self.device,
                load_format=engine.load_format,
                seed=engine.seed,
                max_model_len=engine.max_model_len,
                parallel=parallel,
                quantization=self.quantization,
            )


def choose_model(engine: EngineConfig) -> ChosenModel:
    """What `engine` asks for, once it is known that there is such a model and that it can be held and run so.

    Raises:
        KVToolError: there is none, or options contradict each other, the checkpoint or the machine.
    """
    device, path = choose_device(engine.device), resolve_model(engine.model)
    config = load_config(path)
    dtype = choose_dtype(engine, config, device)
    return ChosenModel(path, config, device, dtype, choose_quantization(engine, config, path, device))
