"""A decoder over a KV store."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kvtool.attention import PagedAttention
from kvtool.attention.queries import Queries
from kvtool.kv.batch import KVBatch
from kvtool.kv.store import KVStore
from kvtool.models import Decoder
from kvtool.models.kv import attention_layers
from kvtool.parallel import ONE_RANK, Parallel


class PagedModel:
    """A model, or a rank's part of it, whose attention writes and reads a KV store.

    Where ranks share the model, what the store's format cannot hold is no error in the midst of a step but noted in the
    store, and the step goes on with numbers that mean nothing.

    Args:
        backend: as --attention-backend.
        parallel: the rank's place.
    """

    def __init__(self, model: Decoder, store: KVStore, backend: str = "auto", parallel: Parallel = ONE_RANK) -> None:
        self.model, self.store = model, store
        self.attention = PagedAttention(store, attention_layers(model.config, parallel), backend)
        self._parallel, self._layers = parallel, parallel.stage.layers(model.config.num_layers)

    def __call__(
        self,
        ids: Tensor,
        batch: KVBatch,
        wanted: Tensor | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Hidden states of the tokens `ids` [T] int64, or of those `wanted` [n], as `Decoder` returns them.

        Args:
            on_layer: called with the store's index of each layer that has written its keys and values.

        Raises:
            UnsupportedError: the format cannot hold what the model makes of these tokens.
        """
        hidden: Tensor = self.model(ids, batch.positions, partial(self._attend, batch, on_layer), wanted)
        return hidden

    def seal(self, batch: KVBatch) -> None:
        """Pack the blocks that these spans have completed.

        Raises:
            UnsupportedError: as above.
        """
        with self._parallel.faults_noted(self.store.note_fault):
            self.store.seal(batch)

    def _attend(
        self,
        batch: KVBatch,
        on_layer: Callable[[int], None] | None,
        layer: int,
        q: Queries,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        index, out = layer - self._layers.start, None
        with self._parallel.faults_noted(self.store.note_fault):
            out = self.attention(index, q, key, value, batch)
        if on_layer:
            on_layer(index)
        if out is None:
            out = torch.empty_like(q) if isinstance(q, Tensor) else q.empty()
            out.zero_()
        return out
