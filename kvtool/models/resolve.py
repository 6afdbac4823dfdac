"""From what a user calls a model to a folder on disk."""

import hashlib
import os
import re
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

from kvtool.errors import ModelError

EMBEDDED = {"tiny": Path(__file__).parent.parent / "assets" / "tiny"}
WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
UNWANTED = ["*/*", "consolidated*"]  # the same weights once more, in their makers' own layout
PAGES, PAGE_BYTES = 1024, 4096  # of a weight file; they stand for all of it


def resolve_model(name: str) -> Path:
    """The folder of a model: an embedded one's name, a folder, or a hub id, which is downloaded unless it is cached.

    An embedded name wins over a folder of the same name; write `./tiny` for the folder. Only weights in safetensors,
    configuration and tokenizer are downloaded, never pickles or code.

    Raises:
        ModelError: there is no such model, or it cannot be downloaded.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise ModelError(f"--model {name}: is a file; give the folder that holds it")
    except (OSError, RuntimeError) as error:  # no name that a file can have, or no such user
        raise ModelError(f"--model {name:.40}: no such folder ({str(error).partition(':')[0]})") from error
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ModelError(f"--model {name}: no such folder, and no hub id; embedded models: {', '.join(EMBEDDED)}")
    return _download(name)


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


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except GatedRepoError:
        why = "needs permission; accept its terms on huggingface.co and run `hf auth login`"
    except (RepositoryNotFoundError, HFValidationError):
        why = "neither a folder nor a model on the hub; if it is private, run `hf auth login`"
    except LocalEntryNotFoundError:
        why = "no such folder, and the hub cannot be reached; download the model elsewhere and give its folder"
    except (OSError, httpx.HTTPError) as error:
        why = f"cannot be downloaded ({' '.join(str(error).split())}); try again, or give a folder"
    raise ModelError(f"--model {name}: {why}")
