"""The command line: help, where options come from, and failures in one line."""

import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import REPOSITORY, kvtool

from commands import COMMANDS, app
from commands.options import Command, memory_size, shared
from kvtool.config import EngineConfig, KVOptions
from kvtool.errors import ConfigError


def run(*arguments: str) -> tuple[int, str, str]:
    process = kvtool(*arguments)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def parse(*arguments: str) -> EngineConfig:
    """What a command that takes the engine's options is given."""
    given: list[EngineConfig] = []

    def probe(engine: EngineConfig) -> None:
        given.append(engine)

    probing = typer.Typer()
    probing.command(cls=Command)(shared(probe))
    probing(list(arguments), standalone_mode=False)
    return given[0]


def test_help_is_instant() -> None:
    def seconds() -> float:
        """Of the processor, so that what else runs on the machine does not count."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run("--help")[0] == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_help_imports_no_torch() -> None:
    code = "import sys, commands\ntry: commands.main()\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    for arguments in (["--help"], ["serve", "--help"]):
        command = [sys.executable, "-c", code, *arguments]
        assert subprocess.run(command, cwd=REPOSITORY, capture_output=True).returncode == 0


def test_every_option_and_command_says_what_it_is_for() -> None:
    group = typer.main.get_command(app)
    for command in [group, *group.commands.values()]:  # type: ignore[attr-defined]
        assert command.help
        for option in command.params:
            assert option.help, f"{command.name}: {option.opts}"
    assert all("Example: kvtool " in (function.__doc__ or "") for function in COMMANDS)


def test_a_narrow_terminal_cuts_no_name_in_the_help() -> None:
    process = kvtool("serve", "--help", env=os.environ | {"COLUMNS": "80"})
    stdout, _ = process.communicate(timeout=60)
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    words = set(stdout.replace(",", "").split())
    for option in command.params:
        assert words.issuperset([*option.opts, *option.secondary_opts])
    for heading in ("Model:", "KV cache:", "Engine:", "Server:", "Options:"):
        assert f"\n{heading}\n" in stdout


def test_without_arguments_there_is_help() -> None:
    status, stdout, _ = run()
    assert status == 0
    assert "serve" in stdout


def test_version() -> None:
    assert run("--version")[:2] == (0, "kvtool 0.1.0\n")


def test_what_is_not_given_is_the_engine_s_default() -> None:
    assert parse() == EngineConfig()


def test_the_command_line_goes_before_the_environment_before_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "kvtool.yaml"
    file.write_text("nbits: 8\nmax_num_seqs: 3\nq-group-size: 32\nkv-cache-memory: 2GiB\nmodel-path: here\n")
    monkeypatch.setenv("KVTOOL_CONFIG", str(file))
    monkeypatch.setenv("KVTOOL_NBITS", "4")
    monkeypatch.setenv("KVTOOL_MAX_NUM_SEQS", "5")
    assert parse("--nbits", "2") == EngineConfig(
        model="here",
        max_num_seqs=5,
        kv_cache_memory=2 * 2**30,
        kv=KVOptions(nbits="2", q_group_size=32),
    )


def test_a_file_knows_flags_by_both_their_names(tmp_path: Path) -> None:
    file = tmp_path / "kvtool.yaml"
    file.write_text("asym: true\nrotate: true\n")
    assert parse("--config", str(file)).kv == KVOptions(symmetric=False, rotate=True)
    assert parse("--config", str(file), "--sym", "--no-rotate").kv == KVOptions(symmetric=True, rotate=False)


def test_names_from_sglang_and_kvtuner_are_known() -> None:
    given = parse(
        *("--model-path", "x", "--chunked-prefill-size=256", "--enable-kvtuner-quant"),
        *(
            "--kvtuner-nbits-key",
            "4",
            "--kvtuner-nbits-value=2",
            "--kvtuner-axis-key",
            "1",
            "--kvtuner-axis-value",
            "0",
        ),
    )
    kv = KVOptions(nbits_key="4", nbits_value="2", axis_key="channel", axis_value="token")
    assert given == EngineConfig(model="x", max_num_batched_tokens=256, kv=kv)
    assert parse("--enable-kvtuner-quant").kv == KVOptions(nbits="4")


def test_kvtuner_s_switch_leaves_bits_that_are_given_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "kvtool.yaml"
    file.write_text("nbits-key: 8\n")
    assert parse("--enable-kvtuner-quant", "--nbits", "2").kv == KVOptions(nbits="2")
    assert parse("--enable-kvtuner-quant", "--config", str(file)).kv == KVOptions(nbits_key="8")
    monkeypatch.setenv("KVTOOL_KV_PLAN", "plan.yaml")
    assert parse("--enable-kvtuner-quant").kv == KVOptions(plan="plan.yaml")


def test_aliases_stay_out_of_the_help() -> None:
    _, stdout, _ = run("serve", "--help")
    assert "--nbits-key" in stdout
    assert "kvtuner-nbits" not in stdout
    assert "--model-path" not in stdout


def test_sizes() -> None:
    assert [memory_size(text) for text in ("6GiB", "1.5 GB", "64mib", "1000", "6G", "500m", "64K")] == [
        6 * 2**30,
        1_500_000_000,
        2**26,
        1000,
        6 * 2**30,
        500 * 2**20,
        2**16,
    ]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", 2**63),
        ("--max-num-seqs", 65_537),
        ("--max-num-batched-tokens", 2**31),
        ("--max-model-len", 2**31),
        ("--residual-length", 2**20 + 1),
        ("--kv-cache-memory", 2**63),
        ("--kv-cache-memory", "9" * 500 + "G"),
    ],
)
def test_numbers_have_an_end(option: str, value: object) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        parse(option, str(value))
    assert option in caught.value.format_message()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bla"], "bla"),
        (["serve", "--nbit", "4"], "--nbits"),
        (["serve", "--nbits", "3"], "'16', '8', '4', '2', 'fp8'"),
        (["serve", "--port", "70000"], "--port"),
        (["serve", "--api-key", "two words"], "--api-key"),
        (["serve", "--api-key", ""], "--api-key"),
        (["serve", "--api-key", "schlüssel"], "ASCII"),
        (["serve", "--max-queue", "0"], "--max-queue"),
        (["serve", "--max-queued-requests", "-1"], "--max-queue"),
        (["serve", "--shutdown-timeout", "-1"], "--shutdown-timeout"),
        (["serve", "--kv-cache-memory", "much"], "6GiB"),
        (["serve", "--kv-cache-memory", "-1GiB"], "--kv-cache-memory"),
        (["serve", "--axis-key", "row"], "channel"),
        (["serve", "--host", "no.such.host.invalid"], "--host"),
        (["serve", "--config", "/does/not/exist.yaml"], "--config /does/not/exist.yaml"),
        (["serve", "--config", "pyproject.toml"], "--config pyproject.toml"),
        (["serve", "--port", "0", "--model", ""], "--model"),
        (["serve", "--port", "0", "--model", "/does/not/exist"], "/does/not/exist"),
        (["serve", "--port", "0", "--kv-cache-memory", "1000"], "cache"),
        (["serve", "--port", "0", "--nbits", "4", "--axis-key", "channel", "--rotate"], "rotat"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], said: str) -> None:
    status, stdout, stderr = run(*arguments)
    assert (status, stdout) == (2, "")
    *progress, error = stderr.strip().splitlines()
    assert error.startswith("error: ")
    assert said in error
    assert all(line.startswith("loading ") for line in progress)


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "seed: " + "1" * 5000, "model: \xff"], ids=["deep", "long", "bytes"]
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "kvtool.yaml"
    file.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"--config .*kvtool.yaml: cannot be read: [^\n]*\Z"):
        parse("--config", str(file))


def test_an_option_that_a_file_misspells_is_named(tmp_path: Path) -> None:
    file = tmp_path / "kvtool.yaml"
    file.write_text("nbit: 4\n")
    status, _, stderr = run("serve", "--config", str(file))
    assert status == 2
    assert "nbit is no option of `serve`" in stderr


def test_a_port_in_use_shows_before_a_model_is_loaded() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, stderr = run("serve", "--port", str(port))
    assert (status, stderr) == (2, f"error: port {port} on 127.0.0.1 is in use; choose another with --port\n")


def test_debug_shows_where() -> None:
    assert "Traceback" in run("serve", "--config", "/does/not/exist.yaml", "--debug")[2]
