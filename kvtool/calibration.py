"""How a model's weights are kept, as the options ask for it, and the text that some ways look at first."""

from codecs import getincrementaldecoder
from dataclasses import replace
from pathlib import Path

import torch

from kvtool.config import EngineConfig
from kvtool.errors import ConfigError
from kvtool.models import ModelConfig, Quantization, check_quantization
from kvtool.models.resolve import EMBEDDED
from kvtool.tokenizer import Tokenizer

TEXT = EMBEDDED["tiny"] / "sample.txt"
WINDOW, WINDOWS = 512, 64  # tokens of a piece of the text, and how many of them count at most
LEAST_TOKENS = 256
MOST_BYTES = 4 << 20  # of a text: more than 64 windows of any tokenizer


def choose_quantization(
    config: EngineConfig, model: ModelConfig, path: Path, device: torch.device
) -> Quantization | None:
    """What becomes of a checkpoint's weights when they are loaded; None: they stay as they are.

    e4m3 weights are rounded to the nearest where no text can be looked at: of random weights, by several ranks, and in
    models with experts or latents.

    Args:
        path: folder of the model, whose tokenizer reads the text.

    Raises:
        ConfigError: options that contradict each other or the checkpoint, or a text that cannot be used.
        UnsupportedError: the model, or the GPU, cannot do it.
        ModelError: a text is wanted, and the folder has no usable tokenizer.
    """
    method = config.quantization
    check_quantization(method, config.keep_layers, config.quantize_head, model, device)
    looks = method in ("gptq", "awq", "fp8") and model.quantization is None
    if config.calibration and not looks:
        raise ConfigError("--calibration is for --quantization gptq, awq and fp8 of a 16-bit checkpoint")
    if method == "auto" or model.quantization:
        return None
    unseen = Quantization(method, config.quantize_head, config.keep_layers)
    if reason := _blindness(config, model) if looks else None:
        if config.calibration or method != "fp8":
            hint = "leave out --calibration" if method == "fp8" else "use w4a16"
            raise ConfigError(f"--quantization {method}: {reason}; {hint}")
        return unseen
    if not looks:
        return unseen
    longest = config.max_model_len or model.max_position
    return replace(unseen, windows=text_windows(config.calibration, longest, model, path))


def _blindness(config: EngineConfig, model: ModelConfig) -> str | None:
    """Why no text can be looked at, if so."""
    if config.load_format == "dummy":
        return "a text shows nothing about random weights"
    if config.num_ranks > 1:
        return "several ranks cannot look at a text together"
    if any(model.experts) or model.mla:
        return "models with experts or latent attention cannot look at a text yet"
    return None


def text_windows(file: str | None, longest: int, model: ModelConfig, path: Path) -> list[list[int]]:
    """Pieces of a text, evenly spread over it, as ids of the model's tokenizer. All have one length, at most `longest`.

    Raises:
        ConfigError: the file cannot be read, is no text, or is too short.
    """
    name = file or str(TEXT)
    try:
        with Path(name).open("rb") as stream:
            start = stream.read(MOST_BYTES)
        text = getincrementaldecoder("utf-8-sig")().decode(start)  # which may end within a letter
    except UnicodeDecodeError as error:
        raise ConfigError(f"--calibration {name}: is no UTF-8 text (byte {error.start}); convert it") from error
    except OSError as error:
        raise ConfigError(f"--calibration {name}: cannot be read: {error.strerror}") from error
    ids = Tokenizer.load(path, model.vocab_size).encode(text)
    if len(ids) < LEAST_TOKENS:
        raise ConfigError(f"--calibration {name}: holds {len(ids)} tokens; give at least {LEAST_TOKENS}")
    length = min(WINDOW, longest, len(ids))
    count = min(WINDOWS, len(ids) // length)
    return [ids[start : start + length] for start in range(0, len(ids) // count * count, len(ids) // count)]
