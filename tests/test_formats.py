"""KV formats: what the options and plans resolve to, and the laws that all of them keep."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtool.config import KVOptions
from kvtool.errors import ConfigError, KVToolError, UnsupportedError
from kvtool.kv.format import StreamFormat, resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.kv.visibility import visible

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
PRESETS = Path(__file__).parents[2] / "shared" / "data" / "kvtuner-presets"


def spec(layers: int = 1, dim: int = 64, heads: int = 2) -> KVSpec:
    return KVSpec(layers, StreamSpec(heads, dim), StreamSpec(heads, dim), 2)


# What the options resolve to.


@pytest.mark.parametrize(
    "bits, honest, block_size, residual", [("8", 8.5, 64, 0), ("4", 4.5, 64, 0), ("2", 2.75, 32, 32)]
)
def test_recipes_by_default(bits, honest, block_size, residual):
    model = spec(dim=128)
    fmt = resolve(KVOptions(nbits=bits), model)
    assert fmt.layers[0].key == StreamFormat(bits, "channel", block_size, symmetric=False)
    assert fmt.layers[0].value == StreamFormat(bits, "token", 64, symmetric=False)
    assert (fmt.block_size, fmt.residual, fmt.tail_tokens, fmt.packs_on_write) == (block_size, residual, 64, False)
    assert KVLayout(model, fmt).bits_per_element == honest


@pytest.mark.parametrize(
    "options, block_size, residual",
    [
        (KVOptions(nbits="2", residual_length=0), 64, 0),
        (KVOptions(nbits="2", q_group_size=64), 64, 0),
        (KVOptions(nbits="2", residual_length=64), 64, 64),
        (KVOptions(nbits="2", axis_key="token"), 64, 0),
        (KVOptions(nbits_key="4", nbits_value="2"), 64, 0),
        (KVOptions(nbits_key="2", nbits_value="2"), 32, 32),
        (KVOptions(nbits="4", residual_length=32), 32, 32),
        (KVOptions(nbits="4", residual_length=33), 64, 64),
    ],
)
def test_small_blocks_go_with_a_small_window(options, block_size, residual):
    fmt = resolve(options, spec())
    assert (fmt.block_size, fmt.residual) == (block_size, residual)


def test_bits_found_for_each_layer_go_before_all_others():
    options = KVOptions(nbits="4", layer_bits=(("4", "4"), ("8", "16")))
    assert [(layer.key.bits, layer.value.bits) for layer in resolve(options, spec(2)).layers] == [
        ("4", "4"),
        ("8", "16"),
    ]
    with pytest.raises(ConfigError, match="2 layers do not fit a model of 3"):
        resolve(options, spec(3))


def test_sixteen_bits_by_default():
    fmt = resolve(KVOptions(), spec(3))
    assert fmt == resolve(KVOptions(nbits="16"), spec(3))
    assert {layer.key for layer in fmt.layers} | {layer.value for layer in fmt.layers} == {StreamFormat()}
    assert fmt.packs_on_write and fmt.tail_tokens == 0
    assert KVLayout(spec(3), fmt).bits_per_element == 16


def test_keys_and_values_apart():
    fmt = resolve(KVOptions(nbits="4", nbits_key="8", axis_key="token", symmetric=True, q_group_size=32), spec(2))
    assert fmt.layers[1].key == StreamFormat("8", "token", 32, symmetric=True)
    assert fmt.layers[1].value == StreamFormat("4", "token", 32, symmetric=True)
    assert fmt.packs_on_write
    only_values = resolve(KVOptions(nbits_value="2"), spec())
    assert only_values.layers[0].key == StreamFormat() and only_values.layers[0].value.bits == "2"
    assert only_values.packs_on_write


def test_rotation_is_of_the_packed_streams_alone():
    both = resolve(KVOptions(nbits="4", axis_key="token", rotate=True), spec()).layers[0]
    assert both.key.rotate and both.value.rotate
    values = resolve(KVOptions(nbits_key="16", nbits_value="4", rotate=True), spec()).layers[0]
    assert values.value.rotate and not values.key.rotate


@pytest.mark.parametrize("dim, size, group", [(80, 64, 40), (80, 128, 80), (96, 64, 48), (96, 128, 96), (256, 64, 64)])
def test_groups_are_cut_to_the_largest_divisor_of_head_dim(dim, size, group):
    fmt = resolve(KVOptions(nbits="4", q_group_size=size), spec(dim=dim))
    assert fmt.layers[0].value.group == group
    assert f"groups of {group}" in fmt.describe()
    assert fmt.layers[0].key.group == fmt.block_size == size, "on the channel axis the group is the block"


@pytest.mark.parametrize(
    "asked, size, residual", [(None, 64, 0), (0, 32, 0), (1, 64, 64), (40, 32, 64), (512, 128, 512)]
)
def test_residual_is_rounded_up_to_blocks(asked, size, residual):
    fmt = resolve(KVOptions(nbits="4", residual_length=asked, q_group_size=size), spec())
    assert (fmt.residual, fmt.block_size, fmt.tail_tokens) == (residual, size, residual + size)


@pytest.mark.parametrize(
    "named, options",
    [
        ("--q-group-size", KVOptions(nbits="4", q_group_size=48)),
        ("--q-group-size", KVOptions(nbits="4", q_group_size=0)),
        ("--q-group-size", KVOptions(q_group_size=32)),
        ("--q-group-size", KVOptions(nbits="fp8", q_group_size=32)),
        ("--residual-length", KVOptions(nbits="4", residual_length=-1)),
        ("--residual-length", KVOptions(residual_length=64)),
        ("--axis-key", KVOptions(axis_key="token")),
        ("--axis-value", KVOptions(axis_value="channel")),
        ("--axis-key", KVOptions(nbits="fp8", axis_key="channel")),
        ("--axis-value", KVOptions(nbits="4", nbits_value="fp8", axis_value="channel")),
        ("--sym", KVOptions(symmetric=True)),
        ("--asym", KVOptions(symmetric=False)),
        ("--sym", KVOptions(nbits="fp8", symmetric=True)),
        ("--asym", KVOptions(nbits="fp8", symmetric=False)),
        ("--rotate", KVOptions(rotate=True)),
        ("--rotate", KVOptions(nbits="fp8", rotate=True)),
        ("--rotate", KVOptions(nbits="4", rotate=True)),
        ("--axis-key token", KVOptions(nbits="4", rotate=True, axis_key="channel")),
        ("--axis-value token", KVOptions(nbits="4", rotate=True, axis_key="token", axis_value="channel")),
        ("--kv-plan", KVOptions(plan="missing.yaml", nbits="4")),
        ("--nbits-key", KVOptions(plan="missing.yaml", nbits_key="4")),
        ("--nbits-value", KVOptions(plan="missing.yaml", nbits_value="4")),
    ],
)
def test_contradictions_are_refused_by_name(named, options):
    with pytest.raises(ConfigError) as refusal:
        resolve(options, spec())
    assert re.search(rf"{named}\b", str(refusal.value))
    assert "\n" not in str(refusal.value)


def test_a_head_dim_that_does_not_fill_bytes_is_refused():
    with pytest.raises(UnsupportedError, match="head_dim 34"):
        resolve(KVOptions(nbits="2"), spec(dim=34))
    resolve(KVOptions(nbits="4"), spec(dim=34))


LATENT = KVSpec(2, StreamSpec(1, 64), StreamSpec(1, 512), 2, latent=True)


@pytest.mark.parametrize(("nbits", "rope_key"), [("16", "16"), ("8", "8"), ("4", "8"), ("2", "8"), ("fp8", "fp8")])
def test_a_rope_key_keeps_eight_bits_unless_asked_otherwise(nbits, rope_key):
    layer = resolve(KVOptions(nbits=nbits), LATENT).layers[0]
    assert (layer.key.bits, layer.value.bits) == (rope_key, nbits)
    layer = resolve(KVOptions(nbits=nbits, nbits_key="4"), LATENT).layers[0]
    assert (layer.key.bits, layer.value.bits) == ("4", nbits)
    assert resolve(KVOptions(nbits="2"), LATENT).residual == resolve(KVOptions(nbits="2"), spec()).residual > 0


@pytest.mark.parametrize(("nbits", "nbytes"), [("16", 1152), ("8", 544 + 68), ("4", 288 + 68)])
def test_a_latent_costs_a_ninth_of_what_sixteen_heads_would(nbits, nbytes):
    """512 + 64 elements; of 8 bits codes, 8 scales and zeros of a latent's groups, 2 of a rope key's block."""
    layout = KVLayout(LATENT, resolve(KVOptions(nbits=nbits), LATENT))
    assert layout.block_bytes / layout.format.block_size / LATENT.num_layers == nbytes


# Plans.


def plan_file(folder: Path, text: str | bytes) -> str:
    path = folder / "plan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


KVTUNER_STYLE = "".join(
    f"{layer}:\n  nbits_key: {key}\n  nbits_value: {value}\n"
    for layer, (key, value) in enumerate([(8, 8), (4, 2), (8, 4), (2, 2), ("fp8", 16)])
)


def test_a_plan_sets_the_bits_of_each_layer(tmp_path):
    path = plan_file(tmp_path, KVTUNER_STYLE)
    fmt = resolve(KVOptions(plan=path), spec(5))
    pairs = [("8", "8"), ("4", "2"), ("8", "4"), ("2", "2"), ("fp8", "16")]
    assert [(layer.key.bits, layer.value.bits) for layer in fmt.layers] == pairs
    assert {layer.key.axis for layer in fmt.layers[:4]} == {"channel"}
    assert "1×K8V8 1×K4V2 1×K8V4 1×K2V2 1×Kfp8V16" in fmt.describe()
    token = resolve(KVOptions(plan=path, axis_key="token", residual_length=32, symmetric=True), spec(5))
    assert {layer.key.axis for layer in token.layers} == {"token"} and token.residual == 64
    assert KVLayout(spec(5), fmt).block_bytes == sum(
        KVLayout(spec(5), fmt).layer_block_bytes(layer) for layer in range(5)
    )


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")) or [None], ids=lambda p: p.stem if p else "none")
def test_kvtuners_own_presets_load(path):
    if path is None:
        pytest.skip("KVTuner's presets are not on this machine")
    depth = path.read_text().count("nbits_key")
    for axis in ("token", "channel"):
        fmt = resolve(KVOptions(plan=str(path), axis_key=axis), spec(depth, dim=128))
        assert len(fmt.layers) == depth in (28, 32)
        assert 2 < KVLayout(spec(depth, dim=128), fmt).bits_per_element < 8.6
    with pytest.raises(ConfigError, match=f"0 to {depth}; found {depth} entries"):
        resolve(KVOptions(plan=str(path)), spec(depth + 1))


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("0: {nbits_key: 4, nbits_value: 4}", "0 to 1; found 1 entries"),
        ("0: {nbits_key: 4, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 4}\n2: {}", "0 to 1; found 3 entries"),
        ("{}", "found 0 entries"),
        ("", "found no mapping"),
        ("- 4\n- 4", "found no mapping"),
        ("0: {nbits_key: 4, nbits_value: 4}\n2: {nbits_key: 4, nbits_value: 4}", "0 to 1"),
        ("0: {nbits_key: 4, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 3}", "layer 1: nbits_value is '3'"),
        ("0: {nbits_key: 4, nbits_value: 4}\n1: {nbits_key: 4}", "layer 1: nbits_value is 'missing'"),
        ('0: {nbits_key: "4\\n", nbits_value: 4}\n1: {nbits_key: 4}', "layer 0: nbits_key is '4\\n'"),
        ("0: {nbits_key: 4, nbits_value: 4}\n1: 4", "layer 1: nbits_key"),
        ("0: {nbits_key: 4.0, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 4}", "layer 0: nbits_key is '4.0'"),
        ("0: {nbits_key: null, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 4}", "layer 0: nbits_key"),
        ("0: {nbits_key: [4], nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 4}", "layer 0: nbits_key"),
        ("0: {nbits_key: 4", "is not YAML"),
        ("0: !!python/object/apply:os.system ['true']\n1: 2", "is not YAML"),
        ("!!python/object:collections.OrderedDict {}", "is not YAML"),
        (f"0: {{nbits_key: 0x{'f' * 5000}}}\n1: 2", "layer 0: nbits_key"),
        ("#" * ((1 << 20) + 1), "is larger than"),
        ("0: 2020-99-99\n1: 2", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        ("? [0]\n: 4", "is not YAML"),
        (b"\xff\xfe\x00\x01binary", "is not YAML"),
        ("0: \x00", "is not YAML"),
    ],
)
def test_unusable_plans_are_refused_in_one_line(tmp_path, text, complaint):
    path = plan_file(tmp_path, text)
    with pytest.raises(ConfigError) as refusal:
        resolve(KVOptions(plan=path), spec(2))
    message = str(refusal.value)
    assert message.startswith(f"plan {path}: ") and complaint in message
    assert "\n" not in message


def test_a_plan_that_expands_without_end_is_refused_in_one_short_line(tmp_path):
    """Seven levels of tenfold aliases: no message may spell them out."""
    names = "abcdefg"
    bomb = [f"&a [{', '.join('x' * 10)}]"]
    bomb += [f"&{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in pairwise(names)]
    for value in (f"{{nbits_key: [{', '.join(bomb)}], nbits_value: 4}}", f"[{', '.join(bomb)}]"):
        path = plan_file(tmp_path, f"0: {value}\n1: {{nbits_key: 4, nbits_value: 4}}\n")
        with pytest.raises(ConfigError, match="layer 0: nbits_key") as refusal:
            resolve(KVOptions(plan=path), spec(2))
        assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("name, complaint", [("missing.yaml", "No such file"), (".", "Is a directory")])
def test_plans_that_cannot_be_read(tmp_path, name, complaint):
    with pytest.raises(ConfigError, match=complaint):
        resolve(KVOptions(plan=str(tmp_path / name)), spec())


def test_a_plan_below_a_file_cannot_be_read(tmp_path):
    path = plan_file(tmp_path, KVTUNER_STYLE)
    with pytest.raises(ConfigError, match=r"plan .*plan\.yaml/x: Not a directory"):
        resolve(KVOptions(plan=f"{path}/x"), spec())


# Laws.


@st.composite
def options(draw) -> KVOptions:
    bits = st.sampled_from([None, "16", "8", "4", "2", "fp8"])
    axis = st.sampled_from([None, "token", "channel"])
    return KVOptions(
        nbits=draw(bits),
        nbits_key=draw(bits),
        nbits_value=draw(bits),
        axis_key=draw(axis),
        axis_value=draw(axis),
        symmetric=draw(st.sampled_from([None, True, False])),
        q_group_size=draw(st.sampled_from([None, 32, 64, 128])),
        residual_length=draw(st.sampled_from([None, 0, 1, 32, 128, 512])),
        rotate=draw(st.sampled_from([None, True, False])),
    )


@settings(deadline=None, max_examples=400)
@given(options(), st.sampled_from(HEAD_DIMS), st.lists(st.integers(0, 3000), min_size=1, max_size=30))
def test_every_format_keeps_the_laws(asked, dim, positions):
    """Each set of options is refused by name or gives a format that says itself in one line and keeps the laws."""
    try:
        fmt = resolve(asked, spec(2, dim))
    except KVToolError as refusal:
        assert str(refusal).startswith("--")
        return
    line = fmt.describe()
    assert line and "\n" not in line
    assert fmt.residual % fmt.block_size == 0 and fmt.residual >= (asked.residual_length or 0)
    for stream in (fmt.layers[0].key, fmt.layers[0].value):
        assert stream.bits == "16" or dim % stream.group == 0 or stream.axis == "channel"
        assert stream.axis == "token" or stream.group == fmt.block_size
        assert not (stream.rotate and stream.axis == "channel")
    for t in positions:
        first, after = fmt.visible(t), fmt.visible(t + 1)
        assert first <= after, "what is packed stays packed"
        assert fmt.packed_tokens(t) <= t, "no token is packed before it is computed"
        assert first <= (t + 1 if fmt.packs_on_write else fmt.packed_tokens(t)), "what a query reads has been packed"
        assert t + 1 - fmt.packed_tokens(t) <= max(fmt.tail_tokens, fmt.packs_on_write), "the tail holds the rest"
        assert (fmt.num_blocks(t) - 1) * fmt.block_size < fmt.packed_tokens(t) <= fmt.num_blocks(t) * fmt.block_size
        if not fmt.packs_on_write:
            assert after - first in (0, fmt.block_size), "a step seals one block or none"
            assert first == visible(t, fmt.block_size, fmt.residual) == fmt.packed_tokens(t)
            assert fmt.num_blocks(t) * fmt.block_size == first


@given(st.integers(0, 10**6), st.sampled_from([32, 64, 128, 256]), st.integers(0, 16))
def test_tail_never_exceeds_its_slot(position, block_size, residual_blocks):
    residual = residual_blocks * block_size
    first = visible(position, block_size, residual)
    assert first % block_size == 0
    assert residual <= position - first <= residual + block_size - 1 or first == 0
    assert position - first + 1 <= residual + block_size
