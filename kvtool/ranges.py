"""Names for stretches of a step's work, as a trace shows them and `profiling` adds them up."""

from torch._C._profiler import _RecordFunctionFast as Range  # record_function takes 40 times as long

__all__ = ["Range"]
