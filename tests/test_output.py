"""What commands show: one report as a table, JSON, Markdown, CSV and as files."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import typer
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from commands.charts import Chart, Series, draw
from commands.options import Command, shared
from commands.output import Column, OutputOptions, Report, Table, as_text, check_output, show
from kvtool.errors import ConfigError

ROWS: list[dict[str, Any]] = [
    {"format": {"name": "4 | <bits>"}, "perplexity": 32.6128, "layers": [1, 2], "kld": {"mean": 1e-4}},
    {"format": {"name": "2"}, "perplexity": float("inf"), "layers": [], "kld": None},
]
REPORT = Report(
    command="probe",
    config={"model": "tiny", "limit": None},
    rows=ROWS,
    columns=[Column("format", "format.name"), Column("PPL", "perplexity", ".3f"), Column("KLD", "kld.mean", ".1e")],
    tables=[Table("once more", [Column("PPL", "perplexity", ".1f")], ROWS[:1])],
    charts=[
        Chart("lines", "bits", "PPL", [Series("a & b", [2, 4, 8], [3.0, None, 1.0])], log_x=True, log_y=True),
        Chart("bars", "format", "ms", [Series("x", ["4", "2"], [1, 2]), Series("y", ["4", "2"], [2, 3])], kind="bar"),
        Chart("points", "bits", "PPL", [Series("c", [4.5], [2.0])], kind="scatter"),
        Chart("times", "ms", "request", [Series("a", ["0", "1"], [1, 2]), Series("b", ["0", "1"], [3, 4])], "timeline"),
        Chart("map", "layer", "error", [Series("K4", ["0", "1"], [1e-3, 2e-2])], kind="heat", log_y=True),
    ],
    notes=["KLD in nats."],
)


def printed(capsys: pytest.CaptureFixture[str], report: Report = REPORT, **options: Any) -> str:
    show(report, OutputOptions(**options))
    return capsys.readouterr().out


def test_a_table_has_every_value_in_its_form(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys).splitlines()
    assert any(re.fullmatch(r"\s*4 \| <bits>\s+32\.613\s+1\.0e-04", line) for line in lines)
    assert any(re.fullmatch(r"\s*2\s+n/a\s+n/a", line) for line in lines)
    assert "once more" in lines
    assert lines[-1] == "KLD in nats."


def test_a_long_line_is_not_cut_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    name = "x" * 500
    assert name in printed(capsys, replace(REPORT, rows=[{"format": {"name": name}}], notes=[name]))


def test_json_is_one_strict_document(capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(printed(capsys, json=True), parse_constant=pytest.fail)
    assert list(document) == ["schema", "environment", "config", "rows"]
    assert document["schema"] == "kvtool.probe/1"
    assert document["config"] == REPORT.config
    assert document["rows"] == [ROWS[0], ROWS[1] | {"perplexity": None}]
    assert {"kvtool", "torch", "python", "platform", "cpu", "gpus"} <= document["environment"].keys()


def test_csv_has_all_fields_of_all_rows(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = csv.DictReader(io.StringIO(printed(capsys, csv=True)))
    assert first == {
        "format.name": "4 | <bits>",
        "perplexity": "32.6128",
        "layers": "[1, 2]",
        "kld.mean": "0.0001",
        "kld": "",
    }
    assert second["perplexity"] == second["kld"] == ""


def test_markdown_keeps_its_columns(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, markdown=True).splitlines()
    assert lines[:4] == [
        "| format | PPL | KLD |",
        "| --- | --: | --: |",
        r"| 4 \| <bits> | 32.613 | 1.0e-04 |",
        "| 2 | n/a | n/a |",
    ]
    assert "**once more**" in lines


def test_files_follow_their_suffix(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    contents = {}
    for suffix in ("json", "jsonl", "csv", "md", "html", "png"):
        file = tmp_path / f"result.{suffix}"
        assert "32.613" in printed(capsys, output=str(file)), "the table is printed as well"
        contents[suffix] = file.read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted(f"result.{suffix}" for suffix in contents)
    assert json.loads(contents["json"])["rows"][0] == ROWS[0]
    assert [json.loads(line)["perplexity"] for line in contents["jsonl"].splitlines()] == [32.6128, None]
    assert contents["csv"].decode() == printed(capsys, csv=True)
    assert contents["md"].decode() == printed(capsys, markdown=True)
    assert contents["png"].startswith(b"\x89PNG")


def test_html_needs_nothing_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "result.html"
    printed(capsys, output=str(file))
    page = file.read_text()
    assert "4 | &lt;bits&gt;" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page)
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(charts) == 5
    for chart in charts:
        ElementTree.fromstring(chart)


def test_a_chart_file_needs_a_chart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no chart"):
        show(replace(REPORT, charts=[]), OutputOptions(output=str(tmp_path / "result.png")))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "said"),
    [("result.xlsx", r"\.html"), ("result", r"\.html"), ("no/such/result.json", "folder"), ("folder.json", "written")],
)
def test_a_target_is_refused_before_the_run(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ConfigError, match=f"^--output .*{said}"):
        check_output(OutputOptions(output=str(tmp_path / name)))


def test_a_file_system_that_takes_no_file_is_refused_also_for_root() -> None:
    with pytest.raises(ConfigError, match=r"^--output /proc/self/result\.json: cannot be written: "):
        check_output(OutputOptions(output="/proc/self/result.json"))


def test_stdout_takes_one_format() -> None:
    with pytest.raises(ConfigError, match="--json"):
        check_output(OutputOptions(json=True, csv=True))


def test_a_command_that_takes_output_gets_its_options(tmp_path: Path) -> None:
    given: list[OutputOptions] = []

    def probe(output: OutputOptions) -> None:
        given.append(output)

    probing = typer.Typer()
    probing.command(cls=Command)(shared(probe))
    file = str(tmp_path / "result.json")
    probing(["--markdown", "--output", file], standalone_mode=False)
    assert given == [OutputOptions(markdown=True, output=file)]
    with pytest.raises(ConfigError):
        probing(["--output", "result.xlsx"], standalone_mode=False)


def test_a_reader_that_leaves_is_no_error() -> None:
    code = "from commands.output import put\nfor _ in range(100): put('x' * 10_000)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


def test_many_lines_over_logarithmic_axes_can_be_read() -> None:
    figure = Figure()
    ax = figure.subplots()
    lines = [Series(f"line {i}", [4000, 30000], [1.0, 60.0 + i]) for i in range(12)]
    draw(Chart("", "tokens", "ms", lines, log_x=True, log_y=True), figure, ax)
    figure.draw_without_rendering()
    numbers = {text.get_text() for axis in (ax.xaxis, ax.yaxis) for text in axis.get_ticklabels(which="both")}
    assert {"10", "20,000"} <= numbers
    assert not any("e+" in number or "$" in number for number in numbers)
    assert len({to_hex(line.get_color()) for line in ax.get_lines()}) == len(lines)
    assert ax.get_legend().get_window_extent().x0 >= ax.get_window_extent().x1  # beside them, not on them


def test_names_below_bars_do_not_run_into_each_other() -> None:
    figure = Figure()
    ax = figure.subplots()
    names = [f"a model with a long name, {i}" for i in range(9)]
    draw(Chart("", "", "bytes", [Series("MHA", names, [1.0] * 9)], kind="bar"), figure, ax)
    assert {label.get_rotation() for label in ax.get_xticklabels()} == {45.0}


@given(st.integers(44, 200), st.integers(1, 14))
def test_no_figure_is_broken_however_narrow_the_terminal_is(width: int, num_columns: int) -> None:
    """What does not fit beside the rest stands below it, behind the first column, and nothing is lost."""
    columns = [Column("model", "model"), *(Column(f"figure number {i}", f"x{i}", ",.1f") for i in range(num_columns))]
    rows = [{"model": f"Model-{row}", **{f"x{i}": 1000.0 * row + i for i in range(num_columns)}} for row in (1, 2)]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("COLUMNS", str(width))
        lines = as_text(Report("x", {}, rows, columns)).splitlines()
    assert max(map(len, lines)) <= width
    for row in (1, 2):
        found = [word for line in lines if f"Model-{row}" in line for word in line.split()]
        assert [word for word in found if word != f"Model-{row}"] == [f"{row},{i:03}.0" for i in range(num_columns)]
        assert found[0] == f"Model-{row}"
