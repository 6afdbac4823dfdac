"""Blocks at the model's precision made into blocks and a tail of another format."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.kv.hadamard import hadamard
from kvtool.kv.layout import KVLayout
from kvtool.kv.store import KVStore, Near

AT_ONCE = 64  # blocks


class Packer:
    """Packs what 16-bit blocks hold as whoever has the other format would have packed it.

    Args:
        exact, packed: layouts of one model.
    """

    def __init__(self, exact: KVLayout, packed: KVLayout, dtype: torch.dtype, device: torch.device) -> None:
        assert exact.format.is_exact
        self.exact, self.packed = exact, packed
        self._scratch = KVStore(packed, AT_ONCE, 1, dtype, device)

    def sources(self, first_block: int, end_token: int) -> range:
        """The exact blocks of a sequence that hold its tokens from a packed block's first one up to `end_token`."""
        size = self.exact.format.block_size
        return range(first_block * self.packed.format.block_size // size, -(-end_token // size))

    def room(self, layer: int, first_block: int, end_token: int) -> Tensor:
        """[n, bytes] uint8 for a layer's part of those blocks."""
        shape = (len(self.sources(first_block, end_token)), self.exact.layer_block_bytes(layer))
        return torch.empty(shape, dtype=torch.uint8, device=self._scratch.blocks.device)

    def take_fault(self) -> Tensor:
        """As `KVStore.take_fault`, of what has been packed since."""
        return self._scratch.take_fault()

    @torch.inference_mode()
    def pack(self, layer: int, exact: Tensor, first_block: int, end_token: int, out: Tensor) -> None:
        """Pack a layer's blocks from `first_block` on, the last of them perhaps not full.

        Args:
            exact: [n, bytes] uint8, the layer's part of the blocks that `sources` names.
            out: [m, bytes] uint8, of packed blocks.

        Raises:
            UnsupportedError: the format cannot hold the values, and torch packs them; kernels tell by `take_fault`.
        """
        size, kv = self.packed.format.block_size, self._scratch.layers[layer]
        end = min((first_block + len(out)) * size, end_token)
        tokens = self._tokens(layer, exact, first_block * size, first_block * size, end)
        key, value = (F.pad(x, (0, 0, 0, 0, 0, len(out) * size - len(x))) for x in tokens)
        for start in range(0, len(out), AT_ONCE):
            blocks = torch.arange(min(AT_ONCE, len(out) - start), device=exact.device)
            kv.write_blocks(Near(key, value), (start + blocks) * size, blocks)
            self._scratch.gather_layer(layer, blocks, out[start : start + len(blocks)])

    @torch.inference_mode()
    def write_tail(self, layer: int, exact: Tensor, first_block: int, num_tokens: int, tail: Tensor) -> None:
        """Put into a whole tail [bytes] uint8 what a layer keeps of a sequence at full precision; `exact` as above."""
        fmt, spec, dtype = self.packed.format, self.packed.spec, self._scratch.dtype
        first = fmt.packed_tokens(num_tokens)
        rows = torch.arange(first, num_tokens, device=tail.device) % max(1, fmt.tail_tokens)
        of_layer = tail.view(dtype).view(spec.num_layers, -1)[layer].zero_()
        parts = of_layer.split([fmt.tail_tokens * stream.elements for stream in (spec.key, spec.value)])
        tokens = self._tokens(layer, exact, first_block * fmt.block_size, first, num_tokens)
        for stream, part, x in zip((spec.key, spec.value), parts, tokens, strict=True):
            part.view(stream.heads, fmt.tail_tokens, stream.dim)[:, rows] = x.transpose(0, 1)

    def _tokens(self, layer: int, exact: Tensor, known: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, heads, D] of the tokens from `first` to `end` as the store is given them, out of blocks
        that begin with the one that holds token `known`."""
        size = self.exact.format.block_size
        start, kinds, streams = known // size * size, self.packed.format.layers[layer], []
        for (field,), rotate in zip(self.exact.fields(layer), (kinds.key.rotate, kinds.value.rotate), strict=True):
            blocks = exact[:, field.offset : field.offset + field.nbytes].view(self._scratch.dtype)
            tokens = blocks.unflatten(1, field.shape).transpose(1, 2).flatten(0, 1)[first - start : end - start]
            streams.append(hadamard(tokens) if rotate else tokens)
        key, value = streams
        return key, value
