"""What rank 0 tells the other ranks, and what they answer."""

from typing import Literal

import msgspec

from kvtool.config import EngineConfig
from kvtool.errors import KVToolError
from kvtool.request import Export, ScheduledBatch, StepResult


class Start(msgspec.Struct, frozen=True, tag="start"):
    """What for: an engine's steps, or to score texts. `pid` is rank 0's, on its machine."""

    config: EngineConfig
    work: Literal["steps", "scores"]
    pid: int


class Launch(msgspec.Struct, frozen=True, tag="launch"):
    """A step; first, `token_ids` are those that the last stage has sampled, by slot."""

    step: int
    batch: ScheduledBatch
    allowed: bytes | None
    token_ids: dict[int, int]
    exports: list[Export]


class Count(msgspec.Struct, frozen=True, tag="count"):
    """Say how many tokens have chosen each expert, in all steps so far."""


class End(msgspec.Struct, frozen=True, tag="end"):
    """Nothing more will come, and all is well."""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """I am here."""


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Steps can come."""


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """I cannot go on. From rank 0: nobody can, and this is the exit status of all."""

    error: str
    status: int = 1

    @classmethod
    def by(cls, error: BaseException) -> "Failed":
        if isinstance(error, KVToolError):
            return cls(f"has failed: {error}", 2)
        if isinstance(error, KeyboardInterrupt):
            return cls("was interrupted", 130)
        return cls(f"has failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


class Launched(msgspec.Struct, frozen=True, tag="launched"):
    """All of a step is on its way to the device; no kernel is compiled for it any more."""

    step: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """A step is over; `error` is for its requests. The result is the last stage's."""

    step: int
    error: str | None
    result: StepResult | None


class Counted(msgspec.Struct, frozen=True, tag="counted"):
    """Tokens of each expert, by layer, of a rank's own stage."""

    expert_tokens: dict[int, list[int]]
