"""The house rules that an import can break, read from the syntax trees."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

# A part of kvtool, module or package, may import from its own row and from those below.
ROWS = [
    {"bench"},
    {"disagg"},
    {"server"},
    {"engine_process"},
    {"quantize", "expert_parallel", "sizing"},
    {"perplexity", "protocols"},
    {"client", "engine", "follower"},
    {"handoff"},
    {"scheduler"},
    {"drafting", "prefixes", "sequence_memory", "request_checks"},
    {"sequence"},
    {"scoring"},
    {"ranks"},
    {"runner"},
    {"draft_model"},
    {"memory", "profiling", "calibration", "cuda_graph", "token_scores", "device", "chosen_model", "paged_model"},
    {"sampler", "grammar", "tokenizer", "chat_template"},
    {"speculation"},
    {"models"},
    {"layers"},
    {"attention"},
    {"kv"},
    {"kernels"},
    {"parallel", "p2p"},
    {"processes"},
    {"request", "config", "errors", "gpus", "ranges"},
]
ROW = {part: row for row, parts in enumerate(ROWS) for part in parts}
STAND_ALONE = {"kv", "attention", "kernels"}  # other engines can use these
KNOW_NO_TORCH = ["kvtool.scheduler", "kvtool.speculation", "kvtool.request", "kvtool.kv.blocks", "kvtool.kv.format"]

SOURCES = {path.relative_to(REPOSITORY): path.read_text() for path in sorted((REPOSITORY / "kvtool").rglob("*.py"))}
COMMANDS = {path.relative_to(REPOSITORY): path.read_text() for path in sorted((REPOSITORY / "commands").rglob("*.py"))}


def imports(source: str, *, at_once: bool = False) -> set[str]:
    """Dotted names that a file imports; `at_once`: leaving out those that a function imports when it runs."""

    def walk(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            later |= isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if not (at_once and later):
                yield from walk(child)

    return set(walk(ast.parse(source)))


def part(path: Path) -> str:
    """`kv` of kvtool/kv/store.py, `engine` of kvtool/engine.py."""
    return path.with_suffix("").parts[1]


def parts_imported(source: str) -> set[str]:
    return {name.split(".")[1] for name in imports(source) if name.startswith("kvtool.")}


def test_every_part_has_a_row() -> None:
    assert {part(path) for path in SOURCES} <= ROW.keys() | {"__init__"}


def test_imports_go_down() -> None:
    up = {
        str(path): above
        for path, source in SOURCES.items()
        if (above := {name for name in parts_imported(source) if ROW[name] < ROW.get(part(path), len(ROWS))})
    }
    assert up == {}


def test_no_cycles() -> None:
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    needs = {}
    for name, path in names.items():
        imported = [f"{i}." for i in imports(SOURCES[path])]
        needs[name] = {m for m in names if m != name and any(i.startswith(f"{m}.") for i in imported)}
    packages = {name for name, path in names.items() if path.stem == "__init__"}
    while free := {name for name, needed in needs.items() if not needed & needs.keys() - packages}:
        needs = {name: needed for name, needed in needs.items() if name not in free}
    assert needs == {}


def test_the_store_and_its_kernels_need_no_engine() -> None:
    alone = STAND_ALONE | {"config", "errors", "ranges"}
    more = {str(path): parts_imported(s) - alone for path, s in SOURCES.items() if part(path) in STAND_ALONE}
    assert not any(more.values()), more


def test_what_holds_integers_knows_no_torch() -> None:
    code = f"import sys, {', '.join(KNOW_NO_TORCH)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_commands_import_the_engine_only_when_they_run() -> None:
    light = ("kvtool.config.", "kvtool.errors.")
    for path, source in COMMANDS.items():
        heavy = {name for name in imports(source, at_once=True) if name.startswith("kvtool.")}
        assert all(name.startswith(light) for name in heavy), path


def test_nothing_imports_the_commands() -> None:
    for path, source in (SOURCES | COMMANDS).items():
        assert not any(f"{name}.".startswith(("kvtool.commands.", "commands.")) for name in imports(source)), path


def test_the_wheel_lists_every_package() -> None:
    listed = re.search(r"^packages = (\[.*?\])", (REPOSITORY / "pyproject.toml").read_text(), re.S | re.M)
    assert listed is not None
    on_disk = {".".join(path.parent.parts) for path in SOURCES if path.stem == "__init__"}
    assert ast.literal_eval(listed[1]) == sorted(on_disk | {"kvtool.commands"})


def test_the_wheel_holds_what_is_no_python() -> None:
    listed = re.search(r"^kvtool = (\[.*?\])", (REPOSITORY / "pyproject.toml").read_text(), re.S | re.M)
    assert listed is not None
    root = REPOSITORY / "kvtool"
    held = {path for glob in ast.literal_eval(listed[1]) for path in root.glob(glob) if path.is_file()}
    assert held == {path for path in root.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
