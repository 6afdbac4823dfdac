"""Results on disk as they come, so that a stopped run goes on where it was."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtool.errors import ConfigError


class Journal:
    """Rows by key in a JSONL file, whose first line says what they are results of.

    Args:
        path: the file, which is read if it exists; None keeps nothing.
        identity: what the results depend on, as plain values.
        row_type: of each result, as JSON has it.
        option: that chooses the file, for errors.

    Attributes:
        rows: those of an earlier run and those recorded since.

    Raises:
        ConfigError: the file cannot be written, is none of ours, or holds results of something else.
    """

    def __init__(
        self, path: Path | None, identity: Mapping[str, Any], row_type: type, option: str = "--output"
    ) -> None:
        self.path, self.row_type, self.option = path, row_type, option
        self.rows: dict[str, Any] = {}
        if path is None:
            return
        try:
            if path.exists():
                self._read(path, json.loads(json.dumps(identity)))
            else:
                self._append({"identity": identity})
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; choose another {self.option}") from error

    def record(self, key: str, row: Any) -> None:
        """Keep `row`, on disk before this returns."""
        self.rows[key] = row
        self._append({"key": key, "row": row})

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def _read(self, path: Path, identity: Mapping[str, Any]) -> None:
        content = path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]  # a run that was killed may leave half a line
        try:
            first, *lines = [json.loads(line) for line in complete.splitlines()]
            found = dict(first["identity"])
            self.rows = {line["key"]: line["row"] for line in lines}
            if not all(isinstance(row, self.row_type) for row in self.rows.values()):
                raise TypeError("a result of another kind")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{path}: is no list of results of ours; move it or choose another {self.option}"
            ) from error
        differing = sorted(name for name in {*found, *identity} if found.get(name) != identity.get(name))
        if differing:
            raise ConfigError(
                f"{path}: holds results of a run with another {', '.join(differing)}; ask for that, remove the file "
                f"or choose another {self.option}"
            )
        if len(complete) < len(content):
            path.write_bytes(complete)
