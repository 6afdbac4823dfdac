"""Shares of a cache: which bytes of a whole model's blocks and tails a rank has that holds some of the heads.

Heads lie behind each other in every array of every format, so that sharing a cache out, or putting it together, moves
bytes and computes nothing. What travels between engines is whole; each end shares it out among as many ranks as it has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvtool.kv.layout import KVLayout


@dataclass(frozen=True)
class Piece:
    """Bytes that lie behind each other: from where in the whole, from where in the share, and how many."""

    whole: int
    share: int
    nbytes: int


class Share:
    """Some heads of all layers.

    Args:
        whole, layout: of all heads and of these, in one format.
        first_heads: of keys and of values, the first that is in it.
    """

    def __init__(self, whole: KVLayout, layout: KVLayout, first_heads: tuple[int, int]) -> None:
        self.whole, self.layout = whole, layout
        layers = range(whole.spec.num_layers)
        self._blocks = [self._block_pieces(layer, first_heads) for layer in layers]
        self._tail = self._tail_pieces(first_heads)

    def of_blocks(self, layer: int, whole: Tensor) -> Tensor:
        """Its part of a layer's whole blocks [n, bytes] uint8."""
        share = torch.zeros(len(whole), self.layout.layer_block_bytes(layer), dtype=torch.uint8, device=whole.device)
        _move(self._blocks[layer], share, whole, into_whole=False)
        return share

    def into_blocks(self, layer: int, share: Tensor, whole: Tensor) -> None:
        """Put what `of_blocks` gives into its place."""
        _move(self._blocks[layer], share, whole, into_whole=True)

    def of_tail(self, whole: Tensor) -> Tensor:
        """Its part of a whole tail [bytes] uint8."""
        share = torch.zeros(self.layout.tail_bytes, dtype=torch.uint8, device=whole.device)
        _move(self._tail, share, whole, into_whole=False)
        return share

    def into_tail(self, share: Tensor, whole: Tensor) -> None:
        """Put what `of_tail` gives into its place."""
        _move(self._tail, share, whole, into_whole=True)

    def _block_pieces(self, layer: int, first_heads: tuple[int, int]) -> list[Piece]:
        pieces = []
        streams = zip(self.whole.fields(layer), self.layout.fields(layer), first_heads, strict=True)
        for whole_fields, own_fields, first in streams:
            for whole, own in zip(whole_fields, own_fields, strict=True):
                of_head = own.nbytes // own.shape[0]
                pieces.append(Piece(whole.offset + first * of_head, own.offset, own.nbytes))
        return pieces

    def _tail_pieces(self, first_heads: tuple[int, int]) -> list[Piece]:
        pieces: list[Piece] = []
        whole_offset = own_offset = 0
        of_element = self.whole.format.tail_tokens * self.whole.spec.element_size
        for _ in range(self.whole.spec.num_layers):
            streams = ((self.whole.spec.key, self.layout.spec.key), (self.whole.spec.value, self.layout.spec.value))
            for (whole, own), first in zip(streams, first_heads, strict=True):
                at = whole_offset + first * own.dim * of_element
                pieces.append(Piece(at, own_offset, own.elements * of_element))
                whole_offset += whole.elements * of_element
                own_offset += own.elements * of_element
        return pieces


def _move(pieces: Sequence[Piece], share: Tensor, whole: Tensor, into_whole: bool) -> None:
    for piece in pieces:
        inside = whole[..., piece.whole : piece.whole + piece.nbytes]
        apart = share[..., piece.share : piece.share + piece.nbytes]
        inside.copy_(apart) if into_whole else apart.copy_(inside)
