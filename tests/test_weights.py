"""Weights: from any layout of safetensors to the same model, and every damaged one refused in one line."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SHAPE, make_checkpoint
from safetensors.torch import load_file, save_file

from kvtool.errors import CapacityError, ModelError
from kvtool.models import Decoder, load_config, load_model, weights

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    return load_model(folder, load_config(folder), dtype=dtype, device=CPU, **options)


def parameters(model: Decoder) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def assert_same(left: Decoder, right: Decoder) -> None:
    torch.testing.assert_close(parameters(left), parameters(right), rtol=0, atol=0)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in one file and in shards."""
    folder = tmp_path_factory.mktemp("originals")
    make_checkpoint("llama", folder / "single")
    make_checkpoint("llama", folder / "sharded", max_shard_size="100KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def single(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "single", tmp_path / "single"))


@pytest.fixture
def sharded(originals: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals / "sharded", tmp_path / "sharded"))


# One model from many layouts


def test_shards_hold_the_same_model(single: Path, sharded: Path) -> None:
    assert_same(load(sharded), load(single))


@pytest.mark.parametrize("size", [256, 1000, 1 << 20])
def test_pieces_of_any_size_give_the_same_model(size: int, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(single)
    monkeypatch.setattr(weights, "PIECE_BYTES", size)
    assert_same(load(single), expected)


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_weights_are_converted_as_torch_does(stored: torch.dtype, asked: torch.dtype, single: Path) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in load_file(single / "model.safetensors").items()}
    save_file(tensors, single / "model.safetensors")
    loaded = parameters(load(single, asked))
    down = "layers.1.mlp.down_proj.weight"
    assert torch.equal(loaded[down], tensors[f"model.{down}"].to(asked))
    q, k, v = (tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    assert torch.equal(loaded["layers.1.self_attn.qkv_proj.weight"], torch.cat((q, k, v)).to(asked))


def test_names_without_their_prefix_and_computed_tensors_are_understood(single: Path) -> None:
    expected = load(single)
    tensors = load_file(single / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, single / "model.safetensors")
    assert_same(load(single), expected)


def test_a_tied_model_ignores_a_stored_head(tmp_path: Path) -> None:
    make_checkpoint("qwen2", tmp_path, tie_word_embeddings=True)
    expected = load(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert_same(load(tmp_path), expected)
    assert expected.lm_head is None


# Dummy weights


def test_dummy_weights_depend_on_the_seed_alone(single: Path) -> None:
    (single / "model.safetensors").unlink()
    first, again, other = (load(single, load_format="dummy", seed=seed) for seed in (3, 3, 4))
    assert_same(first, again)
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)
    for name, weight in first.named_parameters():
        if "norm" in name:
            assert (weight == 1).all()
        elif weight.numel() > 1000:
            assert weight.std() == pytest.approx(0.02, rel=0.1)
            assert len(weight.unique(dim=0)) == len(weight)


def test_dummy_rows_differ_beyond_the_block_that_is_repeated(tmp_path: Path) -> None:
    config = {**SHAPE, "model_type": "llama", "rms_norm_eps": 1e-6, "vocab_size": 40_000, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    embedding = load(tmp_path, torch.bfloat16, load_format="dummy").embed_tokens.weight
    assert embedding.numel() > 2e6
    assert len(embedding.unique(dim=0)) == len(embedding)


# What is refused


def edit_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def edit_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def edit_index(folder: Path, shard: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (folder / INDEX).write_text(json.dumps(index))


def overlap(header: dict[str, Any]) -> None:
    header["model.norm.weight"]["data_offsets"] = header["model.layers.0.input_layernorm.weight"]["data_offsets"]


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def not_a_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


def truncated(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")


def with_value(value: float) -> torch.Tensor:
    weight = torch.ones(64, 80)
    weight[5, 7] = value
    return weight


DOWN, NORM, BIAS = "model.layers.2.mlp.down_proj.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"
DAMAGED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "--load-format dummy"),
    "pickled": (pickled, "pytorch_model.bin: pickled weights can run code"),
    "pointer": (pointer, "model.safetensors: is a git-LFS pointer"),
    "not a file": (not_a_file, "model.safetensors: is damaged or unreadable"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors: is damaged"),
    "truncated": (truncated, "model.safetensors: is damaged"),
    "overlapping": (lambda folder: edit_header(folder / "model.safetensors", overlap), "model.safetensors: is damaged"),
    "missing": (lambda folder: edit_tensors(folder, **{DOWN: None}), "layers.2.mlp.down_proj.weight is missing"),
    "unexpected": (
        lambda folder: edit_tensors(folder, **{BIAS: torch.ones(64)}),
        f"{BIAS} has no place in the llama model",
    ),
    "shape": (
        lambda folder: edit_tensors(folder, **{DOWN: torch.ones(64, 81)}),
        f"{DOWN} has shape [64, 81], but config.json makes it [64, 80]",
    ),
    "type": (
        lambda folder: edit_tensors(folder, **{NORM: torch.ones(64, dtype=torch.int8)}),
        f"{NORM} is stored as I8; convert it to one of F64, F32, F16, BF16",
    ),
    "nan": (lambda folder: edit_tensors(folder, **{DOWN: with_value(float("nan"))}), f"{DOWN} holds NaN or infinity"),
    "inf": (lambda folder: edit_tensors(folder, **{DOWN: with_value(float("-inf"))}), f"{DOWN} holds NaN or infinity"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_checkpoint_is_refused_in_one_line(case: str, single: Path) -> None:
    damage, expected = DAMAGED[case]
    damage(single)
    before = {file: file.stat().st_mtime_ns for file in single.iterdir()}
    with pytest.raises(ModelError) as caught:
        load(single)
    assert expected in str(caught.value)
    assert str(single) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {file: file.stat().st_mtime_ns for file in single.iterdir()} == before


BAD_INDEX: dict[str, tuple[Callable[[Path], object], str]] = {
    "outside": (lambda folder: edit_index(folder, "../single.safetensors"), "names '../single.safetensors'"),
    "absolute": (lambda folder: edit_index(folder, "/etc/x.safetensors"), "names '/etc/x.safetensors'"),
    "backslash": (lambda folder: edit_index(folder, "..\\x.safetensors"), "shards must be .safetensors files"),
    "pickled": (lambda folder: edit_index(folder, "pytorch_model.bin"), "names 'pytorch_model.bin'"),
    "missing shard": (
        lambda folder: edit_index(folder, "gone.safetensors"),
        "shard gone.safetensors, which is missing",
    ),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), "weight_map is missing or empty"),
    "map": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": [1]}'),
        "weight_map is [1]; it must be an object",
    ),
    "no json": (lambda folder: (folder / INDEX).write_text("{"), "is no JSON"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_a_bad_index_is_refused_in_one_line(case: str, sharded: Path) -> None:
    damage, expected = BAD_INDEX[case]
    damage(sharded)
    with pytest.raises(ModelError) as caught:
        load(sharded)
    assert str(caught.value).startswith(f"{sharded / INDEX}: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_stored_twice_is_refused(sharded: Path) -> None:
    last = max(sharded.glob("*.safetensors"))
    save_file({**load_file(last), NORM: torch.ones(64)}, last)
    first = next(file for file in sorted(sharded.glob("*.safetensors")) if file != last)
    save_file({**load_file(first), NORM: torch.ones(64)}, first)
    with pytest.raises(ModelError, match=f"{NORM} is also in {first.name}"):
        load(sharded)


def test_values_beyond_the_dtype_asked_for_are_refused(single: Path) -> None:
    edit_tensors(single, **{DOWN: with_value(1e6)})
    load(single, torch.bfloat16)
    with pytest.raises(ModelError, match=rf"{DOWN} holds values beyond torch.float16; choose another --dtype"):
        load(single, torch.float16)


# Memory

MEASURE = """
import sys, torch
from pathlib import Path
from kvtool.models import load_config, load_model

def memory(field):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(field))

folder = Path(sys.argv[1])
config = load_config(folder)
before = memory("VmRSS")
model = load_model(folder, config, dtype=getattr(torch, sys.argv[2]), device=torch.device("cpu"), max_model_len=64)
print(memory("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("shards", "dtype"), [(1, "float16"), (1, "float32"), (4, "float16")])
def test_loading_takes_less_than_a_fifth_more_than_the_model(shards: int, dtype: str, tmp_path: Path) -> None:
    """200 MB in fp16, most of it one tensor, in one file or several, at its own dtype or converted."""
    config = {**SHAPE, "model_type": "llama", "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
    config |= {"vocab_size": 40_000, "hidden_size": 2048, "intermediate_size": 1024, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    meta = load_model(
        tmp_path, load_config(tmp_path), dtype=torch.float16, device=torch.device("meta"), load_format="dummy"
    )
    tensors = {f"model.{name}": torch.ones(slot.shape, dtype=torch.float16) for name, slot in meta.slots()}
    files = {f"model-{shard}.safetensors": list(tensors)[shard::shards] for shard in range(shards)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, tmp_path / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    command = [sys.executable, "-c", MEASURE, str(tmp_path), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    taken, size = map(int, result.stdout.split())
    print(f"{taken / size:.3f} × the model")
    assert size > 160e6
    assert taken < 1.2 * size


def test_a_model_that_no_memory_could_hold_is_refused(single: Path) -> None:
    fields = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(fields | {"vocab_size": 2**31 - 1, "hidden_size": 2**16}))
    with pytest.raises(CapacityError, match="does not fit in the memory of cpu") as caught:
        load(single, load_format="dummy")
    assert "\n" not in str(caught.value)
