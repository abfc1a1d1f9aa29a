"""Plots from the lines of the benchmark of search: recall against speed, and the cost of a query as databases grow."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

LABELS = {
    "retro_jax": "retro_jax (ScaNN)",
    "faiss_fast_scan": "FAISS IVF, 4-bit fast scan, refined",
    "faiss_fast_scan_fine": "the same, twice the lists",
    "faiss_flat_lists": "FAISS IVF-Flat",
    "faiss_hnsw": "FAISS HNSW",
    "faiss_exact": "FAISS exact",
    "hnswlib": "hnswlib",
}


def plot_recall(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a picture with a panel for each number of vectors; only the points that none surpasses are joined."""
    from matplotlib.figure import Figure

    sizes = sorted({line["vectors"] for line in lines})
    figure = Figure(figsize=(5.5 * len(sizes), 4), layout="constrained")
    for place, size in enumerate(sizes):
        axes = figure.add_subplot(1, len(sizes), place + 1)
        for line in lines:
            if line["vectors"] == size and line["engine"] in LABELS:
                points = frontier(line["points"])
                axes.plot(*zip(*points, strict=True), **_style(line["engine"]))
        axes.axvline(0.95, color="0.7", linewidth=1)
        axes.set(
            title=f"{size:,} chunks", xlabel="recall@2", ylabel="queries a second", yscale="log", xlim=(0.8, 1.003)
        )
        _finish(axes)
    figure.savefig(path, dpi=120)


def plot_growth(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a picture of the time of a query, at the recall that the lines were compared at, over vectors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for engine in LABELS:
        found = {line["vectors"]: line["best"] for line in lines if line["engine"] == engine and line["best"]}
        if found:
            sizes = sorted(found)
            axes.plot(sizes, [1e6 / found[size]["queries_per_second"] for size in sizes], **_style(engine))
    (goal,) = {line["recall_goal"] for line in lines}
    title = f"at a recall@2 of {goal} and more"
    axes.set(xscale="log", yscale="log", xlabel="chunks", ylabel="microseconds a query, one core", title=title)
    made = [line["vectors"] for line in lines if line["synthetic_vectors"]]
    if made:
        real = max((line["vectors"] for line in lines if not line["synthetic_vectors"]), default=min(made))
        axes.axvspan(real, max(made) * 1.2, color="0.93", label="partly made-up vectors")
    _finish(axes)
    figure.savefig(path, dpi=120)


def _style(engine: str) -> dict[str, Any]:
    return {"marker": ".", "color": f"C{list(LABELS).index(engine)}", "label": LABELS[engine]}


def _finish(axes: Any) -> None:
    """Whole numbers at the ticks, 1, 2 and 5 of each power of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    scaled = [
        axis for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())) if scale == "log"
    ]
    for axis in scaled:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def frontier(points: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(recall, queries a second) of the points that no other one beats in both, by recall."""
    pairs = sorted(((point["recall"], point["queries_per_second"]) for point in points), reverse=True)
    kept: list[tuple[float, float]] = []
    for recall, rate in pairs:
        if not kept or rate > kept[-1][1]:
            kept.append((recall, rate))
    return kept[::-1]
