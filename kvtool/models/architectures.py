"""What sets one architecture apart from another. To add one, add a line to the table."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ExpertFields:
    """Where a config says what its experts are.

    Attributes:
        count: names that the number of experts goes by.
        size: the intermediate size of one.
        normalize: a token's weights sum to 1; None: `norm_topk_prob` says.
        shared: what every token passes: nothing, an MLP of `shared_expert_intermediate_size` with a gate of its own, or
            one of `n_shared_experts` times `size`.
        dense: layers that are plain MLPs: none, those that `mlp_only_layers` and `decoder_sparse_step` leave, or the
            first `first_k_dense_replace`.
        groups: experts stand in `n_group` groups: never, where `topk_method` says so, or always.
        scores, wide: as in `kvtool.layers.moe.Routing`.
    """

    count: tuple[str, ...]
    size: str = "moe_intermediate_size"
    normalize: bool | None = None
    shared: Literal["none", "gated", "counted"] = "none"
    dense: Literal["none", "stepped", "first"] = "none"
    groups: Literal["never", "asked", "always"] = "never"
    scores: Literal["softmax", "sigmoid"] = "softmax"
    wide: bool = False


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
    sliding_window: Literal["none", "listed", "all", "used"] = "none"
    experts: ExpertFields | None = None
    latent: bool = False
    stored_names: tuple[tuple[str, str], ...] = ()


ARCHITECTURES: dict[str, Architecture] = {
    "deepseek_v2": Architecture(
        latent=True,
        experts=ExpertFields(
            ("n_routed_experts",), normalize=False, shared="counted", dense="first", groups="asked", wide=True
        ),
    ),
    "deepseek_v3": Architecture(
        latent=True,
        experts=ExpertFields(
            ("n_routed_experts",), shared="counted", dense="first", groups="always", scores="sigmoid", wide=True
        ),
    ),
    "llama": Architecture(config_biases=True),
    "mistral": Architecture(sliding_window="all"),
    "mixtral": Architecture(
        sliding_window="all",
        experts=ExpertFields(("num_local_experts",), size="intermediate_size", normalize=True),
        stored_names=(
            ("mlp.", "block_sparse_moe."),
            (".gate_proj.", ".w1."),
            (".up_proj.", ".w3."),
            (".down_proj.", ".w2."),
        ),
    ),
    "phi3": Architecture(stored_merged=True, sliding_window="all"),
    "qwen2": Architecture(qkv_bias=True, sliding_window="listed"),
    "qwen2_moe": Architecture(
        qkv_bias=True,
        sliding_window="listed",
        experts=ExpertFields(("num_experts", "num_local_experts"), shared="gated", dense="stepped"),
        stored_names=((".shared_experts.", ".shared_expert."),),
    ),
    "qwen3": Architecture(config_biases=True, qk_norm=True, sliding_window="listed"),
    "qwen3_moe": Architecture(
        config_biases=True,
        qk_norm=True,
        sliding_window="used",
        experts=ExpertFields(("num_experts", "num_local_experts"), dense="stepped"),
    ),
}
