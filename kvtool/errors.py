"""What a user can cause. Everything else is a bug and an `assert`."""


class KVToolError(Exception):
    """One line that names the option, file or field, what was wrong with it and what to do."""


class ConfigError(KVToolError):
    """Options that are unusable, alone or together."""


class ModelError(KVToolError):
    """A model folder that cannot be opened as it is."""


class UnsupportedError(KVToolError):
    """Something valid that kvtool cannot run; the message says what it can."""


class CapacityError(KVToolError):
    """More memory asked for than there is."""


class RequestError(KVToolError):
    """A request that can never be answered; `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class EngineDeadError(KVToolError):
    """The engine process ended while it was needed."""
