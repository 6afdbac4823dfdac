"""Weights in fewer bits: as checkpoints store them, against transformers; as they are rounded; saved; shared out."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import DenseAttend, make_checkpoint, run
from conftest import script
from quantized_checkpoints import (
    MIXTURES,
    RECIPES,
    SHAPE,
    Recipe,
    awq,
    edit_config,
    gptq,
    load,
    quantize,
    words,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvtool.calibration import choose_quantization, text_windows
from kvtool.chosen_model import ChosenModel
from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import ConfigError
from kvtool.layers.moe import Experts
from kvtool.layers.quantized import Int4Matrix, SideBySide, rounded
from kvtool.models import Decoder, Quantization, load_config, resolve_model
from kvtool.models.calibrate import fp8, int4
from kvtool.parallel import Group, Parallel
from kvtool.request import SamplingParams

CPU = torch.device("cpu")
IDS = [3, 150, 7, 7, 198, 42, 60, 61, 5, 99, 100, 12]


def logits(model: Decoder) -> Tensor:
    return run(model, IDS, DenseAttend(model.config))


def written(folder: Path, recipe: Recipe, model_type: str = "qwen2", **options: Any) -> Tensor:
    """A checkpoint of this recipe, and what transformers makes of the weights that it stands for."""
    model = make_checkpoint(model_type, folder, **SHAPE).double()
    model.load_state_dict(quantize(folder, recipe, **options))
    if recipe.activations:
        round_inputs = {"int8": int8_nearest, "fp8": fp8_nearest}[recipe.activations]
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("proj"):
                module.register_forward_pre_hook(lambda _, x: (round_inputs(x[0]),))
    with torch.inference_mode():
        expected: Tensor = model(torch.tensor([IDS])).logits[0]
    return expected


def error(got: Tensor, expected: Tensor) -> float:
    """Root of the mean squared error, in units of what differs between logits."""
    return float((got - expected).square().mean().sqrt() / expected.std())


def int8_nearest(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() * step


def fp8_nearest(x: Tensor) -> Tensor:
    """e4m3: 3 bits behind the leading one, exponents from -6 up."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    scaled = x / scale
    step = torch.exp2(scaled.abs().clamp(min=2.0**-6).log2().floor() - 3)
    return (scaled / step).round() * step * scale


# --- as checkpoints store them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_stored_weights_compute_what_they_stand_for(name: str, tmp_path: Path) -> None:
    expected = written(tmp_path, RECIPES[name])
    # transformers computes norms in float32, which makes an activation another 8-bit number now and then.
    assert error(logits(load(tmp_path)), expected) < (1e-3 if RECIPES[name].activations else 1e-5)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3"])
def test_other_architectures_store_them_too(model_type: str, tmp_path: Path) -> None:
    expected = written(tmp_path, gptq(32, act_order=True), model_type)
    assert error(logits(load(tmp_path)), expected) < 1e-5


def test_a_part_of_a_fused_layer_may_be_plain(tmp_path: Path) -> None:
    expected = written(tmp_path, awq(32), keep=("k_proj", "layers.1.mlp"))
    model = load(tmp_path)
    assert error(logits(model), expected) < 1e-5
    assert isinstance(model.linears(0)["layers.0.self_attn.qkv_proj"].weight, SideBySide)
    assert isinstance(model.linears(1)["layers.1.mlp.down_proj"].weight, nn.Parameter)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_and_latents_may_be_stored_so(model_type: str, tmp_path: Path) -> None:
    """They compute what a checkpoint of the weights that they stand for does."""
    make_checkpoint(model_type, tmp_path, **MIXTURES[model_type])
    dense = quantize(tmp_path, gptq(32))
    got = logits(load(tmp_path))
    save_file(dense, tmp_path / "model.safetensors")
    edit_config(tmp_path, quantization_config=None)
    assert error(got, logits(load(tmp_path))) < 1e-9


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_are_rounded_to_four_bits_and_saved(model_type: str, tmp_path: Path) -> None:
    make_checkpoint(model_type, tmp_path / "from", **MIXTURES[model_type])
    keep = ("*.o_proj",)
    engine = EngineConfig(
        model=str(tmp_path / "from"), dtype="float32", device="cpu", quantization="w4a16", keep_layers=keep
    )
    script("quantize_weights").save(engine, tmp_path / "to")
    plain = load(tmp_path / "from", torch.float32)
    computed = load(tmp_path / "from", torch.float32, quantization=Quantization("w4a16", keep=keep))
    assert torch.equal(logits(load(tmp_path / "to", torch.float32)), logits(computed))
    assert computed.products == plain.products
    assert computed.weight_bytes < 0.6 * plain.weight_bytes
    for model in (plain, computed):  # what a token's own experts have, and all that is no expert's
        experts = [m for layer in map(int, model.layers) for m in model.mixtures(layer).values()]
        held = [sum(t.nbytes for t in (*m.experts.parameters(), *m.experts.buffers())) for m in experts]
        shares = [m.gate.routing.top_k / m.gate.routing.num_experts for m in experts]
        unread = sum(nbytes * (1 - share) for nbytes, share in zip(held, shares, strict=True))
        embedding = 0 if model.lm_head is None else model.embed_tokens.weight.nbytes
        assert model.step_bytes == pytest.approx(model.weight_bytes - embedding - unread, abs=1)
    assert 0 < error(logits(computed), logits(plain)) < 0.6
    with_experts = load(tmp_path / "from", quantization=Quantization("w4a16", keep=("*.experts.*",)))
    assert all(isinstance(m.experts, Experts) for layer in (0, 1) for m in with_experts.mixtures(layer).values())


