"""What a model caches for each token: integers that come from its architecture alone."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StreamSpec:
    """One of the two streams of a layer: keys or values (for MLA: the rope key, or the latent with one head)."""

    heads: int
    dim: int

    @property
    def elements(self) -> int:
        """Elements of one token."""
        return self.heads * self.dim


@dataclass(frozen=True)
class KVSpec:
    """The cache of a model, before any format: `num_layers` times a key and a value stream.

    `element_size` is the bytes of one element at the model's precision ("16 bits": 2, or 4 and 8 where the model
    runs in float32 and float64). `latent` (MLA): the value stream holds latents of which keys are made, too, the key
    stream the rope key that belongs to them, each with one head.
    """

    num_layers: int
    key: StreamSpec
    value: StreamSpec
    element_size: int
    latent: bool = False

    @property
    def elements(self) -> int:
        """Elements that one token caches over all layers."""
        return self.num_layers * (self.key.elements + self.value.elements)
