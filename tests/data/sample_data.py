"""Where the sample text is, and files made from records."""

import json
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[2] / "experiments" / "sample" / "sample.jsonl"


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path