def test_zeros_less_one_borrow_as_gptqmodel_has_them(tmp_path: Path) -> None:
    """A zero of 0 borrows from the word's next number, and adding ones to the word gives it back."""
    zeros = [0, 3, 15, 0, 0, 8, 1, 9]
    stored = (words([zeros]).long() - 0x11111111) & 0xFFFFFFFF
    signed = torch.where(stored >> 31 == 1, stored - (1 << 32), stored).int()
    make_checkpoint("llama", tmp_path, **SHAPE)
    quantize(tmp_path, gptq(32))
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.qzeros"
    tensors[name][:] = signed
    save_file(tensors, tmp_path / "model.safetensors")
    matrix = load(tmp_path).linears(0)["layers.0.self_attn.o_proj"].weight
    assert isinstance(matrix, Int4Matrix)
    assert matrix.zeros[:8, 0].tolist() == zeros


def test_words_are_those_of_compressed_tensors() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0))
    assert torch.equal(words(codes.tolist()), helpers.pack_to_int32((codes - 8).to(torch.int8), 4))
    packed = helpers.pack_to_int32((codes - 8).to(torch.int8), 4, packed_dim=0)
    assert torch.equal(words(codes.t().tolist()).t(), packed)


# --- rounded while they are loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["w8a8", "fp8", "w4a16"])
def test_rounding_is_to_the_nearest(method: str) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(1))
    weight[3] = 0
    weight[4, :128] = weight[4, :128].abs() + 1  # far from 0
    off = (rounded(weight, method, 128).dense(torch.float64) - weight).abs()
    if method == "fp8":
        step = weight.abs().amax(1, keepdim=True) / 448 * 2**-6
        assert (off <= torch.maximum(weight.abs() / 16, step) * 1.01).all()
        return
    groups = weight.unflatten(1, (-1, 256 if method == "w8a8" else 128))
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    step = groups.abs().amax(-1) / 127 if method == "w8a8" else (high - low) / 15
    # A zero between two codes shifts the grid by up to half a step, which the least or greatest then lies outside of.
    most = 0.501 if method == "w8a8" else 1.01
    assert (off.unflatten(1, groups.shape[1:]).amax(-1) <= most * step + 1e-6).all()


