"""What one format costs a model: errors by layer, memory, quality, right answers and, on a GPU, time."""

import gc
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvtool.config import EngineConfig, KVOptions
from kvtool.device import choose_device
from kvtool.errors import ConfigError, KVToolError, UnsupportedError
from kvtool.kv.format import KVFormat, resolve
from kvtool.kv.layout import KVLayout
from kvtool.kv.spec import KVSpec
from kvtool.models import load_config, resolve_model
from kvtool.models.kv import attention_layers, kv_spec
from kvtool.perplexity import FormatScore, score_formats
from kvtool.protocols import SAMPLE, Task, make_task, read_documents
from kvtool.quantize.cache_file import CachedPrompt, cache_prompt, read_cache, write_cache
from kvtool.quantize.decode_speed import DecodeSpeed, decode_speed
from kvtool.quantize.layer_errors import Outlier, calibrate, layer_errors, outlier, propagated_errors
from kvtool.quantize.memory import Memory, layer_memory, nominal_saved
from kvtool.quantize.tasks import Answer, Question, answer_all, load_task
from kvtool.scoring import SIXTEEN_BITS, ScoringModel
from kvtool.tokenizer import Tokenizer

OnProgress = Callable[[float, float], None]  # done, of how many
Progress = Callable[[str], AbstractContextManager[OnProgress]]  # one stage of a run
CALIBRATION_TOKENS = 1024
SAMPLE_CHARACTERS = 4000  # that are cached where no prompt is given
MOST_CONTEXT = 32768  # that memory is told for, unless asked


@dataclass(frozen=True)
class Exam:
    """What formats are measured on.

    Attributes:
        data: a file to read; None: the sample that travels with kvtool.
        field: of the rows of `data`, where it has rows.
        window: tokens that are read together; None: 2,048 or the model's context.
        max_tokens: of the text that are read at most, but one window at least.
        num_seqs, context: sequences, and tokens of each, that memory and time are told for; None: the model's context,
            32,768 at most.
        task: `retrieval` or a file of questions; None asks nothing.
        questions: of the task, from its first; None: all.
        answer_tokens: of an answer at most.
    """

    data: str | None = None
    field: str | None = None
    window: int | None = None
    max_tokens: int = 8192
    num_seqs: int = 1
    context: int | None = None
    task: str | None = None
    questions: int | None = None
    answer_tokens: int = 512


@dataclass(frozen=True)
class StreamCost:
    """Keys or values of one layer.

    Attributes:
        format: in words.
        error: ‖x − packed(x)‖ / ‖x‖ of what stands in blocks.
        outlier: the channel that stands out most.
    """

    format: str
    error: float
    outlier: Outlier
    memory: Memory


@dataclass(frozen=True)
class LayerCost:
    """One layer.

    Attributes:
        output_error: of its attention's output, as if all layers before it were exact.
        propagated_error: the same with those packed too.
    """

    layer: int
    key: StreamCost
    value: StreamCost
    output_error: float
    propagated_error: float


@dataclass(frozen=True)
class TaskScore:
    """How many questions a model answered right.

    Attributes:
        accuracy, error: share of right answers, and its standard error.
        answers: in the order of the questions.
    """

    questions: int
    right: int
    accuracy: float
    error: float
    answers: tuple[Answer, ...]

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "TaskScore":
        right = sum(answer.is_right for answer in answers)
        share = right / len(answers)
        return cls(len(answers), right, share, math.sqrt(share * (1 - share) / len(answers)), tuple(answers))


@dataclass(frozen=True)
class FormatCost:
    """One format on one model.

    Attributes:
        score: quality on text, honest bits.
        nominal_saved: share of 16 bits that codes without scales, zeros and window would save.
        num_seqs, context: sequences, and tokens of each, that memory is told for.
        memory: of all layers.
        task: right answers, where questions are asked.
        decode: on a GPU, where a kernel reads the format.
    """

    score: FormatScore
    nominal_saved: float
    num_seqs: int
    context: int
    memory: Memory
    layers: tuple[LayerCost, ...]
    task: TaskScore | None = None
    decode: DecodeSpeed | None = None

    def row(self) -> dict[str, Any]:
        """Plain values, with what follows from them, without the answers to a task."""
        errors, task, decode = [layer.output_error for layer in self.layers], self.task, self.decode
        return {
            **asdict(self.score),
            "nominal_saved": self.nominal_saved,
            "batch": self.num_seqs,
            "context": self.context,
            "memory": {**asdict(self.memory), "total": self.memory.total, "saved": self.memory.saved},
            "output_error": {"mean": sum(errors) / len(errors), "max": max(errors)},
            "layers": [asdict(layer) for layer in self.layers],
            "task": task and {name: value for name, value in asdict(task).items() if name != "answers"},
            "decode": decode and {**asdict(decode), "bytes_per_second": decode.nbytes / decode.seconds},
        }


