"""The table of an evaluation, for a terminal."""

from typing import Any

HEADER = ("run", "step", "mode", "k", "bits/byte", "against the first", "nats/token", "documents", "bytes")
LEFT_ALIGNED = ("run", "mode")


def rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row a result and, where documents are grouped, one a group below it."""
    first = results[0]["bits_per_byte"]
    table = []
    for result in results:
        table.append(_row(result["run"], str(result["step"]), result["mode"], str(result["k"] or "-"), result, first))
        if len(result["groups"]) > 1:
            for name, score in result["groups"].items():
                base = results[0]["groups"].get(name, {}).get("bits_per_byte", float("nan"))
                table.append(_row(f"  {name}", "", "", "", score, base))
    return table


def format_table(results: list[dict[str, Any]]) -> str:
    """The rows under their header, in aligned columns."""
    lines = [HEADER, *rows(results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    text = [
        "  ".join(
            cell.ljust(width) if column in LEFT_ALIGNED else cell.rjust(width)
            for column, cell, width in zip(HEADER, line, widths, strict=True)
        )
        for line in lines
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def _row(run: str, step: str, mode: str, k: str, score: dict[str, Any], first: float) -> tuple[str, ...]:
    change = 100 * (score["bits_per_byte"] / first - 1)
    return (
        run,
        step,
        mode,
        k,
        f"{score['bits_per_byte']:.4f}",
        f"{change:+.1f} %",
        f"{score['nats_per_token']:.4f}",
        f"{score['documents']:,}",
        f"{score['bytes']:,}",
    )
