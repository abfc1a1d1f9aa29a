"""launch/demo.py from text to report, interrupted and run again."""

import json
import os
import signal
import time

import pytest
from small_run import program, run_program
from tiny_bert import write_tiny_bert


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_goes_from_text_to_a_report_and_on_after_a_kill(tmp_path):
    bert = write_tiny_bert(tmp_path / "bert", max_position_embeddings=256)
    work = tmp_path / "demo"
    flags = [f"--workdir={work}", f"--embedder={bert}", "--steps=60"]
    process = program("launch/demo.py", *flags)
    deadline = time.monotonic() + 600
    while not (work / "baseline" / "metrics.jsonl").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)  # the step it runs, too
    process.communicate()
    status, stdout, stderr = run_program("launch/demo.py", *flags, timeout=800)
    assert status == 0, stderr
    assert stdout.count("shuffled") == 2 and f"The report: {work / 'report.html'}" in stdout
    page = (work / "report.html").read_text()
    assert str(work / "explorer.html") in stdout and "<a href='explorer.html'>" in page
    assert '"chunks":[' in (work / "explorer.html").read_text()
    for mode in ("revised", "new"):
        for result in json.loads((work / f"bpb_{mode}.json").read_text())["results"]:
            assert f"{result['bits_per_byte']:.4f}" in page and f"{result['bits_per_byte']:.4f}" in stdout
    stages = [record["stage"] for record in json.loads((work / "stages.json").read_text())]
    assert stages[0] == "documents" and stages[-1] == "explorer's page" and len(stages) == 22
    assert json.loads((work / "sample_on.json").read_text())["neighbours"]
    # Its baseline is RETROfitted, step by step.
    flags = [f"--demo={work}", f"--workdir={tmp_path / 'curve'}", "--steps=8", "--every=4"]
    status, stdout, stderr = run_program("launch/retrofit_curve.py", *flags, timeout=600)
    assert status == 0, stderr
    for curve in json.loads((tmp_path / "curve" / "curve.json").read_text()):
        steps = {name: [step for step, _ in points] for name, points in curve["lines"].items()}
        assert steps == {"baseline": [4, 8], "RETRO from scratch, ON": [4, 8], "RETROfit, ON": [0, 4, 8]}
        assert curve["lines"]["RETROfit, ON"][0][1] == curve["lines"]["baseline"][-1][1] and curve["short"][0] == 2
        assert (tmp_path / "curve" / f"curve-{curve['set']}.png").read_bytes()[:4] == b"\x89PNG"
