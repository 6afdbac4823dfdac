"""From what a user calls a model to a folder on disk."""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from kvtool.errors import ModelError
from kvtool.models.fields import Fields, read_fields

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = {name: ASSETS / name for name in ("tiny", "tiny-draft")}
SHAPES = ASSETS / "shapes.json"  # fields of published models' config.json, by the models' names
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
UNWANTED = ["*/*", "consolidated*"]  # the same weights once more, in their makers' own layout
PAGES, PAGE_BYTES = 1024, 4096  # of a weight file; they stand for all of it


def resolve_model(name: str, option: str = "--model") -> Path:
    """The folder of a model: an embedded one's name, a folder, or a hub id, which is downloaded unless it is cached.

    An embedded name wins over a folder of the same name; write `./tiny` for the folder. Only weights in safetensors,
    configuration and tokenizer are downloaded, never pickles or code.

    Args:
        option: what the user gave the name to, for errors.

    Raises:
        ModelError: there is no such model, or it cannot be downloaded.
    """
    asked = f"{option} {name}"
    if (found := _on_disk(name, asked)) is None:
        return _download(name, asked, lambda: snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    if not found.is_dir():
        raise ModelError(f"{asked}: is a file; give the folder that holds it")
    return found


def resolve_config(name: str) -> Fields:
    """The config.json of a model whose weights nobody needs: of what `resolve_model` takes, or the file itself, or the
    name of a published model whose shape travels with kvtool.

    Raises:
        ModelError: there is no such model, it cannot be downloaded, or the file is no JSON object.
    """
    shapes = read_fields(SHAPES)
    if name in shapes.values:
        return shapes.nested(name)
    asked = f"--model {name}"
    if (found := _on_disk(name, asked)) is None:
        return read_fields(_download(name, asked, lambda: hf_hub_download(name, "config.json"), list(shapes.values)))
    return read_fields(found / "config.json" if found.is_dir() else found)


def fingerprint(folder: Path) -> str:
    """Tells a model's weights and configuration from others': of long files, up to 4 MiB in evenly spaced pages."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors")]):
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(f"{file.name} {size} ".encode())
            for start in range(0, size, max(PAGE_BYTES, size // PAGES)):
                stream.seek(start)
                digest.update(stream.read(PAGE_BYTES))
    return digest.hexdigest()


def _on_disk(name: str, asked: str) -> Path | None:
    """An embedded model's folder, or what there is under this path; None where it may be a hub id."""
    if name in EMBEDDED:
        return EMBEDDED[name]
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError) as error:  # no name that a file can have, or no such user
        raise ModelError(f"{asked:.50}: no such folder ({str(error).partition(':')[0]})") from error


def _download(name: str, asked: str, download: Callable[[], str], shapes: Sequence[str] = ()) -> Path:
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        known = ", ".join((*EMBEDDED, *shapes))
        raise ModelError(f"{asked}: no such folder, and no hub id; embedded models: {known}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # not a line for each time it tries again
    try:
        return Path(download())
    except GatedRepoError:
        why = "needs permission; accept its terms on huggingface.co and run `hf auth login`"
    except (RepositoryNotFoundError, HFValidationError):
        why = "neither a folder nor a model on the hub; if it is private, run `hf auth login`"
    except LocalEntryNotFoundError:
        why = "no such folder, and the hub cannot be reached; download the model elsewhere and give its folder"
    except (OSError, httpx.HTTPError) as error:
        why = f"cannot be downloaded ({' '.join(str(error).split())}); try again, or give a folder"
    hint = f" (shapes that are known: {', '.join(shapes)})" if shapes and "/" not in name else ""
    raise ModelError(f"{asked}: {why}{hint}")
