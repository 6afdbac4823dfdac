"""Whether an engine fits on GPUs, told before anything is loaded, in the parts that the engine itself counts by."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from kvtool.attention import ABSORBED_TOKENS
from kvtool.config import EngineConfig
from kvtool.cuda_graph import decode_sizes, prompt_rooms, worthwhile_tokens
from kvtool.errors import ConfigError
from kvtool.gpus import GPU, asked_gpu
from kvtool.kernels import WORKSPACE
from kvtool.kv.fixed import MOST_FAR
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.layers.linear import Linear
from kvtool.layers.moe import Experts, Gate, MoEShape
from kvtool.memory import DeviceMemory, MemoryParts
from kvtool.models import Decoder, ModelConfig, parse_config
from kvtool.models.kv import kv_spec
from kvtool.models.resolve import resolve_config
from kvtool.parallel import Group, Parallel, Stage
from kvtool.ranks.topology import check_model
from kvtool.token_scores import SCORED_ROWS

DTYPE = torch.bfloat16
RESERVE = 768 << 20  # of CUDA itself, the kernels' code and what the driver keeps of graphs
CUBLAS = 32 << 20  # of its workspace, one for each stream
ROUNDED = 2 << 20  # bytes to whose multiples torch's allocator rounds what is as large as LARGE or more
LARGE = 10 << 20
STREAMS = 5  # rows of hidden_size that a layer holds of each token beside what it computes, as torch keeps them apart
MOST_BATCH = 1 << 16


@dataclass(frozen=True)
class WeightFormat:
    """How the matrices of linear layers are kept, and of 4 bits those of experts. The rest stays in 16 bits.

    Attributes:
        bits: of a weight.
        groups: numbers of columns that share a scale, of which the first that divides a matrix's columns is taken; if
            none does, a row shares one.
        group_bytes: of a scale, and a zero where there is one.
    """

    bits: int
    groups: tuple[int, ...]
    group_bytes: int

    def nbytes(self, rows: int, columns: int) -> int:
        """Of a matrix."""
        group = next((group for group in self.groups if columns % group == 0), columns)
        return rows * columns * self.bits // 8 + rows * (columns // group) * self.group_bytes


WEIGHTS: dict[str, WeightFormat | None] = {
    "16": None,
    "8": WeightFormat(8, (), 4),
    "4": WeightFormat(4, (128, 64, 32), 4),
}


@dataclass(frozen=True)
class Fit:
    """An engine on GPUs of a kind.

    Attributes:
        gpu: its name.
        tp, ep, pp: ranks, each on one of them, as in `EngineConfig`.
        format: of the cache.
        context, batch: tokens of each of so many sequences.
        parts: bytes of the GPU that holds most.
        usable: bytes of each that may be used.
        longest_context: that as many sequences can have; 0: none.
        largest_batch: of sequences as long.
    """

    model: str
    gpu: str
    tp: int
    ep: int
    pp: int
    weight_bits: int
    format: str
    context: int
    batch: int
    parts: MemoryParts
    usable: int
    longest_context: int
    largest_batch: int

    @property
    def fits(self) -> bool:
        return self.parts.total <= self.usable


def fit(name: str, engine: EngineConfig, gpu: str, gpu_memory: int | None, weights: str) -> Fit:
    """Whether `engine`, of which `max_model_len` and `max_num_seqs` are the context and the batch, fits.

    Args:
        name: of the model, as `resolve_config` takes it.
        gpu: a name that `find_gpu` knows.
        gpu_memory: bytes of one; None: what its driver says.
        weights: a key of `WEIGHTS`.

    Raises:
        ModelError: there is no such model, or the engine does not know its architecture.
        ConfigError: the GPU is not known, or options do not go with the model.
    """
    found = asked_gpu("--fit", gpu)
    model = parse_config(resolve_config(name))
    if engine.tp % engine.ep:
        raise ConfigError(f"--ep {engine.ep}: does not divide --tp {engine.tp}, whose ranks share the experts out")
    check_model(engine, model)
    context, batch = engine.max_model_len or model.max_position, engine.max_num_seqs
    if context > model.max_position:
        raise ConfigError(f"--context {context}: the context of {name} is {model.max_position} tokens")
    memory = gpu_memory or found[1].memory_bytes
    usable = int(memory * engine.gpu_memory_utilization)
    stages = [RankPlan(model, engine, stage, WEIGHTS[weights], found[1]) for stage in range(engine.pp)]

    def parts(context: int, batch: int) -> MemoryParts:
        return max((stage.parts(context, batch, usable) for stage in stages), key=lambda parts: parts.total)

    return Fit(
        model=name,
        gpu=found[0],
        tp=engine.tp,
        ep=engine.ep,
        pp=engine.pp,
        weight_bits=int(weights),
        format=stages[0].format.describe(),
        context=context,
        batch=batch,
        parts=parts(context, batch),
        usable=usable,
        longest_context=_most(model.max_position, lambda tokens: parts(tokens, batch).total <= usable),
        largest_batch=_most(MOST_BATCH, lambda sequences: parts(context, sequences).total <= usable),
    )


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, 0 if none does; less fits better."""
    return bisect_left(range(1, limit + 1), True, key=lambda number: not fits(number))


