"""Ranks that share a model: what each one holds of it, and that together they answer as one does."""

from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint

from kvtool.models import Decoder, load_config, load_model
from kvtool.parallel import Group, Parallel, Stage

CPU = torch.device("cpu")


def part(folder: Path, tp: tuple[int, int], pp: tuple[int, int] = (0, 1), load_format: str = "auto") -> Decoder:
    """What one rank loads; it does not compute."""
    return load_model(
        folder,
        load_config(folder),
        dtype=torch.float32,
        device=CPU,
        load_format=load_format,  # type: ignore[arg-type]
        parallel=Parallel(Group(*tp), Stage(*pp)),
    )


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3"])
@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_pieces_of_the_model(model_type: str, size: int, load_format: str, tmp_path: Path) -> None:
    make_checkpoint(model_type, tmp_path, attention_bias=True)
    whole = part(tmp_path, (0, 1), load_format=load_format)
    shards = [part(tmp_path, (rank, size), load_format=load_format) for rank in range(size)]
    names = {name for name, _ in whole.slots()}
    for name, stored in gathered([whole]).items():
        assert torch.equal(gathered(shards)[name], stored), name
    assert all({name for name, _ in shard.slots()} == names for shard in shards)
    held = [sum(parameter.numel() for parameter in shard.parameters()) for shard in shards]
    assert max(held) < 1.15 * sum(p.numel() for p in whole.parameters()) / size


def gathered(models: list[Decoder]) -> dict[str, torch.Tensor]:
    """Stored tensors put together again from the ranks' pieces; NaN where nobody holds anything."""
    tensors: dict[str, torch.Tensor] = {}
    for model in models:
        for name, slot in model.slots():
            into = tensors.setdefault(name, torch.full(slot.shape, torch.nan))
            into[tuple(slice(first, first + n) for first, n in zip(slot.start, slot.to.shape, strict=True))] = slot.to
    return tensors


def test_stages_hold_their_layers_and_nothing_else(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    whole, stages = part(tmp_path, (0, 1)), [part(tmp_path, (0, 1), (index, 2)) for index in range(2)]
    names = [name for stage in stages for name, _ in stage.slots()]
    assert sorted(names) == sorted(name for name, _ in whole.slots())
    for name, stored in gathered([whole]).items():
        assert torch.equal(gathered(stages)[name], stored), name
