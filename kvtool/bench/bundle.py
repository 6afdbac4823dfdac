"""A folder that holds one measurement: its result, its events, what was asked, and the command that repeats it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvtool.errors import ConfigError

RESULT, EVENTS, MANIFEST, SCRIPT = "result.json", "events.jsonl", "manifest.json", "repeat.sh"
ONCE = {"--bundle", "--save-events", "--output", "--compare", "--fail-on", "--profile"}  # where this run's results went
FLAGS = {"--json", "--markdown", "--csv", "--force"}
SECRET = {"--api-key", "--kv-secret"}
FILES = {"--config", "--dataset-path", "--floor-config", "--kv-plan", "--calibration"}
MODELS = {"--model", "--model-path", "--draft-model", "--speculative-draft-model-path"}
VARIABLE = "KVTOOL_"
ASSETS = Path(__file__).parent.parent / "assets"  # the names of embedded models go before those of folders


def create_bundle(folder: Path) -> None:
    """An empty folder, before anything is measured.

    Raises:
        ConfigError: it cannot be made, or holds something.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"--bundle {folder}: is not empty; name a new folder")
    except OSError as error:
        raise ConfigError(f"--bundle {folder}: cannot be written: {error.strerror}; choose another folder") from error


def fill_bundle(folder: Path, result: str, command: Sequence[str], environ: Mapping[str, str]) -> None:
    """Write what belongs in `folder`, beside the events that are there already.

    Args:
        result: the document that --output writes: versions, hardware, options, what the server said, hashes of prompts.
        command: the words after `kvtool`.
        environ: of this run; its KVTOOL_ options are part of the command.
    """
    words, variables = repeatable(command), repeatable_variables(environ)
    manifest: dict[str, Any] = {"command": ["kvtool", *words], "environment": variables}
    (folder / RESULT).write_text(result)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    script = folder / SCRIPT
    script.write_text(repeat_script(words, variables))
    script.chmod(0o755)


def repeatable(command: Sequence[str]) -> list[str]:
    """A command line without what belongs to one run of it, and with whole paths."""
    words, rest = [], list(command)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        takes_value = name in ONCE | SECRET | FILES | MODELS
        if takes_value and not equals and rest:
            value = rest.pop(0)
        if name in ONCE | SECRET | FLAGS:
            continue
        if not equals and name in FILES | MODELS:
            words += [name, _whole(name, value)]
        else:
            words.append(name + equals + _whole(name, value))
    return words


def repeatable_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The options among environment variables, likewise."""
    options = {name: "--" + name.removeprefix(VARIABLE).lower().replace("_", "-") for name in environ}
    return {
        name: _whole(option, environ[name])
        for name, option in options.items()
        if name.startswith(VARIABLE) and option not in ONCE | SECRET | FLAGS
    }


def _whole(option: str, value: str) -> str:
    """The value of an option, found from any folder if it is a path."""
    is_path = option in FILES or (option in MODELS and Path(value).is_dir() and not (ASSETS / value).is_dir())
    return str(Path(value).resolve()) if is_path else value


def repeat_script(words: Sequence[str], variables: Mapping[str, str]) -> str:
    """Measures again, and holds what comes against the bundle's result; takes more options."""
    settings = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in sorted(variables.items()))
    return (
        "#!/usr/bin/env bash\n"
        "# Measures again what lies beside this script, and compares; more options can be added.\n"
        'here=$(cd "$(dirname "$0")" && pwd)\n'
        f'{settings}exec kvtool {shlex.join(words)} --compare "$here/{RESULT}" "$@"\n'
    )
