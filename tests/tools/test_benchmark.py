"""tools/benchmark.py prints one JSON line a result."""

import json

import pytest
from small_run import error_line, run_program


def test_each_benchmark_prints_one_json_line_with_its_figures(small_data):
    status, stdout, stderr = run_program(
        "tools/benchmark.py",
        "--preset=demo",
        "--batch_size=1",
        "--length=128",
        "--steps=1",
        f"--sequences={small_data.sequences}",
    )
    assert status == 0, stderr
    train, data = [json.loads(line) for line in stdout.splitlines()]
    assert train["benchmark"] == "train" and data["benchmark"] == "data"
    assert train["target_tokens_per_second"] * train["step_seconds_median"] == pytest.approx(128)
    assert train["processed_tokens_per_second"] == pytest.approx(5 * train["target_tokens_per_second"])
    assert train["step_time_ratio_to_baseline"] > 0 and train["jax"]
    assert data["sequences_per_second"] * data["length"] == pytest.approx(data["target_tokens_per_second"])


def test_mistakes_are_named_in_one_line():
    assert "'trian' is none of train, data" in error_line("tools/benchmark.py", "trian")
    assert "needs --sequences" in error_line("tools/benchmark.py", "data")
    assert "preset 'tinny' is unknown; did you mean 'tiny'" in error_line("tools/benchmark.py", "--preset=tinny")
