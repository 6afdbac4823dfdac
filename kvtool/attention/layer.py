"""What a backend must know of an attention layer, apart from its keys and values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionLayer:
    """Shape of one attention layer.

    Attributes:
        num_heads: query heads; each run of num_heads / num_kv_heads shares a KV head.
        scale: multiplies q·k before the softmax.
        sliding_window: a query sees this many newest positions, itself included; None sees all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    sliding_window: int | None = None

    def describe(self) -> str:
        window = f", window {self.sliding_window}" if self.sliding_window else ""
        return f"{self.num_heads}/{self.num_kv_heads} heads of {self.head_dim}{window}"
