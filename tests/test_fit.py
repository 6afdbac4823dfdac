"""`kvtool mla-size --fit`: parts as models and stores take them, and the finding that the engine would come to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import MLA, QWEN_MOE, SHAPE
from conftest import Command, error_line
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.config import EngineConfig, KVOptions
from kvtool.errors import CapacityError, ConfigError, ModelError
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.store import KVStore
from kvtool.memory import DeviceMemory, cache_memory, capacity
from kvtool.models import Decoder, Quantization, load_config, load_model, weight_bytes
from kvtool.models.kv import kv_spec
from kvtool.models.resolve import EMBEDDED
from kvtool.parallel import Group, Parallel, Stage
from kvtool.sizing.fit import WEIGHTS, Fit, WeightFormat, fit

GIB = 1 << 30
MODELS: list[dict[str, Any]] = [
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    {"model_type": "qwen3", "tie_word_embeddings": False},
    {"model_type": "qwen3_moe", **QWEN_MOE},
    {"model_type": "deepseek_v3", **MLA, "q_lora_rank": 24, "n_group": 2, "topk_group": 1},
]


def write_config(folder: Path, fields: dict[str, Any]) -> str:
    config = {**SHAPE, "rms_norm_eps": 1e-6, "rope_theta": 1e4, **fields}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def engine(context: int | None = None, batch: int = 1, nbits: Any = "16", **settings: Any) -> EngineConfig:
    return EngineConfig(max_model_len=context, max_num_seqs=batch, kv=KVOptions(nbits=nbits), **settings)


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("fields", MODELS, ids=lambda fields: str(fields["model_type"]))
def test_weights_are_those_of_the_model(tmp_path: Path, fields: dict[str, Any], tp: int, pp: int) -> None:
    """Of the rank that has most, as allocated."""
    folder = write_config(tmp_path, fields)
    held = []
    for rank in range(tp * pp):
        parallel = Parallel(rank, tp * pp, Group(rank % tp, tp), Stage(rank // tp, pp))
        model = Decoder(load_config(tmp_path), 100, dtype=torch.bfloat16, device=torch.device("cpu"), parallel=parallel)
        held.append(weight_bytes(model))
    # With a large batch the last stage, which scores, may hold most of all while another has more weights.
    found = fit(folder, engine(100, tp=tp, pp=pp), "H200", None, "16")
    assert found.parts.weights in held
    assert pp > 1 or found.parts.weights == max(held)


@pytest.mark.parametrize("nbits", ["16", "8", "4", "2", "fp8"])
@given(context=st.integers(1, 300), batch=st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_cache_is_that_of_the_store(nbits: str, context: int, batch: int) -> None:
    parts = fit("tiny", engine(context, batch, nbits), "H200", None, "16").parts
    spec = kv_spec(load_config(EMBEDDED["tiny"]), torch.bfloat16)
    layout = KVLayout(spec, resolve(KVOptions(nbits=nbits), spec))  # type: ignore[arg-type]
    store = KVStore(layout, batch * layout.format.num_blocks(context), batch, torch.bfloat16)
    streams = [stream for layer in store.layers for stream in (layer.key, layer.value)]
    codes = sum(stream.arrays["codes"].nbytes for stream in streams)
    assert (parts.codes, parts.metadata, parts.windows) == (codes, store.blocks.nbytes - codes, store.tails.nbytes)
    assert store.blocks.nbytes + store.tails.nbytes == layout.bytes_for([context] * batch)


def test_weights_in_fewer_bits() -> None:
    """As packed matrices are laid out: codes, and 16-bit scale and zero of a group or a float32 scale of a row."""
    assert WEIGHTS["4"] == WeightFormat(4, (128, 64, 32), 4)
    assert WeightFormat(4, (128, 64, 32), 4).nbytes(3584, 18944) == 3584 * (18944 // 2 + 18944 // 128 * 4)
    assert WeightFormat(4, (128, 64, 32), 4).nbytes(10, 96) == 10 * (48 + 3 * 4)
    assert WeightFormat(8, (), 4).nbytes(3584, 18944) == 3584 * (18944 + 4)
    sizes = {bits: fit("Qwen2.5-7B", engine(4096), "H200", None, bits).parts.weights for bits in WEIGHTS}
    matrices = 28 * (3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944)
    assert sizes["16"] - sizes["4"] == matrices * 2 - matrices * 4 // 8 - matrices // 128 * 4
    rows = 28 * (3584 + 2 * 512 + 3584 + 2 * 18944 + 3584)
    assert sizes["16"] - sizes["8"] == matrices - rows * 4


def test_experts_in_fewer_bits(tmp_path: Path) -> None:
    """As they are loaded, and multiplied with as they are."""
    sizes = {"moe_intermediate_size": 64, "intermediate_size": 128}
    folder = write_config(tmp_path, {"model_type": "qwen3_moe", **QWEN_MOE, **sizes})
    quantization, context = Quantization("w4a16"), 100
    model = load_model(
        tmp_path,
        load_config(tmp_path),
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        load_format="dummy",
        max_model_len=context,
        quantization=quantization,
    )
    plain, packed = (fit(folder, engine(context), "H200", None, bits).parts for bits in ("16", "4"))
    assert packed.weights == weight_bytes(model)
    assert packed.workspace == plain.workspace


@given(
    gib=st.floats(0.9, 3.0),
    context=st.integers(1, 2048),
    batch=st.integers(1, 300),
    nbits=st.sampled_from(["16", "4", "2", "fp8"]),
)
@settings(max_examples=40, deadline=None)
def test_what_fits_is_what_the_engine_would_take(gib: float, context: int, batch: int, nbits: str) -> None:
    """It gets blocks for all sequences of what such a GPU has left; and no more sequences or tokens than told fit."""
    config, memory = engine(context, batch, nbits), int(gib * GIB)
    found = fit("tiny", config, "H200", memory, "16")
    parts, model = found.parts, load_config(EMBEDDED["tiny"])
    assert parts.workspace and parts.graphs and parts.reserve
    device = DeviceMemory(found.usable, parts.reserve, parts.weights, parts.workspace, parts.graphs)
    spec = kv_spec(model, torch.bfloat16)
    layout = KVLayout(spec, resolve(config.kv, spec))
    try:
        blocks, _ = capacity(config, model, layout, cache_memory(config, layout, device))
    except CapacityError:
        blocks = -1
    needed = batch * layout.format.num_blocks(context)
    assert found.fits == (blocks >= needed and device.for_cache >= parts.windows) or needed == 0

    def fits(context: int, batch: int) -> bool:
        return fit("tiny", engine(context, batch, nbits), "H200", memory, "16").fits

    most, longest = found.largest_batch, found.longest_context
    assert most == 0 or fits(context, most)
    assert most == 1 << 16 or not fits(context, most + 1)
    assert longest == 0 or fits(longest, batch)
    assert longest == 2048 or not fits(longest + 1, batch)
    assert found.fits == (batch <= most) == (context <= longest)


def test_experts_are_shared_out_either_way() -> None:
    whole = fit("Qwen3-30B-A3B", engine(4096, tp=1), "H200", None, "16").parts
    pieces, experts = (fit("Qwen3-30B-A3B", engine(4096, tp=4, ep=ep), "H200", None, "16").parts for ep in (1, 4))
    assert pieces.weights == experts.weights < whole.weights / 3
    assert pieces.codes == experts.codes == whole.codes // 4


def test_more_gpus_hold_less_each() -> None:
    def parts(**settings: int) -> Fit:
        return fit("Llama-3.1-8B", engine(8192, 64, "4", **settings), "4090", None, "16")

    alone, shared, staged = parts(), parts(tp=4), parts(pp=4)
    for part in ("codes", "metadata", "windows"):
        whole = getattr(alone.parts, part)
        assert getattr(shared.parts, part) == getattr(staged.parts, part) == whole // 4
    assert alone.gpu == "RTX 4090" and not alone.fits and shared.fits and staged.fits
    assert shared.parts.weights < alone.parts.weights / 3


def test_rows_of_several_gpus(command: Command, tmp_path: Path) -> None:
    page = tmp_path / "fit.md"
    options = ("--model", "Qwen2.5-7B", "--nbits", "4", "--context", "32768", "--batch", "16", "--output", str(page))
    status, out, err = command("mla-size", "--fit", "4090", "--fit", "H200", "--json", *options)
    document = json.loads(out)
    assert (status, err, document["schema"]) == (1, "", "kvtool.mla-size/1")
    assert [(row["gpu"], row["fits"]) for row in document["rows"]] == [("RTX 4090", False), ("H200", True)]
    assert all(row["total"] == sum(row["parts"].values()) for row in document["rows"])
    assert document["config"]["engine"]["max_num_seqs"] == 16
    assert "too much" in page.read_text()
    status, out, _ = command("mla-size", "--fit", "4090", "--weight-bits", "4", *options)
    assert status == 0 and "Qwen2.5-7B, 4 bits" in out and "norms and gates stay in 16 bits" in out


def test_the_default_is_the_embedded_model_at_its_context(command: Command) -> None:
    status, out, _ = command("mla-size", "--fit", "RTX 3090", "--json")
    (row,) = json.loads(out)["rows"]
    assert status == 0 and (row["model"], row["context"], row["batch"], row["gpu"]) == ("tiny", 2048, 1, "RTX 3090")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--fit", "RTX 9090"], "--fit RTX 9090: must be one of"),
        (["--fit", "RTX 4090:4"], "--tp says how many"),
        (["--fit", "H200", "--section", "measured"], "leave out --section"),
        (["--fit", "H200", "--gpu", "H200"], "leave out --section"),
        (["--fit", "H200", "--context", "4096"], "--context 4096: the context of tiny is 2048"),
        (["--fit", "H200", "--tp", "3"], "--tp 3"),
        (["--fit", "H200", "--pp", "5"], "--pp 5"),
        (["--fit", "H200", "--model", "Qwen3-30B-A3B", "--tp", "4", "--ep", "3"], "--ep 3: does not divide --tp 4"),
        (["--pp", "2"], "are for --fit"),
        (["--weight-bits", "4"], "add --gpu or --fit"),
        (["--section", "measured", "--weight-bits", "4"], "are for --section theory"),
        (["--fit", "H200", "--weight-bits", "3"], "--weight-bits"),
        (["--fit", "H200", "--model", "/no/such/folder"], "/no/such/folder"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(command: Command, arguments: list[str], said: str) -> None:
    assert said in error_line(command("mla-size", *arguments))


def test_an_architecture_that_the_engine_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model_type is 'gemma2'"):
        fit(write_config(tmp_path, {"model_type": "gemma2"}), engine(), "H200", None, "16")
    with pytest.raises(ConfigError, match="context"):
        fit("tiny", engine(4096), "H200", None, "16")
