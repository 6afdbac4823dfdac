"""JSON from outside, read strictly: every complaint names the file and the field."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from kvtool.errors import ModelError


@dataclass(frozen=True)
class Fields:
    """A JSON object whose every complaint names the file and the field.

    Attributes:
        prefix: how the object is reached in the file, "" at the top.
    """

    path: Path
    values: Mapping[str, Any]
    prefix: str = ""

    def refuse(self, name: str, why: str) -> NoReturn:
        raise ModelError(f"{self.path}: {self.prefix}{name} {why}")

    def get(self, name: str, default: Any = None) -> Any:
        """The value, unchecked; null counts as absent."""
        value = self.values.get(name)
        return default if value is None else value

    def count(self, name: str, default: int | None = None, least: int = 1, most: int = 2**31 - 1) -> int:
        """An integer from `least` to `most`."""
        value = self._present(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.refuse(name, f"is {value!r:.40}; it must be an integer of at least {least} and at most {most}")
        return value

    def number(self, name: str, default: float | None = None, above: float = 0) -> float:
        """A finite number greater than `above`."""
        value = self._present(name, default)
        if not _is_number(value, above):
            self.refuse(name, f"is {value!r}; it must be a number above {above}")
        return float(value)

    def numbers(self, name: str, length: int) -> tuple[float, ...]:
        """A list of positive numbers, of a given length."""
        value = self._present(name, None)
        if not isinstance(value, list) or len(value) != length or not all(_is_number(item, 0) for item in value):
            self.refuse(
                name, f"must be a list of {length} positive numbers, one for every two rotated elements of a head"
            )
        return tuple(map(float, value))

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, f"is {value!r}; it must be true or false")
        return value

    def nested(self, name: str) -> "Fields":
        """The object under this name, empty where it is absent."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            self.refuse(name, f"is {value!r}; it must be an object or null")
        return Fields(self.path, value, f"{self.prefix}{name}.")

    def _present(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            self.refuse(name, "is missing; add it, or download the file again")
        return value


def read_fields(path: Path) -> Fields:
    """The object in a JSON file.

    Raises:
        ModelError: there is no such file, or it holds something else.
    """
    try:
        content = path.read_bytes()
        refuse_lfs_pointer(path, content)
        values = json.loads(content)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file; --model takes a folder in the Hugging Face layout") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is no JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds no JSON object; download it again")
    return Fields(path, values)


def refuse_lfs_pointer(path: Path, content: bytes) -> None:
    """Refuse a file that git left as a pointer, by its first bytes."""
    if content.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path}: is a git-LFS pointer, not the file itself; run `git lfs pull` in its folder")


def _is_number(value: object, above: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and above < value <= sys.float_info.max