class Examiner:
    """A model, and what all formats are measured on.

    Args:
        baseline: a file that is written here: what the model computes from a 16-bit cache.

    Raises:
        KVToolError: the model cannot be loaded, the text is too short, or what the model computes is not finite.
    """

    def __init__(self, config: EngineConfig, exam: Exam, baseline: Path, on_progress: OnProgress) -> None:
        self.model, self.baseline = ScoringModel(config), baseline
        self.num_seqs, self.context = exam.num_seqs, _context(exam, self.model.max_model_len)
        self.task = _text(exam, self.model)
        first = list(self.task.windows[0].token_ids[:CALIBRATION_TOKENS])
        self._calibration = torch.tensor([first], device=self.model.device)
        self._activations = calibrate(self.model.whole, self._calibration)
        self._outliers = [(outlier(layer.key), outlier(layer.value)) for layer in self._activations]
        formats = {"16 bits": SIXTEEN_BITS}
        score_formats(self.model, self.task, formats, save_baseline=baseline, on_progress=on_progress)

    def close(self) -> None:
        """End the processes of other ranks, if there are any."""
        self.model.close()

    def measure(self, kv: KVOptions, on_progress: OnProgress) -> FormatCost:
        """What the format that `kv` asks for costs.

        Raises:
            ConfigError: options that contradict each other or do not fit the model.
            UnsupportedError: the format cannot hold what the model makes of the text.
        """
        layout = self.model.layout(kv)
        formats = {_short_name(layout.format): kv}
        (score,) = score_formats(self.model, self.task, formats, baseline=self.baseline, on_progress=on_progress)
        # Savings are told against 2 bytes an element, so exact tokens are counted in 16 bits too, whatever runs here.
        layers = self._layers(replace(layout, spec=replace(layout.spec, element_size=2)))
        return FormatCost(
            score=score,
            nominal_saved=nominal_saved(layout),
            num_seqs=self.num_seqs,
            context=self.context,
            memory=Memory.sum([stream.memory for layer in layers for stream in (layer.key, layer.value)]),
            layers=layers,
        )

    def identity(self) -> dict[str, Any]:
        """What figures depend on beside the format, in the words of the options."""
        text = sha256(repr([window.token_ids for window in self.task.windows]).encode()).hexdigest()
        return {
            "--model": self.model.fingerprint(),
            "--dtype": self.model.dtype_name,
            "--data, --max-tokens or --window": text,
            "--batch": self.num_seqs,
            "--context": self.context,
        }

    def _layers(self, layout: KVLayout) -> tuple[LayerCost, ...]:
        fmt = layout.format
        own = layer_errors(self._activations, fmt)
        propagated = propagated_errors(self.model.whole, self._calibration, self._activations, fmt)
        costs = []
        for index, kind in enumerate(fmt.layers):
            key_memory, value_memory = layer_memory(layout, index, self.num_seqs, self.context)
            key_outlier, value_outlier = self._outliers[index]
            costs.append(
                LayerCost(
                    layer=index,
                    key=StreamCost(kind.key.kind, own[index].key, key_outlier, key_memory),
                    value=StreamCost(kind.value.kind, own[index].value, value_outlier, value_memory),
                    output_error=own[index].output,
                    propagated_error=propagated[index],
                )
            )
        return tuple(costs)


def examine(config: EngineConfig, exam: Exam, progress: Progress) -> tuple[FormatCost, FormatCost]:
    """What a 16-bit cache costs, and what that of `config.kv` does.

    One model is loaded at a time, so that a GPU that holds it can measure it.

    Raises:
        KVToolError: the model cannot be loaded or the format does not fit it, a file is unreadable or too short, a
            question is too long, or what the model computes is not finite.
    """
    resolve(config.kv, model_spec(config))  # before seconds go into the model
    questions = load_task(exam.task)[: exam.questions] if exam.task else ()
    formats = {"16 bits": SIXTEEN_BITS, "packed": config.kv}
    decodes = [time_decode(config, kv, exam) for kv in formats.values()]
    with TemporaryDirectory(prefix="kvtool-") as folder:
        with progress("reading the text, 16 bits") as on_progress:
            examiner = Examiner(config, exam, Path(folder) / "baseline.safetensors", on_progress)
        with closing(examiner), progress("reading the text, packed") as on_progress:
            costs = [examiner.measure(kv, on_progress) for kv in formats.values()]
    del examiner
    tasks = [_ask(replace(config, kv=kv), questions, exam, name, progress) for name, kv in formats.items()]
    exact, packed = (
        replace(cost, task=task, decode=decode) for cost, task, decode in zip(costs, tasks, decodes, strict=True)
    )
    return exact, packed


