"""Charts as SVG and PNG, by matplotlib, which is imported where one is drawn."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

SIZE = (7, 4.5)  # inches
MOST_WITHIN = 10  # lines whose names stand inside a chart, not beside it
MOST_CHARACTERS = 90  # of names below bars, in one line


@dataclass(frozen=True)
class Series:
    """Points of a chart, in order; in a heat map one row of cells. `x` are numbers or names, None in `y` is a gap."""

    label: str
    x: Sequence[float] | Sequence[str]
    y: Sequence[float | None]


@dataclass(frozen=True)
class Chart:
    """A chart; `x` and `y` name its axes. In a heat map `y` names the colours and `log_y` makes them logarithmic. In a
    timeline series follow each other from left to right in the rows that their `x` names, each `y` long."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    kind: Literal["line", "bar", "scatter", "heat", "timeline"] = "line"
    log_x: bool = False
    log_y: bool = False


def svg(chart: Chart) -> str:
    """An element for a page."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    draw(chart, figure, figure.subplots())
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return content.getvalue()[content.getvalue().index("<svg") :]


def png(charts: Sequence[Chart]) -> bytes:
    """All of them below each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0], SIZE[1] * len(charts)), layout="constrained")
    axes = figure.subplots(len(charts), squeeze=False)[:, 0]
    for chart, ax in zip(charts, axes, strict=True):
        draw(chart, figure, ax)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()


def draw(chart: Chart, figure: "Figure", ax: "Axes") -> None:
    """Draw `chart` into `ax`, a part of `figure`."""
    import matplotlib

    ax.set_title(chart.title)
    ax.set_xlabel(chart.x)
    if chart.kind == "heat":
        _draw_heat(chart, figure, ax)
        return
    ax.set_ylabel(chart.y)
    if len(chart.series) > MOST_WITHIN:
        ax.set_prop_cycle(color=matplotlib.colormaps["tab20"](range(20)))
    named = chart.kind == "scatter" and all(len(series.y) == 1 for series in chart.series)  # each point by its name
    for index, series in enumerate(chart.series):
        y = [math.nan if value is None else value for value in series.y]
        if chart.kind == "bar":
            width = 0.8 / len(chart.series)
            ax.bar(
                [i + (index - (len(chart.series) - 1) / 2) * width for i in range(len(y))], y, width, label=series.label
            )
            _name_bars(ax, list(map(str, series.x)))
        elif chart.kind == "scatter":
            ax.scatter(series.x, y, label=series.label)
            if named and math.isfinite(y[0]):
                ax.annotate(f" {series.label}", (series.x[0], y[0]), va="bottom", fontsize="small")
        elif chart.kind == "timeline":
            before = [sum(other.y[row] or 0 for other in chart.series[:index]) for row in range(len(y))]
            ax.barh(list(map(str, series.x)), y, left=before, label=series.label)
        else:
            ax.plot(series.x, y, marker="o", label=series.label)
    if chart.kind == "timeline":
        ax.invert_yaxis()  # the first above
    if chart.log_x:
        ax.set_xscale("log")
        _plain_numbers(ax.xaxis)
    if chart.log_y:
        ax.set_yscale("log")
        _plain_numbers(ax.yaxis)
    ax.grid(alpha=0.3)
    if not named and any(series.label for series in chart.series):
        if len(chart.series) <= MOST_WITHIN and (chart.kind != "bar" or len(chart.series[0].x) <= MOST_WITHIN):
            ax.legend(fontsize="small")
        else:
            ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def _name_bars(ax: "Axes", names: Sequence[str]) -> None:
    """Side by side, or aslant where they would run into each other."""
    longest = max(len(line) for name in names for line in name.split("\n"))
    ax.set_xticks(range(len(names)), names)
    if longest * len(names) > MOST_CHARACTERS:
        ax.tick_params("x", rotation=45)
        for label in ax.get_xticklabels():
            label.set(horizontalalignment="right", rotation_mode="anchor", fontsize="small")


def _plain_numbers(axis: "Axis") -> None:
    """60 and 20,000 beside a logarithmic axis, not 6 × 10¹ and 2e+04."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,.10g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def _draw_heat(chart: Chart, figure: "Figure", ax: "Axes") -> None:
    from matplotlib.colors import LogNorm

    cells = [[math.nan if value is None else value for value in series.y] for series in chart.series]
    image = ax.imshow(cells, aspect="auto", cmap="viridis", norm=LogNorm() if chart.log_y else None)
    ax.set_xticks(range(len(chart.series[0].x)), list(map(str, chart.series[0].x)), rotation=90)
    ax.set_yticks(range(len(chart.series)), [series.label for series in chart.series])
    figure.colorbar(image, label=chart.y)
