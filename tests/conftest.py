"""Processes under test: a real server, shared by all tests that only ask it things, and commands."""

import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from kvtool.tokenizer import Tokenizer

# Before torch is imported: threads that wait for a core which a server under test holds stop all the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():  # before triton is imported: without a GPU kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.pop("COLUMNS", None)  # of whoever runs the tests: what is printed to a pipe is as wide as it needs to be

REPOSITORY = Path(__file__).parents[1]
CACHE = TemporaryDirectory(prefix="kvtool-tests-")  # what is found out about models, by all servers under test
START_SECONDS = 120  # generous: CI machines may run other things beside

# What the server is asked where that does not matter.
PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}
MESSAGES: Any = [{"role": "user", "content": "Who are you?"}]
EOS = 2

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`kvtool` in this process, where torch is loaded already: exit status, stdout, stderr."""
    import commands

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kvtool", *arguments])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


def error_line(ended: tuple[int, str, str]) -> str:
    """What a command says that could not run: one line on stderr, and nothing else."""
    status, stdout, stderr = ended
    assert (status, stdout) == (2, "")
    assert re.fullmatch(r"error: [^\n]+\n", stderr), stderr
    return stderr


def kvtool(*arguments: str, **settings: object) -> "subprocess.Popen[str]":
    """`kvtool` from the checkout, installed or not, without the caller's KVTOOL_ variables."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("KVTOOL_")}
    env["XDG_CACHE_HOME"] = CACHE.name
    command = [sys.executable, "-m", "commands", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY, "env": env}
    return subprocess.Popen(command, **(pipes | settings))  # type: ignore[call-overload,no-any-return]


def in_time(command: Sequence[str | Path], seconds: float = 180, **settings: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a process that may start others, once all that have its stderr have ended. If
    they take longer, they are killed, and what they have said is shown."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    process = subprocess.Popen(command, start_new_session=True, **(pipes | settings))  # type: ignore[call-overload]
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"not done within {seconds:g} s:\n{stdout}\n{stderr}")
    return process.returncode, stdout, stderr


def beginning_with(folder: Path) -> dict[str, str]:
    """An environment whose Python processes all begin with the sitecustomize.py in `folder`."""
    paths = [str(folder), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def script(name: str) -> ModuleType:
    """`scripts/NAME.py` as a module; it may import its neighbours."""
    if (folder := str(REPOSITORY / "scripts")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def children(pid: int) -> list[int]:
    """Processes that `pid` has started and that still run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(pid: int) -> bool:
    """Gone, or waiting for a parent that does not look."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@dataclass(frozen=True)
class ServerProcess:
    process: "subprocess.Popen[str]"
    url: str
    card: str

    @property
    def engine(self) -> int:
        """Process id of the engine."""
        (pid,) = children(self.process.pid)
        return pid

    def end(self) -> tuple[int, str]:
        """Exit status and stderr, once it has ended by itself."""
        _, stderr = self.process.communicate(timeout=60)
        return self.process.returncode, stderr


@contextmanager
def serving(*options: str) -> Iterator[ServerProcess]:
    """`kvtool serve` on a free port, from ready to ended."""
    process = kvtool("serve", "--port", "0", *options)
    try:
        assert process.stdout is not None
        card = ""
        while "curl" not in card:  # the card's last line
            line = process.stdout.readline()
            if not line:
                pytest.fail(f"the server did not start: {process.communicate()[1]}")
            card += line
        url = re.search(r"http://\S+", card)
        assert url is not None
        yield ServerProcess(process, url[0], card)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """The embedded model at 4 bits; two sequences at once, so that a forgotten request would be in others' way."""
    with serving("--nbits", "4", "--kv-cache-memory", "64MiB", "--max-num-seqs", "2") as running:
        yield running


@pytest.fixture(scope="session")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def tokenizer(client: openai.OpenAI) -> "Tokenizer":
    """The server's, found where its model card says."""
    from kvtool.tokenizer import Tokenizer

    (model,) = client.models.list().data
    return Tokenizer.load(Path(model.root), 4096)  # type: ignore[attr-defined]


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    """The one choice of a greedy completion."""
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True} | fields
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return dict(choice)


def events(response: httpx.Response) -> list[str]:
    """Data of the events of a stream; there must be nothing else in it."""
    lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def fault(response: httpx.Response) -> dict[str, Any]:
    """The error object of a response that refuses."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    return error
