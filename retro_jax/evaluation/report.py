"""One HTML page of a run: what was measured, loss curves, the bits-per-byte tables, a sample with its neighbours.

The page is a single file without scripts; plots are inline SVG, so it can be mailed and opened anywhere. It may link to
the explorer's page beside it.
"""

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from retro_jax.evaluation.table import HEADER, LEFT_ALIGNED, rows

# The page around the content, beside this file.
_PAGE = Path(__file__).with_suffix(".html")
# Blue and orange of Okabe and Ito, which colour-blind people tell apart; the rest for further runs.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def loss_plot(curves: dict[str, list[dict[str, float]]]) -> str:
    """Training loss against step as SVG.

    Args:
      curves: name of the run to its metric lines, each with `step` and `loss` (nats per token).
    """
    figure, axes = plt.subplots(figsize=(7.2, 3.4), layout="constrained")
    for (name, lines), colour in zip(curves.items(), COLOURS, strict=False):
        steps = [line["step"] for line in lines]
        losses = [line["loss"] for line in lines]
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, _smooth(losses), color=colour, linewidth=1.8, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss, nats per token")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def bits_per_byte_plot(results: Sequence[dict[str, Any]]) -> str:
    """Bits per byte of each result as horizontal bars, as SVG."""
    names = [_name(result) for result in results]
    values = [result["bits_per_byte"] for result in results]
    figure, axes = plt.subplots(figsize=(7.2, 0.5 * len(results) + 0.8), layout="constrained")
    colours = [COLOURS[1] if result["mode"] == "on" else COLOURS[0] for result in results]
    bars = axes.barh(range(len(values)), values, color=colours, height=0.62)
    axes.bar_label(bars, [f"{value:.3f}" for value in values], padding=4)
    axes.set_yticks(range(len(values)), names)
    axes.invert_yaxis()
    axes.set_xlabel("bits per byte (lower is better)")
    axes.set_xlim(0, max(values) * 1.15)
    axes.spines[["top", "right"]].set_visible(False)
    return _svg(figure)


def render(
    *,
    title: str,
    introduction: str,
    facts: Sequence[tuple[str, str]],
    curves: dict[str, list[dict[str, float]]],
    evaluations: Sequence[tuple[str, str, Sequence[dict[str, Any]]]],
    samples: Sequence[dict[str, Any]],
    stages: Sequence[tuple[str, float]],
    explorer: tuple[str, str] | None = None,
) -> str:
    """The page as HTML.

    Args:
      title, introduction: plain text.
      facts: (name, value) pairs shown on top.
      curves: as in `loss_plot`.
      evaluations: (heading, explanation, results of launch/evaluate.py).
      samples: outputs of launch/sample.py.
      stages: (stage, seconds), in order.
      explorer: (relative address, explanation) of the page of launch/explore.py.
    """
    parts = [
        f"<h1>{_text(title)}</h1><p class=lead>{_text(introduction)}</p>",
        "<dl>" + "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts) + "</dl>",
        "<h2>Bits per byte</h2>",
        "<p>What a text costs the model, over whole documents, each byte counted once. OFF is the RETRO without "
        "retrieval; shuffled gives each chunk another document's neighbours: were it as good as ON, retrieval "
        "would not be used.</p>",
    ]
    for heading, explanation, results in evaluations:
        parts.append(f"<h3>{_text(heading)}</h3><p>{_text(explanation)}</p>")
        parts.append(f"<figure>{bits_per_byte_plot(results)}</figure>{_results_table(results)}")
    parts.append(f"<h2>Training</h2><figure>{loss_plot(curves)}</figure>")
    parts.append("<h2>A sample, and what it read</h2>")
    parts += [_sample(sample) for sample in samples]
    if explorer:
        address, explanation = explorer
        parts.append(f"<p><a href='{_text(address)}'>{_text(explanation)}</a></p>")
    parts.append("<h2>Stages</h2>" + _stages_table(stages))
    return _PAGE.read_text(encoding="utf-8").replace("$TITLE", _text(title)).replace("$BODY", "\n".join(parts))


def _results_table(results: Sequence[dict[str, Any]]) -> str:
    def cells(tag: str, line: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{'' if name in LEFT_ALIGNED else ' class=number'}>{_text(cell)}</{tag}>"
            for name, cell in zip(HEADER, line, strict=True)
        )

    body = "".join(f"<tr>{cells('td', line)}</tr>" for line in rows(list(results)))
    return f"<div class=scroll><table><thead><tr>{cells('th', HEADER)}</tr></thead><tbody>{body}</tbody></table></div>"


def _stages_table(stages: Sequence[tuple[str, float]]) -> str:
    body = "".join(f"<tr><td>{_text(name)}</td><td class=number>{seconds:.1f}</td></tr>" for name, seconds in stages)
    head = "<tr><th>stage</th><th class=number>seconds</th></tr>"
    return f"<div class=scroll><table><thead>{head}</thead><tbody>{body}</tbody></table></div>"


def _sample(sample: dict[str, Any]) -> str:
    retrieval = "RETRO[ON]" if sample["retrieval"] else "RETRO[OFF]"
    parts = [
        f"<h3>{retrieval}</h3>",
        f"<blockquote><span class=prompt>{_text(sample['prompt'])}</span>{_text(sample['continuation'])}</blockquote>",
    ]
    chunk = None
    for entry in sample["neighbours"]:
        if entry["chunk"] != chunk:
            chunk = entry["chunk"]
            parts.append(f"<h4>Neighbours of chunk {chunk}</h4>")
        parts.append(
            f"<article><p class=source>{entry['rank']}. {_text(entry['title'] or entry['document'])} "
            f"<span>{_text(entry['document'])} · distance {entry['distance']:.4f}</span></p>"
            f"<p>{_text(entry['neighbour'])}<span class=continuation>{_text(entry['continuation'])}</span></p>"
            "</article>"
        )
    return "\n".join(parts)


def _name(result: dict[str, Any]) -> str:
    if result["mode"] == "baseline":
        return "baseline"
    return f"RETRO {result['mode'].upper() if result['mode'] in ('on', 'off') else result['mode']}"


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    average, smoothed = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def _svg(figure: plt.Figure) -> str:
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "retro_jax"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def _text(value: object) -> str:
    return html.escape(str(value))
