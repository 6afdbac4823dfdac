"""Which bits for which layer: KVTuner's search (arXiv:2502.04420), from sensitivities to a plan and its check."""

import math
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import optuna
import torch

from kvtool.config import Bits, EngineConfig, KVOptions
from kvtool.errors import ConfigError
from kvtool.kv.format import SMALL_BLOCK_SIZE, resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.plan import Sidecar, write_plan
from kvtool.kv.spec import KVSpec
from kvtool.models.kv import kv_spec
from kvtool.models.resolve import fingerprint
from kvtool.perplexity import FormatScore, score_formats
from kvtool.protocols import SAMPLE, Task, make_task, read_documents
from kvtool.quantize.journal import Journal
from kvtool.quantize.layer_errors import calibrate, propagated_errors
from kvtool.quantize.report import Exam, OnProgress, Progress
from kvtool.scoring import SIXTEEN_BITS, ScoringModel, Window
from kvtool.tokenizer import Tokenizer

Pair = tuple[Bits, Bits]
CHOICES: tuple[Bits, ...] = ("2", "4", "8")
PAIRS: tuple[Pair, ...] = tuple((key, value) for key, value in product(CHOICES, CHOICES))
ALIKE = 0.1  # layers whose errors differ by less, on average over the pairs, as a logarithm
POPULATION = 20


