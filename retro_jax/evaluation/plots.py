"""Plots of evaluations, as SVG that stands alone, or PNG."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# Blue and orange of Okabe and Ito, which colour-blind people tell apart; the rest for further runs.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#555555")
_MARKERS = "osD^vP*X"

Points = Sequence[tuple[float, float]]
# A value with the ends of its interval.
Interval = tuple[float, float, float]


def new_axes(height: float = 3.4) -> tuple[plt.Figure, plt.Axes]:
    """A figure as wide as a page's text, and its axes, without a box around them."""
    figure, axes = plt.subplots(figsize=(7.2, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def line_plot(lines: Mapping[str, Points], **axes: Any) -> str:
    """`line_figure` as SVG."""
    return svg(line_figure(lines, **axes))


def line_figure(
    lines: Mapping[str, Points], *, x: str, y: str = "bits per byte", log_x: bool = False, percent_x: bool = False
) -> plt.Figure:
    """Lines of (x, y) points by name, each with its own colour and marker.

    Args:
      lines: points that are not finite are left out.
      x, y: names of the axes.
      log_x: logarithmic axis, with a mark at each point.
      percent_x: x is a share, written in per cent.
    """
    figure, axes = new_axes()
    for number, (name, points) in enumerate(lines.items()):
        shown = [point for point in points if all(map(math.isfinite, point))]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
        axes.plot(*zip(*shown, strict=True), label=name, linewidth=1.6, markersize=5, **style)
    if log_x:
        axes.set_xscale("log")
        marks = sorted({value for points in lines.values() for value, _ in points})
        axes.set_xticks(marks, [_written(mark, percent_x) for mark in marks])
        axes.minorticks_off()
    elif percent_x:
        axes.xaxis.set_major_formatter(lambda value, _: _written(value, True))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    return figure


def interval_plot(rows: Sequence[tuple[str, Mapping[str, Interval]]], *, x: str) -> str:
    """Values with intervals, one line a row, beside zero; several series of one row stand below each other.

    Args:
      rows: (name of the row, series to interval).
      x: name of the axis.
    """
    series = list(dict.fromkeys(name for _, values in rows for name in values))
    figure, axes = new_axes(0.9 + (0.16 * len(series) + 0.22) * len(rows))
    axes.axvline(0, color="#888888", linewidth=0.9)
    for number, name in enumerate(series):
        places, middles, below, above = [], [], [], []
        for place, (_, values) in enumerate(rows):
            if name in values and all(map(math.isfinite, values[name])):
                value, low, high = values[name]
                places.append(place + (number - (len(series) - 1) / 2) * 0.7 / max(len(series), 1))
                middles.append(value)
                below.append(max(value - low, 0))
                above.append(max(high - value, 0))
        axes.errorbar(
            middles,
            places,
            xerr=[below, above],
            fmt=_MARKERS[number % len(_MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            label=name,
            markersize=4.5,
            linewidth=1.4,
            capsize=2.5,
        )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(x)
    axes.grid(axis="x", alpha=0.25)
    if len(series) > 1:
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    return svg(figure)


def svg(figure: plt.Figure) -> str:
    """The figure as an SVG element, the same text every time; the figure is closed."""
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "retro_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png(figure: plt.Figure) -> bytes:
    """The figure as a PNG file; the figure is closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _written(value: float, percent: bool) -> str:
    return f"{100 * value:.3g} %" if percent else f"{value:,g}"
