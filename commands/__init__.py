"""The `kvtool` command line. A command is a file here and a word in COMMANDS."""

import os
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from kvtool.errors import KVToolError

from .bench import bench_options
from .bench_results import result_options
from .bench_throughput import bench_throughput
from .bench_ttft import bench_ttft
from .mla_size import mla_size
from .moe_ep import moe_ep
from .options import BUNDLES, Command, shared
from .pd_disagg import pd_disagg
from .perplexity import perplexity
from .quantize_kv import quantize_kv
from .serve import serve

COMMANDS = (serve, bench_ttft, bench_throughput, quantize_kv, perplexity, pd_disagg, moe_ep, mla_size)
ALL_BUNDLES = BUNDLES | {"bench": bench_options, "results": result_options}

EPILOG = "Any option can also come from KVTOOL_<OPTION> or from --config; the command line goes first, then those."

app = typer.Typer(
    name="kvtool",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for function in COMMANDS:
    app.command(cls=Command, epilog=EPILOG)(shared(function, ALL_BUNDLES))


def show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print("kvtool", version("kvtool"))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=show_version, help="Print the version.")
    ] = False,
) -> None:
    """Serve language models from a KV cache in 8, 4 or 2 bits, and measure what it costs."""


def main() -> NoReturn:
    """Run the command line; a failure is one line on stderr and exit code 2."""
    # What torch warns of in C++ (a peer that DNS has no name for) is for those who ask; it reads this at its import.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        # Read here, because a command line that cannot be parsed has errors to show too.
        if "--debug" in sys.argv or os.environ.get("KVTOOL_DEBUG", "0") != "0":
            traceback.print_exc()
        print("error:", explain(error), file=sys.stderr)
        code = 2
    sys.exit(code)


def explain(error: Exception) -> str:
    """One line for the user."""
    if isinstance(error, typer.TyperException):  # a command line that cannot be parsed
        message = error.format_message().replace("Value error, ", "")
    elif isinstance(error, (KVToolError, OSError)):
        message = str(error)
    else:
        message = f"{type(error).__name__}: {error} (a bug in kvtool; --debug shows where)"
    return " ".join(message.split())