def time_decode(config: EngineConfig, kv: KVOptions, exam: Exam) -> DecodeSpeed | None:
    """Attention of one decode step on a GPU that holds no model yet; None where there is none, or no kernel for `kv`.

    All layers read all of the context, whatever their sliding windows.

    Raises:
        CapacityError: the GPU cannot hold so many tokens.
    """
    device = choose_device(config.device)
    if device.type != "cuda":
        return None
    _release_memory()
    spec, model = model_spec(config), load_config(resolve_model(config.model))
    layer = replace(attention_layers(model)[0], sliding_window=None)
    context = _context(exam, config.max_model_len or model.max_position)
    try:
        with torch.cuda.device(device):
            return decode_speed(layer, spec, resolve(kv, spec), exam.num_seqs, context)
    except UnsupportedError:
        return None


def dump_cache(config: EngineConfig, prompt: str | None, path: Path) -> CachedPrompt:
    """Write the cache that `prompt` leaves to a safetensors file, and read it back.

    Args:
        prompt: None: the beginning of the sample that travels with kvtool.

    Raises:
        ConfigError: a prompt that is empty or does not fit the model, or a file that cannot be written.
        KVToolError: what comes back is not what was written.
    """
    if config.num_ranks > 1:
        raise ConfigError(f"--dump: is written by one rank; leave out {config.rank_options}")
    if prompt is not None and re.search("[\ud800-\udfff]", prompt):  # bytes that a shell hands over as they are
        raise ConfigError("--prompt: is no UTF-8 text; write it in UTF-8")
    model = ScoringModel(config)
    tokenizer, longest = Tokenizer.load(model.path, model.model_config.vocab_size), model.max_model_len
    sample = SAMPLE.read_text("utf-8")[:SAMPLE_CHARACTERS]
    token_ids = tokenizer.encode(sample)[:longest] if prompt is None else tokenizer.encode(prompt)
    if not 0 < len(token_ids) <= longest:
        raise ConfigError(f"--prompt: {len(token_ids)} tokens; give at least one and at most {longest}")
    cached = cache_prompt(model.model, model.layout(config.kv), token_ids, model.dtype)
    write_cache(path, cached)
    if not read_cache(path).equals(cached):
        raise KVToolError(f"--dump {path}: reads back otherwise than it was written; is the disk sound?")
    return cached


def model_spec(config: EngineConfig) -> KVSpec:
    """What the model caches, where it is served in 16 bits."""
    return kv_spec(load_config(resolve_model(config.model)), torch.bfloat16)


def _short_name(fmt: KVFormat) -> str:
    """`4 bits`, `K8 V4`, or `by layer`."""
    pairs = {(layer.key.bits, layer.value.bits) for layer in fmt.layers}
    if len(pairs) > 1:
        return "by layer"
    ((key, value),) = pairs
    if key != value:
        return f"K{key} V{value}"
    return key if key == "fp8" else f"{key} bits"


def _ask(
    config: EngineConfig, questions: Sequence[Question], exam: Exam, name: str, progress: Progress
) -> TaskScore | None:
    if not questions:
        return None
    _release_memory()
    with progress(f"{len(questions)} questions, {name}") as on_progress:
        return TaskScore.of(answer_all(config, questions, exam.answer_tokens, on_progress))


def _text(exam: Exam, model: ScoringModel) -> Task:
    documents = read_documents(Path(exam.data) if exam.data else SAMPLE, exam.field)
    tokenizer = Tokenizer.load(model.path, model.model_config.vocab_size)
    task = make_task("gptq", documents, tokenizer, model.max_model_len, window=exam.window)
    count = max(1, exam.max_tokens // task.window)
    return replace(task, windows=task.windows[:count], weights=task.weights[:count])


def _context(exam: Exam, max_model_len: int) -> int:
    return exam.context or min(max_model_len, MOST_CONTEXT)


def _release_memory() -> None:
    """Give back what dropped models held, so that the next one finds a GPU empty."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
