"""The search for a plan: its stages against their definitions, and whole on the embedded model."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import pytest
from conftest import error_line
from hypothesis import given
from hypothesis import strategies as st

from kvtool.config import EngineConfig, KVOptions
from kvtool.engine import Engine
from kvtool.errors import ConfigError
from kvtool.kv.format import resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.plan import Sidecar, sidecar_of, write_plan
from kvtool.kv.spec import KVSpec, StreamSpec
from kvtool.quantize.report import Exam, Progress
from kvtool.quantize.search import ALIKE, PAIRS, Budget, SearchResult, cluster, find_plan, prune
from kvtool.request import SamplingParams

SPEC = KVSpec(4, StreamSpec(2, 64), StreamSpec(2, 64), 2)  # the embedded model's
EXAM, LITTLE = Exam(window=256, max_tokens=1024), Exam(window=128, max_tokens=256)
SIXTEEN_BITS = KVOptions()
errors = st.lists(st.floats(0, 1), min_size=len(PAIRS), max_size=len(PAIRS))


@contextmanager
def silent(what: str) -> Iterator[Callable[[float, float], None]]:
    yield lambda done, total: None


def found(
    path: Path,
    budget: Budget,
    kv: KVOptions = SIXTEEN_BITS,
    exam: Exam = LITTLE,
    num_trials: int = 3,
    progress: Progress = silent,
) -> SearchResult:
    return find_plan(EngineConfig(kv=kv), exam, budget, path, num_trials=num_trials, progress=progress)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans") / "plan.yaml"


@pytest.fixture(scope="module")
def result(path: Path) -> SearchResult:
    return found(path, Budget(bits=4.0), exam=EXAM, num_trials=30)


@given(errors)
def test_pruning_leaves_what_nothing_beats(errors):
    def cost(pair):
        return int(pair[0]) + int(pair[1]), errors[PAIRS.index(pair)]

    kept = prune(errors)
    for pair in PAIRS:
        beaten = any(
            all(a <= b for a, b in zip(cost(other), cost(pair), strict=True)) for other in kept if other != pair
        )
        assert beaten != (pair in kept)
    assert [cost(pair)[0] for pair in kept] == sorted({cost(pair)[0] for pair in kept})


@given(st.lists(errors, min_size=1, max_size=8))
def test_every_layer_is_in_one_group_with_its_front(sensitivity):
    groups = cluster(sensitivity)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(sensitivity)))
    assert all(prune(sensitivity[layer]) == group.pairs for group in groups for layer in group.layers)


def test_layers_go_together_if_their_errors_are_alike():
    row = [0.5, 0.3, 0.2, 0.25, 0.1, 0.05, 0.15, 0.04, 0.01]
    close, far = ([error * factor for error in row] for factor in (1 + ALIKE / 2, 1 + 2 * ALIKE))
    assert [group.layers for group in cluster([row, far, close])] == [(0, 2), (1,)]


def test_a_plan_is_within_its_budget_and_better_than_uniform_formats(result, path):
    layout = KVLayout(SPEC, resolve(KVOptions(plan=str(path)), SPEC))
    assert layout.bits_per_element == result.found.bits_per_element <= 4.0
    assert result.found.kld_mean < result.expected_kld(layout.bits_per_element) / 2
    assert layout.format == resolve(result.plan.kv, SPEC)
    assert [score.format.name for score in result.uniform] == [f"K{key}V{value}" for key, value in PAIRS]
    beaten = [
        a for a, b in product(result.front, repeat=2) if a.bits_per_element > b.bits_per_element and a.kld >= b.kld
    ]
    assert result.plan in result.front and not beaten


def test_the_sidecar_tells_where_a_plan_comes_from(result, path):
    sidecar = json.loads(sidecar_of(path).read_text())
    assert sidecar["schema"] == "kvtool.plan/1"
    assert sidecar["provenance"]["model"] == "tiny" and len(sidecar["provenance"]["fingerprint"]) == 64
    assert sidecar["figures"]["plan"]["kld_mean"] == result.found.kld_mean
    assert not Path(f"{path}.part").exists()


def test_an_engine_runs_the_plan(result, path):
    engine = Engine(EngineConfig(kv=KVOptions(plan=str(path)), kv_cache_memory=1 << 24, max_num_seqs=1))
    (completion,) = engine.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=4))
    assert len(completion.token_ids) == 4
    assert engine.info.kv_format == result.found.format.description


def test_a_memory_budget_holds_the_tokens_and_all_tails(tmp_path):
    budget = Budget(memory=120_000_000, num_tokens=200_000, num_seqs=64)
    result = found(tmp_path / "plan.yaml", budget, KVOptions(residual_length=0))
    layout = KVLayout(SPEC, resolve(KVOptions(plan=str(tmp_path / "plan.yaml")), SPEC))
    assert layout.num_blocks_within(120_000_000, 64) * layout.format.block_size >= 200_000
    assert layout.format.residual == 0 and result.plan.kv.residual_length == 0


def test_a_search_that_was_stopped_goes_on(result, path, tmp_path):
    @contextmanager
    def stopping(what: str) -> Iterator[Callable[[float, float], None]]:
        def on_progress(done: float, total: float) -> None:
            if done == 5:
                raise KeyboardInterrupt

        yield on_progress

    again = tmp_path / "plan.yaml"
    with pytest.raises(KeyboardInterrupt):
        found(again, Budget(bits=4.0), num_trials=30, progress=stopping)
    part = Path(f"{again}.part")
    tried = part.read_text().splitlines()[1:]
    assert len(tried) >= 3 and not again.exists()
    wrong = [json.dumps({**json.loads(line), "row": 0.0}) for line in tried[:1]]
    part.write_text("\n".join([part.read_text().splitlines()[0], *wrong, *tried[1:]]) + "\n")
    resumed = found(again, Budget(bits=4.0))
    assert resumed.plan.kld == 0.0, "what the file says was not run again"


def test_windows_are_no_longer_than_asked_for(tmp_path):
    config, path = EngineConfig(max_model_len=160), tmp_path / "plan.yaml"
    find_plan(config, Exam(max_tokens=320), Budget(bits=4.0), path, num_trials=1, progress=silent)
    assert json.loads(sidecar_of(path).read_text())["provenance"]["window"] == 160


@pytest.mark.parametrize(
    ("budget", "kv", "said"),
    [
        (Budget(bits=2.4), KVOptions(), "--budget-bits 2.4: the smallest plan takes 2.5 bits"),
        (Budget(memory=10**6, num_tokens=10**6, num_seqs=1), KVOptions(), "--budget-memory 1000000: the smallest"),
        (Budget(bits=4.0), KVOptions(nbits="4"), "leave out --nbits"),
        (Budget(bits=4.0), KVOptions(q_group_size=48), "--q-group-size 48"),
    ],
)
def test_impossible_searches_are_refused(tmp_path, budget, kv, said):
    with pytest.raises(ConfigError, match=said):
        found(tmp_path / "plan.yaml", budget, kv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", ["[]", '"low"'])
def test_what_an_earlier_search_left_is_read_with_care(result, tmp_path, row):
    again = tmp_path / "plan.yaml"
    part = Path(f"{again}.part")
    part.write_text(f'{{"identity": {{}}}}\n{{"key": "0 K2V2", "row": {row}}}\n')
    with pytest.raises(ConfigError, match="no list of results of ours; move it or choose another --save-plan"):
        found(again, Budget(bits=4.0))


@pytest.mark.parametrize("name", [".", "none/plan.yaml"])
def test_a_plan_needs_a_place_before_the_search_begins(tmp_path, name):
    with pytest.raises(ConfigError, match=r"--save-plan .*: is a folder, or lies in none"):
        found(tmp_path / name, Budget(bits=4.0))


def test_a_text_for_less_than_two_windows_is_refused(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("It was a dark night. " * 20)
    with pytest.raises(ConfigError, match="one half is searched on"):
        found(tmp_path / "plan.yaml", Budget(bits=4.0), exam=Exam(data=str(short), window=100))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--search"], "--search needs a budget"),
        (["--search", "--budget-bits", "4", "--budget-memory", "1GiB", "--tokens", "9"], "--search needs a budget"),
        (["--search", "--budget-bits", "nan"], "--budget-bits"),
        (["--search", "--budget-memory", "6GiB"], "go together"),
        (["--search", "--budget-bits", "4", "--tokens", "9"], "go together"),
        (["--search", "--budget-bits", "4", "--ablate", "bits"], "--ablate"),
        (["--budget-bits", "4"], "--search"),
        (["--budget-bits", "0"], "--search"),
        (["--trials", "9"], "--trials is for --search"),
        (["--save-plan", "plan.yaml"], "--save-plan is for --search"),
        (["--search", "--budget-bits", "4", "--prompt", "Hi"], "--prompt"),
        (["--search", "--budget-bits", "4", "--questions", "3"], "--questions"),
    ],
)
def test_bad_options_are_one_line(command, arguments, said):
    assert said in error_line(command("quantize-kv", *arguments))


# Sidecars.


def test_a_sidecar_completes_what_is_not_given(tmp_path):
    path = tmp_path / "plan.yaml"
    write_plan(path, [("4", "2")] * 4, Sidecar(KVOptions("8", axis_key="token", residual_length=32), {}, {}))
    assert resolve(KVOptions(plan=str(path)), SPEC) == resolve(
        KVOptions(nbits_key="4", nbits_value="2", axis_key="token", residual_length=32), SPEC
    )
    given = resolve(KVOptions(plan=str(path), axis_key="channel", residual_length=0), SPEC)
    assert given == resolve(KVOptions(nbits_key="4", nbits_value="2"), SPEC)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"format": {"axis_key": "row"}}', '{"schema": "other", "format": {}}', "[" * 10_000]
)
def test_a_damaged_sidecar_is_one_line(tmp_path, content):
    path = tmp_path / "plan.yaml"
    write_plan(path, [("4", "4")] * 4, Sidecar(KVOptions(), {}, {}))
    sidecar_of(path).write_text(content)
    with pytest.raises(ConfigError, match=r"plan .*: plan.kvtool.json is no sidecar of a plan [^\n]*; remove it\Z"):
        resolve(KVOptions(plan=str(path)), SPEC)


def test_a_plan_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory; choose another file for the plan"):
        write_plan(tmp_path / "none" / "plan.yaml", [("4", "4")], Sidecar(KVOptions(), {}, {}))
