"""Where a model runs, and in which numbers."""

import torch

from kvtool.config import EngineConfig
from kvtool.errors import ConfigError
from kvtool.models.config import ModelConfig

DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


def choose_device(asked: str) -> torch.device:
    """Where to run; a GPU becomes the current one, on whose stream kernels and events go.

    Raises:
        ConfigError: there is no such device, or no model runs there.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("no model runs there")
        torch.empty(1, device=device)
        if device.index is not None and device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].partition(":")[0]
        raise ConfigError(f"--device {asked}: {reason}; choose auto, cpu, cuda or cuda:N") from error
    return device


def choose_dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype not in DTYPES:
        raise ConfigError(f"--dtype {config.dtype}: must be one of {', '.join(DTYPES)}")
    auto = "float32" if device.type == "cpu" else model.dtype
    dtype: torch.dtype = getattr(torch, auto if config.dtype == "auto" else config.dtype)
    return dtype