@pytest.mark.parametrize("method", ["w8a8", "fp8", "w4a16"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_bytes_are_those_of_the_arithmetic(method: Any, load_format: Any, tmp_path: Path) -> None:
    make_checkpoint("qwen2", tmp_path, **SHAPE)
    options = {"dtype": torch.bfloat16, "load_format": load_format}
    plain = load(tmp_path, **options)
    model = load(tmp_path, **options, quantization=Quantization(method, keep=("*.o_proj",)))
    rows = {"qkv": (8 + 2 * 2) * 16, "gate_up": 512, "down": 128}
    columns = {"qkv": 128, "gate_up": 128, "down": 256}
    saved = 0
    for kind, n in rows.items():
        k = columns[kind]
        held = n * k // 2 + 2 * 2 * n * k // 128 if method == "w4a16" else n * k + 4 * n
        saved += 2 * (2 * n * k - held)
    assert plain.weight_bytes - model.weight_bytes == saved
    eight_bit = 2 * sum(n * columns[kind] for kind, n in rows.items()) * (method != "w4a16")
    assert plain.products - model.products == eight_bit / 2  # of which two count as one


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_rounded_where_that_is_asked(tied: bool, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, **SHAPE, tie_word_embeddings=tied)
    options = {"dtype": torch.bfloat16, "quantization": Quantization("w8a8")}
    plain = load(tmp_path, **options)
    model = load(tmp_path, **options | {"quantization": Quantization("w8a8", head=True)})
    rows, columns = 199, 128
    held, rounded_head = 2 * rows * columns, rows * columns + 4 * rows
    assert model.weight_bytes - plain.weight_bytes == (rounded_head if tied else rounded_head - held)
    assert model.step_bytes - plain.step_bytes == rounded_head - held
    assert plain.step_bytes == plain.weight_bytes - (0 if tied else held)
    assert 0 < error(logits(model).float(), logits(plain).float()) < 0.05


def test_dummies_of_a_quantised_checkpoint_need_no_weights(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, **SHAPE)
    edit_config(tmp_path, quantization_config=RECIPES["gptq"].config)
    (tmp_path / "model.safetensors").unlink()
    model = load(tmp_path, load_format="dummy")
    assert isinstance(model.linears(1)["layers.1.mlp.gate_up_proj"].weight, Int4Matrix)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(("method", "share"), [("w4a16", 0.6), ("fp8", 0.8)])
def test_calibration_costs_outputs_less(method: str, share: float) -> None:
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(256, 256, generator=generator) / 16
    x = torch.randn(2048, 256, generator=generator) @ (mixed + torch.eye(256)) * torch.linspace(0.1, 3, 256)
    x[:, 17] = 0  # of which nothing is known
    weight = torch.randn(64, 256, generator=generator)
    weight[5] = 0

    def cost(matrix: Any) -> float:
        return float((x @ (matrix.dense(torch.float32) - weight).t()).square().mean())

    hessian = x.t() @ x
    found = fp8(weight, hessian) if method == "fp8" else int4(weight, hessian, 128, torch.float32)
    assert cost(found) < share * cost(rounded(weight, method, 128))
    assert not found.dense(torch.float32)[5].any()


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8"])
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_calibrated_layers_stay_near(method: Any, model_type: str, tmp_path: Path) -> None:
    """Scales that move from norms and rows into columns change nothing but the rounding."""
    make_checkpoint(model_type, tmp_path, **SHAPE | {"num_key_value_heads": 8})
    exact = logits(load(tmp_path))
    windows = torch.randint(10, 190, (32, 64), generator=torch.Generator().manual_seed(0)).tolist()
    nearest = "fp8" if method == "fp8" else "w4a16"
    plain, looked = (
        error(logits(load(tmp_path, quantization=quantization)), exact)
        for quantization in (Quantization(nearest), Quantization(method, windows=windows))
    )
    assert looked < 1.2 * plain < 0.6


def test_eight_bits_say_what_sixteen_say_on_tiny() -> None:
    """Token by token on the same text, most choices are the same."""
    folder, choices = resolve_model("tiny"), []
    ids = Engine(EngineConfig(kv_cache_memory=1 << 22)).generate(
        ["The old man"], SamplingParams(max_tokens=200, seed=1)
    )
    text = ids[0].prompt_token_ids + ids[0].token_ids
    for quantization in (None, Quantization("w8a8"), Quantization("fp8"), Quantization("w4a16")):
        model = load(folder, torch.float32, quantization=quantization)
        choices.append(run(model, text, DenseAttend(model.config)).argmax(-1))
    exact, w8a8, fp8, w4a16 = choices
    assert (w8a8 == exact).float().mean() > 0.9
    assert (fp8 == exact).float().mean() > 0.9
    assert (w4a16 == exact).float().mean() > 0.72


def test_a_text_is_read_in_pieces_that_the_model_can_take(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"One two three four. " * 100 + b"\xc3")  # cut within a letter
    config = load_config(resolve_model("tiny"))
    pieces = text_windows(str(tmp_path / "text.txt"), 96, config, resolve_model("tiny"))
    assert {len(piece) for piece in pieces} == {96}
    assert len(pieces) >= 4
    (tmp_path / "binary.txt").write_bytes(b"One two \xff three")
    with pytest.raises(ConfigError, match=r"binary\.txt: is no UTF-8 text \(byte 8\); convert it"):
        text_windows(str(tmp_path / "binary.txt"), 96, config, resolve_model("tiny"))
    (tmp_path / "short.txt").write_text("One two three")
    with pytest.raises(ConfigError, match=r"short\.txt: holds 3 tokens; give at least 256"):
        text_windows(str(tmp_path / "short.txt"), 96, config, resolve_model("tiny"))


# --- saved ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gptq", "awq", "w4a16", "w8a8", "fp8"])
@pytest.mark.parametrize("model_type", ["qwen2", "phi3"])
def test_saved_weights_are_those_that_were_computed(method: Any, model_type: str, tmp_path: Path) -> None:
    make_checkpoint(model_type, tmp_path / "from", **SHAPE)
    text = short_text(tmp_path)
    quantize_weights = script("quantize_weights")
    engine = EngineConfig(
        model=str(tmp_path / "from"),
        dtype="float32",
        device="cpu",
        quantization=method,
        keep_layers=("layers.1.mlp.*",),
        calibration=text if method in ("gptq", "awq", "fp8") else None,
    )
    quantize_weights.save(engine, tmp_path / "to")
    saved, config = load(tmp_path / "to", torch.float32), load_config(tmp_path / "from")
    quantization = choose_quantization(engine, config, tmp_path / "from", CPU)
    computed = load(tmp_path / "from", torch.float32, quantization=quantization)
    assert torch.equal(logits(saved), logits(computed))
    assert isinstance(saved.linears(1)["layers.1.mlp.down_proj"].weight, nn.Parameter)
    assert (tmp_path / "to" / "tokenizer.json").exists()


@pytest.mark.parametrize("method", ["w4a16", "awq", "w8a8"])
def test_what_stays_is_told_to_other_loaders(method: Any, tmp_path: Path) -> None:
    """By whole names: none of them knows globs, or that q, k and v are kept together. And others may read the files."""
    make_checkpoint("qwen2", tmp_path / "from", **SHAPE)
    text = short_text(tmp_path) if method == "awq" else None
    engine = EngineConfig(
        model=str(tmp_path / "from"),
        device="cpu",
        quantization=method,
        keep_layers=("*.down_proj", "layers.0.self_attn.q_proj"),
        calibration=text,
    )
    script("quantize_weights").save(engine, tmp_path / "to")
    kept = {f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)}
    kept |= {f"model.layers.0.self_attn.{part}_proj" for part in "qkv"}
    names = {name.removesuffix(".weight") for name in load_file(tmp_path / "from" / "model.safetensors")}
    rounded_names = {name for name in names if name.endswith("_proj")} - kept
    told = json.loads((tmp_path / "to" / "config.json").read_text())["quantization_config"]
    if method == "w8a8":
        assert set(told["ignore"]) == {"lm_head", *kept}
    elif method == "awq":
        assert set(told["modules_to_not_convert"]) == kept
    else:
        assert set(told["modules_in_block_to_quantize"][0]) == rounded_names
        patterns = [pattern.removeprefix("-:") for pattern in told["dynamic"]]
        assert {name for name in names if any(re.match(pattern, name) for pattern in patterns)} == kept
    assert len({file.stat().st_mode for file in (tmp_path / "to").iterdir()}) == 1


@pytest.mark.parametrize(
    ("output", "options", "why"),
    [
        ("{here}", [], "--output {here}: exists; give a new folder"),
        ("/dev/null/a/to", [], "--output /dev/null/a/to: Not a directory"),
        ("{here}/to", ["--calibration", "{here}"], "--calibration {here}: cannot be read"),
    ],
)
def test_saving_what_cannot_be_is_refused(
    output: str,
    options: list[str],
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is computed, with status 2, and nothing is left behind."""
    quantize_weights = script("quantize_weights")
    words = ["quantize_weights", "--method", "awq", "--output", output, *options]
    monkeypatch.setattr(sys, "argv", [word.format(here=tmp_path) for word in words])
    monkeypatch.setattr(ChosenModel, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit) as ended:
        quantize_weights.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {why.format(here=tmp_path)}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "tolerance"), [("fp8", 1e-5), ("w8a8", 0.06)])
def test_transformers_opens_what_was_saved(method: Any, tolerance: float, tmp_path: Path) -> None:
    """fp8 to the digit; int8 activations reach to max|x| / 127.5 there."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    make_checkpoint("qwen2", tmp_path / "from", **SHAPE)
    engine = EngineConfig(
        model=str(tmp_path / "from"),
        dtype="float32",
        device="cpu",
        quantization=method,
        keep_layers=("layers.0.*",),
        calibration=short_text(tmp_path) if method == "fp8" else None,
    )
    script("quantize_weights").save(engine, tmp_path / "to")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "to", dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([IDS])).logits[0]
    assert error(logits(load(tmp_path / "to", torch.float32)), expected) < tolerance


@pytest.mark.parametrize("method", ["w4a16", "awq"])
def test_gptqmodel_multiplies_by_what_was_saved(method: Any, tmp_path: Path) -> None:
    """With its own layers in torch, which transformers puts in place of a checkpoint's; they compute in float16."""
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    make_checkpoint("qwen2", tmp_path / "from", **SHAPE)
    calibration = short_text(tmp_path) if method == "awq" else None
    engine = EngineConfig(
        model=str(tmp_path / "from"), dtype="float32", device="cpu", quantization=method, calibration=calibration
    )
    script("quantize_weights").save(engine, tmp_path / "to")
    ours = load(tmp_path / "to", torch.float32).linears(1)["layers.1.mlp.down_proj"]
    shape = {"in_features": 256, "out_features": 128, "bias": False, "register_buffers": True}
    form = {"bits": 4, "group_size": 128, "sym": False, "desc_act": False, "pack_dtype": torch.int32}
    theirs = (AwqTorchLinear if method == "awq" else TorchLinear)(**shape, **form)
    name = "model.layers.1.mlp.down_proj."
    for key, tensor in load_file(tmp_path / "to" / "model.safetensors").items():
        if key.startswith(name):
            setattr(theirs, key.removeprefix(name), tensor)
    if method == "w4a16":
        convert_gptq_v1_to_v2_format_module(theirs, 4, torch.int32)
    theirs.post_init()
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    assert error(theirs(x).float(), x @ ours.dense(torch.float32).t()) < 1e-3


def short_text(folder: Path) -> str:
    """A text for `--calibration`, and beside it the tokenizer that `folder / "from"` lacks."""
    add_tokenizer(folder / "from")
    (folder / "text.txt").write_text((resolve_model("tiny") / "sample.txt").read_text()[:3000])
    return str(folder / "text.txt")


def add_tokenizer(folder: Path) -> None:
    """One of fewer tokens than the small checkpoints have."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {chr(32 + i): i for i in range(95)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


# --- shared out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gptq", "gptq, act-order", "gptq, a row", "awq 128", "int4, zeros", "int8", "fp8"])
def test_ranks_hold_pieces_of_the_whole(name: str, tmp_path: Path) -> None:
    make_checkpoint("qwen2", tmp_path, **SHAPE | {"num_key_value_heads": 4})
    quantize(tmp_path, RECIPES[name])
    shards_of(tmp_path, None)


@pytest.mark.parametrize("method", ["w8a8", "w4a16"])
def test_ranks_round_their_pieces(method: Any, tmp_path: Path) -> None:
    """In 4 bits to the same numbers; 8 bits have a scale for the columns of a rank, which is finer."""
    make_checkpoint("qwen2", tmp_path, **SHAPE | {"num_key_value_heads": 4})
    shards_of(tmp_path, Quantization(method), atol=0 if method == "w4a16" else 0.02)


def shards_of(folder: Path, quantization: Quantization | None, atol: float = 0) -> None:
    """Compare the layers of four ranks with those of one."""
    whole = load(folder, quantization=quantization)
    ranks = [load(folder, quantization=quantization, parallel=Parallel(tp=Group(rank, 4))) for rank in range(4)]
    for path, linear in whole.linears(1).items():
        of_ranks: list[Any] = [rank.linears(1)[path] for rank in ranks]
        pieces = [one.dense(torch.float64) for one in of_ranks]
        if path.endswith(("o_proj", "down_proj")):
            put_together = torch.cat(pieces, 0 if of_ranks[0].by_outputs else 1)
        else:
            splits = [
                piece.split([part.size for part in one.parts.values()])
                for one, piece in zip(of_ranks, pieces, strict=True)
            ]
            put_together = torch.cat([torch.cat(part) for part in zip(*splits, strict=True)])
        torch.testing.assert_close(put_together, linear.dense(torch.float64), rtol=0, atol=atol)


def test_two_ranks_answer_as_one_does(tmp_path: Path) -> None:
    """Columns of the output projections are in an order of their own, so that ranks share their outputs."""
    make_checkpoint("qwen2", tmp_path, **SHAPE)
    quantize(tmp_path, gptq(32, act_order=True))
    said = []
    for tp in (1, 2):
        config = EngineConfig(
            model=str(tmp_path),
            dtype="float64",
            device="cpu",
            kv_cache_memory=1 << 22,
            max_num_seqs=2,
            tp=tp,
            kv=KVOptions(nbits="4"),
        )
        engine = Engine(config)
        try:
            params = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
            said.append([answer.token_ids for answer in engine.generate([IDS, IDS[:5]], params)])
            assert engine.info.quantization == "gptq"
        finally:
            engine.close()
    assert said[0] == said[1]
