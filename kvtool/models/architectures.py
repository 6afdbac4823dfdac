"""What sets one architecture apart from another. To add one, add a line to the table."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Architecture:
    """A decoder in the manner of Llama (pre-norm, rotary, gated MLP), and how it departs from it.

    Attributes:
        qkv_bias: the q, k and v projections have a bias.
        config_biases: `attention_bias` and `mlp_bias` of the config add biases.
        qk_norm: every query and key head is normalised before it is rotated.
        stored_merged: the checkpoint holds q, k, v in one tensor, and gate, up in another.
        sliding_window: layers to which `sliding_window` of the config applies; "listed": those its `layer_types` name.
    """

    qkv_bias: bool = False
    config_biases: bool = False
    qk_norm: bool = False
    stored_merged: bool = False
    sliding_window: Literal["none", "listed", "all"] = "none"


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(config_biases=True),
    "mistral": Architecture(sliding_window="all"),
    "phi3": Architecture(stored_merged=True, sliding_window="all"),
    "qwen2": Architecture(qkv_bias=True, sliding_window="listed"),
    "qwen3": Architecture(config_biases=True, qk_norm=True, sliding_window="listed"),
}
