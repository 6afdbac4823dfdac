"""Chat templates: Jinja programs that write a conversation as a prompt, kept from doing anything else.

The model's own template is trusted as far as its weights are: it renders here, sandboxed and with a time limit. One
that a client sends is a stranger's program: it renders in a process of its own, whose time and memory have an end.
"""

import ctypes
import functools
import json
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2.ext
import jinja2.meta
import jinja2.parser
import jinja2.sandbox

SECONDS = 2
START_SECONDS = 8  # a busy machine may take so long to start a process that has not yet used its own time
MEMORY_BYTES = 512 << 20
MAX_CHARACTERS = 4 << 20  # of a text that a stranger's template writes


class _TimeUp(BaseException):
    """Not an Exception: a template that runs must not catch it on its way."""


def render(source: str, variables: Mapping[str, Any]) -> str:
    """What the model's template makes of `variables`, in the calling thread.

    The limit ends Python code, of which templates are made, though not a single long operation on numbers or strings.

    Raises:
        TimeoutError: it takes too long.
        Exception: whatever a template can cause.
    """
    thread, lock, done = threading.get_ident(), threading.Lock(), False

    def expire() -> None:
        with lock:
            if not done:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_TimeUp))

    timer = threading.Timer(SECONDS, expire)
    timer.daemon = True
    try:
        try:
            timer.start()  # inside: on a busy machine the time can run out before this returns
            return _compiled(source).render(variables)
        finally:
            with lock:  # from here on the time cannot run out any more
                done = True
            timer.cancel()
    except _TimeUp:
        raise TimeoutError(f"it takes over {SECONDS} s") from None


def render_apart(source: str, variables: Mapping[str, Any]) -> str:
    """What a stranger's template makes of `variables`, in a process that lives for this one text.

    Raises:
        TimeoutError: it takes too long.
        RuntimeError: it fails, in its own words, or needs too much memory.
    """
    # As the engine is started: not `-m`, which would import whatever Python files lie in the current folder.
    code = "import sys; sys.path[0] = sys.argv[1]; from kvtool.chat_template import main; main()"
    command = [sys.executable, "-c", code, str(Path(__file__).parents[1])]
    question = json.dumps([source, variables]).encode()
    try:
        process = subprocess.run(command, input=question, capture_output=True, timeout=SECONDS + START_SECONDS)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"it takes over {SECONDS} s") from None
    if process.returncode:
        raise RuntimeError(f"it takes over {SECONDS} s or {MEMORY_BYTES >> 20} MiB")
    text, error = json.loads(process.stdout)
    if error is not None:
        raise RuntimeError(error)
    assert isinstance(text, str)
    return text


def main() -> None:
    """The process of `render_apart`: a template and its variables on stdin, text or error on stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    source, variables = json.load(sys.stdin)
    try:
        text = _compiled(source).render(variables)
        answer = [text, None] if len(text) <= MAX_CHARACTERS else [None, f"it writes over {MAX_CHARACTERS} characters"]
    except MemoryError:
        answer = [None, f"it takes over {MEMORY_BYTES >> 20} MiB"]
    except Exception as error:  # a template can raise anything
        answer = [None, str(error) or type(error).__name__]
    print(json.dumps(answer))


def variables_of(source: str) -> set[str]:
    """Names that a template reads and does not define.

    Raises:
        jinja2.TemplateSyntaxError: it is no template.
    """
    return jinja2.meta.find_undeclared_variables(_environment().parse(source))


@functools.lru_cache(maxsize=4)
def _compiled(source: str) -> jinja2.Template:
    return _environment().from_string(source)


@functools.cache
def _environment() -> jinja2.Environment:
    """What templates on the Hugging Face hub are written for, that is transformers' environment."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        # Jinja's own two give away methods that reach out of the sandbox.
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": _Namespace,
    }
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant says, for training; here it is text like the rest."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(jinja2.utils.Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be a name in the template
        self, *rest = args
        jinja2.utils.Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")
        super().__setitem__(name, value)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