class RankPlan:
    """What the first rank of a stage will hold; the others of its group hold as much.

    Args:
        weights: how matrices are kept; None: in 16 bits.
    """

    def __init__(
        self, config: ModelConfig, engine: EngineConfig, stage: int, weights: WeightFormat | None, gpu: GPU
    ) -> None:
        self._config, self._engine, self._weights, self._gpu = config, engine, weights, gpu
        tp, pp = engine.tp, engine.pp
        self._parallel = Parallel(stage * tp, tp * pp, Group(0, tp, ep=engine.ep), Stage(stage, pp))
        self.format = resolve(engine.kv, kv_spec(config, DTYPE))
        layers = self._parallel.stage.layers(config.num_layers)
        self._layout = KVLayout(kv_spec(config, DTYPE, self._parallel), self.format.of_layers(layers))

    def parts(self, context: int, batch: int, usable: int) -> MemoryParts:
        """With `batch` sequences of `context` tokens each."""
        weights = sum(self._tensors) + context * self._rotation_bytes
        rounded = sum(-nbytes % ROUNDED for nbytes in self._tensors if nbytes >= LARGE)
        tokens = min(self._engine.max_num_batched_tokens, batch * context)
        step = self._layer_bytes(tokens) + self._unpacked(context)
        workspace = rounded + CUBLAS + max(step, self._scoring_bytes(batch))
        memory = DeviceMemory(usable, RESERVE, weights, workspace, self._graph_bytes(batch))
        return MemoryParts.of(self._layout, batch * self.format.num_blocks(context), batch, weights, memory)

    @cached_property
    def _model(self) -> Decoder:
        """Without memory, for one position."""
        return Decoder(self._config, 1, dtype=DTYPE, device=torch.device("meta"), parallel=self._parallel)

    @property
    def _rotation_bytes(self) -> int:
        """Of a position in the table of rotations."""
        return self._model.rotary.table.nbytes

    @cached_property
    def _tensors(self) -> list[int]:
        """Bytes of each tensor of the model, but for that table."""
        return list(self._tensor_bytes())

    def _tensor_bytes(self) -> Iterator[int]:
        for module in self._model.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if self._weights and name == "weight" and isinstance(module, Linear) and not isinstance(module, Gate):
                    yield self._weights.nbytes(*tensor.shape)
                elif self._weights and self._weights.bits == 4 and isinstance(module, Experts):
                    yield self._weights.nbytes(*tensor.flatten(0, 1).shape)
                elif module is not self._model.rotary:
                    yield tensor.nbytes

    @cached_property
    def _elements(self) -> int:
        """That a layer holds of a token at most. What attention and MLP compute lies side by side: each takes from
        torch's allocator what it finds too small of the other's."""
        config, shard = self._config, self._parallel.tp.shard
        heads = shard(config.num_heads).size
        if mla := config.mla:
            cached = mla.kv_lora_rank + mla.rope_dim
            attention = heads * (mla.head_dim + cached + mla.kv_lora_rank + mla.value_dim) + 2 * cached
        else:
            kv_heads = shard(config.num_kv_heads).size
            attention = (2 * heads + 3 * kv_heads) * config.head_dim  # projected, and rotated
        inner = [
            experts.routing.top_k * (self._expert_columns(experts) + config.hidden_size)
            + 3 * shard(experts.shared_size).size
            + config.hidden_size
            if experts
            else 3 * shard(config.intermediate_size).size  # gates and ups, and their products
            for experts in config.experts
        ]
        return STREAMS * config.hidden_size + attention + max(inner)

    def _expert_columns(self, experts: MoEShape) -> int:
        _, columns = self._parallel.tp.shard_experts(experts.routing.num_experts, experts.intermediate_size)
        return columns.size

    def _layer_bytes(self, tokens: int) -> int:
        return tokens * self._elements * DTYPE.itemsize

    def _unpacked(self, tokens: int) -> int:
        """Of what prompts read, decoded for them; of latents, keys and values that are made of them."""
        if self._config.mla:
            return WORKSPACE
        if all(layer.key.bits == layer.value.bits == "16" for layer in self.format.layers):
            return 0
        spec = self._layout.spec
        head = tokens * (spec.key.dim + spec.value.dim) * DTYPE.itemsize
        return min(spec.key.heads * head, max(WORKSPACE, head))

    def _scoring_bytes(self, batch: int) -> int:
        """Logits of all sequences, their tokens' counts, and some rows with all of their log-probabilities."""
        if not self._parallel.stage.is_last:
            return 0
        vocab, floats = self._config.vocab_size, 3 * 4
        return vocab * (batch * (DTYPE.itemsize + 4) + SCORED_ROWS * (DTYPE.itemsize + floats))

    def _graph_bytes(self, batch: int) -> int:
        """A step in memory of its own, which all graphs share; and what they compute, which stays."""
        if not self._engine.cuda_graph:
            return 0
        absorbs, speculation = self._config.mla is not None, self._engine.speculation
        products = self._model.products / (2 if self._weights and self._weights.bits == 8 else 1)
        worthwhile = worthwhile_tokens(products / len(self._model.layers), self._gpu)
        rooms = prompt_rooms(
            batch * (1 + (speculation.num_tokens if speculation else 0)),
            min(worthwhile, ABSORBED_TOKENS) if absorbs else worthwhile,
            self._engine.max_num_batched_tokens,
        )
        rows = rooms[-1].tokens if rooms else 0
        far = 0 if absorbs or not rooms else self._unpacked(MOST_FAR * self.format.block_size)
        decodes = decode_sizes(batch)[-1]
        outputs = self._config.vocab_size if self._parallel.stage.is_last else self._config.hidden_size
        computed, hidden = decodes * outputs * DTYPE.itemsize, rows * self._config.hidden_size * DTYPE.itemsize
        step = max(self._layer_bytes(rows) + far, self._layer_bytes(decodes) + computed)
        return CUBLAS + step + computed + hidden
