"""Models: what they look like, where they are, how they are loaded and how they compute."""

from kvtool.models.config import ModelConfig, load_config, parse_config
from kvtool.models.decoder import Attend, Decoder
from kvtool.models.quantization import Quantization, check_quantization
from kvtool.models.resolve import resolve_model
from kvtool.models.weights import load_model, weight_bytes

__all__ = [
    "Attend",
    "Decoder",
    "ModelConfig",
    "Quantization",
    "check_quantization",
    "load_config",
    "load_model",
    "parse_config",
    "resolve_model",
    "weight_bytes",
]
