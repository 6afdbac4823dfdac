"""The same prompts through transformers' `generate`, one static batch after the other, in a process of its own."""

import asyncio
import resource
import sys
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from kvtool.bench.events import RequestRecord
from kvtool.bench.metrics import Figures
from kvtool.errors import KVToolError
from kvtool.request import EngineInfo


class Batch(msgspec.Struct, frozen=True):
    """What to answer: prompts of one length, each with `output_tokens`."""

    prompts: list[list[int]]
    output_tokens: int


class Task(msgspec.Struct, frozen=True):
    """What the process does: load a model and answer each batch, `warmup` times before and then `trials` times."""

    path: str
    dtype: str
    device: str
    batches: list[Batch]
    warmup: int
    trials: int


class Answered(msgspec.Struct, frozen=True):
    """One batch: seconds until each of its tokens came, and MiB that were in use at most.

    Attributes:
        error: why there was no answer.
    """

    times: list[float] = []
    memory_mib: float = 0.0
    error: str = ""


async def transformers_rows(
    info: EngineInfo, batches: Sequence[Batch], warmup: int, trials: int, definitions: str
) -> AsyncGenerator[dict[str, Any], None]:
    """A row for each batch, as of our engine, whose model, dtype and device these are.

    Raises:
        KVToolError: transformers cannot run the model.
    """
    code = "import sys; sys.path[0] = sys.argv[1]; from kvtool.bench.baseline import main; main()"
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2])]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True, limit=1 << 26
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    complaint = asyncio.create_task(process.stderr.read())
    try:
        task = Task(info.path, info.dtype, info.device, list(batches), warmup, trials)
        process.stdin.write(msgspec.json.encode(task) + b"\n")
        await process.stdin.drain()
        for batch in batches:
            total, memory = Figures(definitions), 0.0
            for _ in range(trials):
                line = await process.stdout.readline()
                if not line:
                    reason = (await complaint).decode(errors="replace").strip().rpartition("\n")[2]
                    raise KVToolError(f"--baseline transformers: it ended: {reason}")
                answered = msgspec.json.decode(line, type=Answered)
                total.merge(figures_of(batch, answered, definitions))
                memory = max(memory, answered.memory_mib)
            yield {"batch_size": len(batch.prompts), **total.row(), "memory_mib": memory or None}
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await complaint


def figures_of(batch: Batch, answered: Answered, definitions: str) -> Figures:
    """A static batch in figures: all its sequences get each token at the same time."""
    figures = Figures(definitions)
    for index, prompt in enumerate(batch.prompts):
        record = RequestRecord(
            run=0,
            id=index,
            asked_tokens=batch.output_tokens,
            scheduled=0.0,
            sent=0.0,
            chunk_times=answered.times,
            chunk_kinds="i" * len(answered.times),
            chunk_tokens=[1] * len(answered.times),
            ended=answered.times[-1] if answered.times else 0.0,
            prompt_tokens=len(prompt),
            output_tokens=len(answered.times),
            failure="empty" if answered.error else None,
            error=answered.error,
        )
        figures.add(record)
    return figures


def main() -> None:
    """The process: read a `Task`, print an `Answered` for each trial of each batch."""
    import torch
    from transformers import AutoModelForCausalLM

    from kvtool.processes import cpu_threads

    torch.set_num_threads(cpu_threads())
    task = msgspec.json.decode(sys.stdin.buffer.readline(), type=Task)
    model = AutoModelForCausalLM.from_pretrained(
        task.path, dtype=getattr(torch, task.dtype), trust_remote_code=False, local_files_only=True
    )
    model = model.to(task.device).eval()
    for batch in task.batches:
        for trial in range(-task.warmup, task.trials):
            answered = answer(model, batch)
            if trial >= 0:
                sys.stdout.buffer.write(msgspec.json.encode(answered) + b"\n")
                sys.stdout.buffer.flush()


def answer(model: Any, batch: Batch) -> Answered:
    """One greedy `generate` over a batch, end of text ignored."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    ids = torch.tensor(batch.prompts, device=model.device)
    gpu, times = model.device.type == "cuda", list[float]()
    if gpu:
        torch.cuda.reset_peak_memory_stats()

    class Clock(StoppingCriteria):  # type: ignore[misc]
        """Is asked behind every token."""

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            if gpu:
                torch.cuda.synchronize()
            times.append(perf_counter() - start)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    start = perf_counter()
    try:
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=batch.output_tokens,
                min_new_tokens=batch.output_tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([Clock()]),
            )
    except torch.OutOfMemoryError as error:
        return Answered(error=str(error).partition("\n")[0])
    peak = torch.cuda.max_memory_reserved() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return Answered(times, peak / 2**20)
