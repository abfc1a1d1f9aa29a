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
                axes.plot(*zip(*points, strict=True), marker=".", label=LABELS[line["engine"]])
        axes.axvline(0.95, color="0.7", linewidth=1)
        axes.set(
            title=f"{size:,} chunks", xlabel="recall@2", ylabel="queries a second", yscale="log", xlim=(0.8, 1.003)
        )
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def plot_growth(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """Writes a picture of the time of a query, at the recall that the lines were compared at, over vectors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for engine, label in LABELS.items():
        found = {line["vectors"]: line["best"] for line in lines if line["engine"] == engine and line["best"]}
        if found:
            sizes = sorted(found)
            axes.plot(sizes, [1e6 / found[size]["queries_per_second"] for size in sizes], marker=".", label=label)
    axes.set(xscale="log", yscale="log", xlabel="chunks", ylabel="microseconds a query, one core")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def frontier(points: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(recall, queries a second) of the points that no other one beats in both, by recall."""
    pairs = sorted(((point["recall"], point["queries_per_second"]) for point in points), reverse=True)
    kept: list[tuple[float, float]] = []
    for recall, rate in pairs:
        if not kept or rate > kept[-1][1]:
            kept.append((recall, rate))
    return kept[::-1]
