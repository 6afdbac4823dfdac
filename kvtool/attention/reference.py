"""The definition of attention over packed blocks and a tail, which every backend must agree with."""

import torch
from torch import Tensor

from kvtool.attention.layer import AttentionLayer, operands
from kvtool.kv.format import KVFormat


def attention_reference(
    q: Tensor, key: Tensor, value: Tensor, seen_key: Tensor, seen_value: Tensor, fmt: KVFormat, layer: AttentionLayer
) -> Tensor:
    """Attention of every position of one sequence, written for reading and run in float64.

    The query at position t reads the packed form of positions below `fmt.visible(t)` and the exact one from there to
    t, no further back than the sliding window.

    Args:
        q: [T, Hq, D]; key, value: [T, Hkv, D], exact.
        seen_key, seen_value: [T, Hkv, D], what packing and unpacking whole blocks makes of them.

    Returns:
        [T, Hq, D] float64, D being that of values.
    """
    out = torch.empty(*q.shape[:2], value.shape[-1], dtype=torch.float64)
    for t in range(q.shape[0]):
        far, first = min(fmt.visible(t), t + 1), 0 if layer.sliding_window is None else t + 1 - layer.sliding_window
        streams = ((seen_key, key), (seen_value, value))
        keys, values = (torch.cat([seen[:far], x[far : t + 1]])[max(0, first) :].double() for seen, x in streams)
        keys, values = operands(keys, values, layer)
        for head in range(layer.num_heads):
            kv_head = head // (layer.num_heads // layer.num_kv_heads)
            probs = (keys[:, kv_head] @ q[t, head].double() * layer.scale).softmax(0)
            out[t, head] = probs @ values[:, kv_head]
    return out