@dataclass(frozen=True)
class Budget:
    """What a cache may cost, in one of two ways.

    Attributes:
        bits: honest bits per element.
        memory: bytes that must hold `num_tokens` beside the tails of `num_seqs` sequences.
    """

    bits: float | None = None
    memory: int | None = None
    num_tokens: int = 0
    num_seqs: int = 0

    @property
    def limit(self) -> float:
        return float(self.bits or self.memory or 0)

    def cost(self, layout: KVLayout) -> float:
        """Of a cache of this layout, in the budget's unit."""
        if self.bits is not None:
            return layout.bits_per_element
        blocks = -(-self.num_tokens // layout.format.block_size)
        return blocks * layout.block_bytes + self.num_seqs * layout.tail_bytes

    def refusal(self, least: float) -> ConfigError:
        """That not even a plan of cost `least` fits."""
        if self.bits is not None:
            return ConfigError(f"--budget-bits {self.bits:g}: the smallest plan takes {least:g} bits an element")
        return ConfigError(
            f"--budget-memory {self.memory}: the smallest plan takes {least:.0f} bytes for --tokens "
            f"{self.num_tokens:,} and the tails of --max-num-seqs {self.num_seqs}"
        )


@dataclass(frozen=True)
class Group:
    """Layers that are given the same bits.

    Attributes:
        pairs: their choice, those on the front of bits against error, the fewest bits first.
    """

    layers: tuple[int, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Plan:
    """Bits for each layer, and what they do on calibration text.

    Attributes:
        kv: options with `layer_bits`.
        bits_per_element: honest ones.
        kld: mean Kullback-Leibler divergence from 16 bits, in nats.
    """

    kv: KVOptions
    bits_per_element: float
    kld: float


@dataclass(frozen=True)
class SearchResult:
    """What a search has found.

    Attributes:
        sensitivity: of each layer, the error of its attention's output under each of `PAIRS`, with all layers before it
            in the same bits.
        groups: layers that were searched together.
        plan: the least divergence within the budget.
        front: the plans that nothing tried beats in bits and divergence both, from the fewest bits.
        num_tried: different plans that were run.
        uniform: each of `PAIRS` in all layers, on held-out text.
        found: the plan, on the same.
    """

    sensitivity: tuple[tuple[float, ...], ...]
    groups: tuple[Group, ...]
    plan: Plan
    front: tuple[Plan, ...]
    num_tried: int
    uniform: tuple[FormatScore, ...]
    found: FormatScore

    def expected_kld(self, bits: float) -> float:
        """What the uniform formats come to at these honest bits: their logarithms' line over bits, by least squares."""
        x = torch.tensor([[1.0, score.bits_per_element] for score in self.uniform], dtype=torch.float64)
        y = torch.tensor([[score.kld_mean] for score in self.uniform], dtype=torch.float64).log()
        intercept, slope = torch.linalg.lstsq(x, y).solution[:, 0].tolist()
        return math.exp(intercept + slope * bits)


def search(
    model: ScoringModel,
    calibration: Task,
    held_out: Task,
    base: KVOptions,
    budget: Budget,
    journal: Journal,
    *,
    num_trials: int,
    on_progress: OnProgress = lambda done, total: None,
) -> SearchResult:
    """The plan of least divergence within `budget`, which `check_budget` has passed.

    Each layer's sensitivity to nine pairs of bits leaves it the pairs on its front; layers with like fronts are given
    the same; NSGA-II (Deb et al. 2002) looks for plans that are good in bits and divergence from 16 bits both.

    Args:
        calibration, held_out: the text that the plan is found on, and another that it is checked on.
        base: options that all plans share, without bits. Where they leave the window open, one of 32 tokens with blocks
            of 32 is tried beside none; the tail is the same.
        journal: what each plan does, so that a search that was stopped goes on.
        num_trials: of NSGA-II.
        on_progress: told of trials.

    Raises:
        UnsupportedError: activations that are not finite or do not fit a format.
    """
    spec = kv_spec(model.model_config, torch.bfloat16)
    sensitivity = sensitivities(model, calibration, base, spec)
    groups = cluster(sensitivity)
    trials = _Trials(model, calibration.windows, spec, base, budget, groups, journal)
    trials.run(sensitivity, num_trials, on_progress)
    plan = min(trials.plans, key=lambda plan: plan.kld)
    uniform = {f"K{key}V{value}": replace(base, nbits_key=key, nbits_value=value) for key, value in PAIRS}
    *scores, found = score_formats(model, held_out, {**uniform, "plan": plan.kv})
    return SearchResult(
        sensitivity=tuple(map(tuple, sensitivity)),
        groups=tuple(groups),
        plan=plan,
        front=tuple(_front(trials.plans)),
        num_tried=len(trials.plans),
        uniform=tuple(scores),
        found=found,
    )


def check_budget(model: ScoringModel, base: KVOptions, budget: Budget) -> None:
    """Refuse what not even the smallest plan fits in.

    Raises:
        ConfigError: that, or options that do not fit the model.
    """
    spec = kv_spec(model.model_config, torch.bfloat16)
    smallest = _plan_options(base, _windows(base, spec)[0], [("2", "2")] * spec.num_layers)
    least = budget.cost(KVLayout(spec, resolve(smallest, spec)))
    if least > budget.limit:
        raise budget.refusal(least)


def find_plan(
    config: EngineConfig, exam: Exam, budget: Budget, path: Path, *, num_trials: int, progress: Progress
) -> SearchResult:
    """Search on a model's folder and write the plan, in KVTuner's YAML and a sidecar, to `path`.

    The text's first half of windows is searched on, the rest checks what was found. What is tried stands in
    `<path>.part` until the plan is written, and a search that was stopped goes on from there.

    Raises:
        ConfigError: options that do not fit the model, a budget below the smallest plan, a text too short for two
            windows, or a path that cannot be written.
    """
    if {config.kv.nbits, config.kv.nbits_key, config.kv.nbits_value, config.kv.plan} != {None}:
        raise ConfigError("--search finds the bits; leave out --nbits and --kv-plan")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"--save-plan {path}: is a folder, or lies in none; name a file")
    with closing(ScoringModel(config)) as model:
        return _find_plan(model, config, exam, budget, path, num_trials, progress)


def _find_plan(
    model: ScoringModel,
    config: EngineConfig,
    exam: Exam,
    budget: Budget,
    path: Path,
    num_trials: int,
    progress: Progress,
) -> SearchResult:
    check_budget(model, config.kv, budget)
    tokenizer = Tokenizer.load(model.path, model.model_config.vocab_size)
    documents = read_documents(Path(exam.data) if exam.data else SAMPLE, exam.field)
    task = make_task("gptq", documents, tokenizer, model.max_model_len, window=exam.window)
    half = max(2, exam.max_tokens // task.window) // 2
    if len(task.windows) < 2 * half:
        half = len(task.windows) // 2
    if half < 1:
        raise ConfigError("--data: one half is searched on and one checks; give text for two windows, or a --window")
    calibration, held_out = _windows_of(task, 0, half), _windows_of(task, half, 2 * half)
    provenance: dict[str, Any] = {
        "method": "KVTuner (arXiv:2502.04420): Pareto pruning, clustering, NSGA-II",
        "model": config.model,
        "fingerprint": fingerprint(model.path),
        "dtype": str(model.dtype).removeprefix("torch."),
        "data": exam.data,
        "window": task.window,
        "calibration_tokens": calibration.num_tokens,
        "held_out_tokens": held_out.num_tokens,
        "trials": num_trials,
        "budget": asdict(budget),
    }
    part = Path(f"{path}.part")
    identity = {**provenance, "format": asdict(config.kv), "trials": None, "budget": None}
    journal = Journal(part, identity, float, "--save-plan")
    with progress("searching plans") as on_progress:
        result = search(
            model, calibration, held_out, config.kv, budget, journal, num_trials=num_trials, on_progress=on_progress
        )
    figures = {"plan": asdict(result.found), "uniform": [asdict(score) for score in result.uniform]}
    plan = result.plan.kv
    write_plan(path, plan.layer_bits or (), Sidecar(replace(plan, layer_bits=None), provenance, figures))
    part.unlink()
    return result


def _windows_of(task: Task, first: int, end: int) -> Task:
    return replace(task, windows=task.windows[first:end], weights=task.weights[first:end])


def sensitivities(model: ScoringModel, text: Task, base: KVOptions, spec: KVSpec) -> list[list[float]]:
    """[layers][PAIRS]: each layer's attention-output error where it and all before it are in these bits."""
    windows = torch.tensor([window.token_ids for window in text.windows], device=model.device)
    activations = calibrate(model.whole, windows)
    by_pair = [
        propagated_errors(
            model.whole, windows, activations, resolve(_plan_options(base, 0, [pair] * spec.num_layers), spec)
        )
        for pair in PAIRS
    ]
    return [list(errors) for errors in zip(*by_pair, strict=True)]


def prune(errors: Sequence[float]) -> tuple[Pair, ...]:
    """Pairs that no other beats in bits and error both, the fewest bits first.

    Args:
        errors: one for each of `PAIRS`.
    """
    kept: list[Pair] = []
    lowest = math.inf
    for error, (key, value) in sorted(zip(errors, PAIRS, strict=True), key=lambda item: (_width(item[1]), item[0])):
        if error < lowest:
            kept.append((key, value))
            lowest = error
    return tuple(kept)


def cluster(sensitivity: Sequence[Sequence[float]]) -> list[Group]:
    """Layers with the same front and like errors, each group holding only layers that are `ALIKE` pairwise."""
    logs = torch.tensor(sensitivity, dtype=torch.float64).clamp(min=1e-12).log()
    groups: list[list[int]] = []
    for layer, errors in enumerate(sensitivity):
        for group in groups:
            alike = all(float((logs[layer] - logs[other]).abs().mean()) < ALIKE for other in group)
            if alike and prune(sensitivity[group[0]]) == prune(errors):
                group.append(layer)
                break
        else:
            groups.append([layer])
    return [Group(tuple(group), prune(sensitivity[group[0]])) for group in groups]


class _Trials:
    """Plans tried on calibration text, each run once.

    Attributes:
        plans: those within the budget.
    """

    def __init__(
        self,
        model: ScoringModel,
        windows: Sequence[Window],
        spec: KVSpec,
        base: KVOptions,
        budget: Budget,
        groups: Sequence[Group],
        journal: Journal,
    ) -> None:
        self.model, self.windows, self.spec = model, windows, spec
        self.base, self.budget, self.groups, self.journal = base, budget, groups, journal
        self._exact = list(model.hidden_states(windows, SIXTEEN_BITS))
        self._tried: dict[KVOptions, Plan] = {}

    @property
    def plans(self) -> list[Plan]:
        return list(self._tried.values())

    def run(self, sensitivity: Sequence[Sequence[float]], num_trials: int, on_progress: OnProgress) -> None:
        """Search, beginning with what sensitivities alone would choose."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():  # experimental in optuna 4, replaced in 5
            warnings.simplefilter("ignore")
            sampler = optuna.samplers.NSGAIISampler(
                population_size=POPULATION, seed=0, constraints_func=lambda trial: (trial.user_attrs["excess"],)
            )
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        windows = _windows(self.base, self.spec)
        choices = [{_word(pair): pair for pair in group.pairs} for group in self.groups]
        for window in windows:
            for pairs in self._greedy(window, sensitivity):
                words = {f"group {index}": _word(pair) for index, pair in enumerate(pairs)}
                study.enqueue_trial({"window": window, **words}, skip_if_exists=True)

        def objective(trial: optuna.Trial) -> tuple[float, float]:
            window = trial.suggest_categorical("window", windows)
            pairs = [
                words[trial.suggest_categorical(f"group {index}", list(words))] for index, words in enumerate(choices)
            ]
            layout = self._layout(window, pairs)
            excess = self.budget.cost(layout) / self.budget.limit - 1
            trial.set_user_attr("excess", excess)
            on_progress(trial.number + 1, num_trials)
            return layout.bits_per_element, self._kld(window, pairs) if excess <= 0 else math.inf

        study.optimize(objective, n_trials=num_trials)

    def _greedy(self, window: int, sensitivity: Sequence[Sequence[float]]) -> list[list[Pair]]:
        """Plans within the budget on the way from the fewest bits to the most, each step where a bit helps most; those
        with the most bits first."""
        steps = [0] * len(self.groups)
        path = []
        while True:
            pairs = [group.pairs[step] for group, step in zip(self.groups, steps, strict=True)]
            if self.budget.cost(self._layout(window, pairs)) > self.budget.limit:
                break
            path.append(pairs)
            gains = {
                index: self._gain(index, step, sensitivity)
                for index, step in enumerate(steps)
                if step + 1 < len(self.groups[index].pairs)
            }
            if not gains:
                break
            steps[max(gains, key=lambda index: gains[index])] += 1
        return path[: -POPULATION // 2 - 1 : -1]

    def _gain(self, index: int, step: int, sensitivity: Sequence[Sequence[float]]) -> float:
        """Squared error of a group's layers that a bit more takes away."""
        now, then = self.groups[index].pairs[step], self.groups[index].pairs[step + 1]
        errors = [sensitivity[layer] for layer in self.groups[index].layers]
        saved = sum(row[PAIRS.index(now)] ** 2 - row[PAIRS.index(then)] ** 2 for row in errors)
        return saved / (len(errors) * (_width(then) - _width(now)))

    def _options(self, window: int, pairs: Sequence[Pair]) -> KVOptions:
        bits: list[Pair] = [("2", "2")] * self.spec.num_layers
        for group, pair in zip(self.groups, pairs, strict=True):
            for layer in group.layers:
                bits[layer] = pair
        return _plan_options(self.base, window, bits)

    def _layout(self, window: int, pairs: Sequence[Pair]) -> KVLayout:
        return KVLayout(self.spec, resolve(self._options(window, pairs), self.spec))

    def _kld(self, window: int, pairs: Sequence[Pair]) -> float:
        kv = self._options(window, pairs)
        if kv not in self._tried:
            key = f"{window} " + " ".join(map(_word, kv.layer_bits or ()))
            if key not in self.journal.rows:
                self.journal.record(key, self._measured(kv))
            self._tried[kv] = Plan(kv, self._layout(window, pairs).bits_per_element, float(self.journal.rows[key]))
        return self._tried[kv].kld

    def _measured(self, kv: KVOptions) -> float:
        """Mean divergence from 16 bits over all places."""
        total, count = 0.0, 0
        for window, exact, hidden in zip(
            self.windows, self._exact, self.model.hidden_states(self.windows, kv), strict=True
        ):
            for (p, _), (q, _) in zip(
                self.model.log_probs_of(window, exact), self.model.log_probs_of(window, hidden), strict=True
            ):
                total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
                count += len(p)
        return total / count


def _plan_options(base: KVOptions, window: int, bits: Sequence[Pair]) -> KVOptions:
    return replace(base, residual_length=window, layer_bits=tuple(bits))


def _windows(base: KVOptions, spec: KVSpec) -> list[int]:
    """Residual lengths to try; a small block costs more scales, but its tail holds more of the newest tokens."""
    if base.residual_length is not None:
        return [base.residual_length]
    spans_tokens = not resolve(_plan_options(base, 0, [("2", "2")] * spec.num_layers), spec).packs_on_write
    return [0, SMALL_BLOCK_SIZE] if spans_tokens and base.q_group_size is None else [0]


def _front(plans: Sequence[Plan]) -> list[Plan]:
    front: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.bits_per_element, plan.kld)):
        if not front or plan.kld < front[-1].kld:
            front.append(plan)
    return front


def _width(pair: Pair) -> int:
    return int(pair[0]) + int(pair[1])


def _word(pair: Pair) -> str:
    return f"K{pair[0]}V{pair[1]}"
