"""tools/benchmark.py prints one JSON line a result, and measures every side in a process of its own."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import ROOT, error_line, run_program

from retro_jax.config import DataConfig, RetroConfig, TrainConfig
from retro_jax.errors import UserError
from retro_jax.training.flops import hardware_flops, step_flops
from retro_jax.training.retrofit import trains

sys.path.insert(0, str(ROOT / "tools"))
from benchmarks import children, environments, measure, retro_pytorch, retrofit, train

SMALL = ("--preset=demo", "--batch_size=2", "--length=128", "--steps=2", "--warmup=1")


def lines(*flags: str) -> list[dict]:
    status, stdout, stderr = run_program("tools/benchmark.py", *flags)
    assert status == 0, stderr
    return [json.loads(line) for line in stdout.splitlines()]


@pytest.fixture(scope="module")
def train_line() -> dict:
    (line,) = lines("train", *SMALL, "--mesh=data=2", "--cpu_devices=2", "--remat=block", "--k=1", "--cores=1")
    return line


def test_a_train_line_says_what_was_measured_where_and_how(train_line):
    assert train_line["benchmark"] == "train" and train_line["shape"] is None
    assert train_line["commit"] and len(train_line["config"]) == 16
    assert train_line["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1, "context": 1}
    assert train_line["devices"] == "2 x cpu" and train_line["cores"] == 1
    assert (train_line["batch_size"], train_line["length"], train_line["k"]) == (2, 128, 1)
    assert (train_line["dtype"], train_line["remat"], train_line["vocab_size"]) == ("float32", "block", 2048)
    assert train_line["jax"] and train_line["jaxlib"] and train_line["flax"] and train_line["python"]


def test_a_train_line_has_its_figures_in_their_units(train_line):
    median, config = train_line["step_seconds_median"], _config(remat="block", k=1)
    assert train_line["steps"] == 2 and train_line["rounds"] == 1
    assert 0 < train_line["step_seconds_min"] <= median <= train_line["step_seconds_p90"]
    assert train_line["target_tokens_per_second"] * median == pytest.approx(2 * 128)
    assert train_line["processed_tokens_per_second"] == pytest.approx(3 * train_line["target_tokens_per_second"])
    assert train_line["model_gflops_per_second"] * median == pytest.approx(step_flops(config) / 1e9)
    assert train_line["hardware_gflops_per_second"] * median == pytest.approx(hardware_flops(config) / 1e9)
    assert train_line["hardware_gflop"] > train_line["model_gflop"]
    # Nobody publishes the peak of the CPU that this runs on.
    assert train_line["mfu"] is train_line["mfu_all_pairs"] is train_line["hfu"] is None
    assert 2**27 < train_line["compile_peak_memory_bytes"] <= train_line["peak_memory_bytes"] < 2**34
    assert train_line["peak_memory_of"] == "process"
    assert train_line["compile_seconds"] > 0.1 and 0 <= train_line["data_wait_seconds_median"] < median
    assert 0 < train_line["cores_busy"] <= 1.2


def test_the_baseline_takes_a_process_of_its_own(train_line):
    assert train_line["step_time_ratio_to_baseline"] == pytest.approx(
        train_line["step_seconds_median"] / train_line["baseline_step_seconds_median"]
    )


@pytest.mark.slow  # three processes; what they are asked for is the next test's
def test_retrofit_trains_the_added_parameters_alone_and_says_how_many():
    full, fitted, adapted = lines("retrofit", *SMALL, "--steps=1", "--k=1", "--lora_rank=3")
    assert full["trained_parameters"] == full["parameters"] == fitted["parameters"] == 551_552
    assert fitted["trained_parameters"] == 198_080 and fitted["trained_share"] == pytest.approx(198_080 / 551_552)
    # Query and value of three layers: [64, 3] and [3, 4 x 32].
    added = 3 * 2 * (64 * 3 + 3 * 4 * 32)
    assert adapted["trained_parameters"] - fitted["trained_parameters"] == added
    assert adapted["parameters"] - fitted["parameters"] == added and adapted["lora_rank"] == 3
    for line in (full, fitted, adapted):
        assert line["benchmark"] == "retrofit" and line["batch_size"] == 2 and "mfu" not in line


def test_retrofit_is_measured_in_turn_with_full_training_of_the_same_model(monkeypatch):
    asked = []

    def measured(config, plan):
        asked.append(config)
        seconds = 1.0 if trains(config) is None else 0.5
        kept = {
            "parameters": 10,
            "trained_parameters": 10 if seconds == 1 else 4,
            "peak_memory_bytes": int(8 * seconds),
        }
        same = {"cores": 1, "cores_busy": 1.0, "other_cores_busy": None, "compile_seconds": 1.0, "platform": "cpu"}
        named = {"mesh": {}, "devices": 1, "device_kind": "cpu", "compile_peak_memory_bytes": 1}
        return {"step_seconds": [seconds], "data_wait_seconds": [0.0], **kept, **same, **named}

    monkeypatch.setattr(train, "measure", measured)
    plan = train.Plan(steps=2, warmup=1, rounds=2, cores=0, cpu_devices=0)
    full, fitted, adapted = retrofit.lines(_config(remat="none", k=1), plan, 3)
    assert [trains(config) is None for config in asked] == [True, False, False] * 2
    assert [config.model.lora_rank for config in asked] == [0, 0, 3] * 2
    assert [line["way"] for line in (full, fitted, adapted)] == ["full", "retrofit", "retrofit_lora"]
    assert (full["speed_ratio_to_full"], fitted["speed_ratio_to_full"]) == (1, 2)
    assert (fitted["memory_ratio_to_full"], fitted["trained_share"]) == (0.5, 0.4)
    assert len(retrofit.lines(_config(remat="none", k=1), plan, 0)) == 2


def test_sequences_that_do_not_suit_the_model_are_refused(small_data):
    assert "its tokenizer has 640 tokens, model.vocab_size is 600" in error_line(
        "tools/benchmark.py", "train", *SMALL, "--vocab_size=600", f"--sequences={small_data.sequences}"
    )


def test_reading_tells_the_cold_start_from_the_rest(small_data):
    given, synthetic = (
        lines("data", "--batch_size=4", "--batches=6", *flags)[0]
        for flags in ([f"--sequences={small_data.sequences}"], ["--preset=demo", "--length=128"])
    )
    for line in (given, synthetic):
        assert line["benchmark"] == "data" and line["sequences_read"] == 24 and line["k"] == 2
        assert line["sequences_per_second"] * line["length"] == pytest.approx(line["target_tokens_per_second"])
        # Opening and the first batch are part of what is measured.
        assert line["open_seconds"] + line["first_batch_seconds"] < 24 / line["sequences_per_second"]
        assert line["process_start_seconds"] > 0 and line["page_cache"] == "dropped before"
        assert 0 <= line["wait_seconds_median"] <= line["wait_seconds_p90"]
    assert (given["length"], synthetic["length"], synthetic["synthetic"]) == (32, 128, True)


def test_mistakes_are_named_in_one_line():
    assert "'trian' is none of train, data" in error_line("tools/benchmark.py", "trian")
    assert "preset 'tinny' is unknown; did you mean 'tiny'" in error_line("tools/benchmark.py", "--preset=tinny")
    assert "'fdsp=2' is not one of data, fsdp" in error_line("tools/benchmark.py", "train", "--mesh=fdsp=2")
    assert "its baseline is measured with it" in error_line("tools/benchmark.py", "--preset=tiny-baseline")
    assert "batch_size 2 is not a multiple" in error_line(
        "tools/benchmark.py", "train", *SMALL, "--mesh=data=4", "--cpu_devices=4"
    )


def test_the_peer_gets_our_shapes_and_heads():
    shape = train.SHAPES["small"]
    config = TrainConfig(
        model=train.model_of(shape["preset"], shape["vocab_size"]),
        data=DataConfig(length=shape["length"], neighbours=shape["k"]),
        batch_size=shape["batch_size"],
    )
    job = retro_pytorch.job(config, compiled=True)
    assert (job["width"], job["num_layers"], job["heads"], job["head_size"], job["ffw_factor"]) == (896, 12, 16, 64, 4)
    assert (job["encoder_width"], job["encoder_layers"], job["encoder_heads"]) == (896, 2, 16)
    assert job["encoder_ca_layers"] == [1]
    assert (job["vocab_size"], job["length"], job["batch_size"], job["k"]) == (32_000, 1024, 1, 2)
    assert job["cca_layers"] == [6, 9, 12] and job["neighbour_length"] == 128 and job["compile"]


def test_a_model_that_the_peer_cannot_be_is_refused_before_anything_is_installed():
    message = error_line("tools/benchmark.py", "train", "--preset=425m", "--peer=retro-pytorch")
    assert "one head size for decoder and encoder, this model has 128 and 64" in message


def test_the_peer_is_installed_without_its_dependencies(tmp_path: Path):
    create, install = environments.install_commands(tmp_path, ("torch==1.2.3", *retro_pytorch.PACKAGES))
    assert create[1:3] == ["-m", "venv"] and create[-1] == str(tmp_path)
    assert install[1:5] == ["-m", "pip", "--python", str(tmp_path / "bin" / "python")]
    assert "--no-deps" in install and "torch==1.2.3" in install
    assert "retro-pytorch==0.3.9" in install and not any("autofaiss" in word for word in install)


def test_a_peer_that_cannot_be_installed_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match=r"retro-pytorch cannot be installed: .*torch==1\.2\.3.* --peer_python"):
        retro_pytorch.environment(None, "torch==1.2.3", home=tmp_path / "peer")
    assert not (tmp_path / "peer" / "ready").exists()


def test_an_interpreter_without_the_peer_is_named():
    assert "no such program" in error_line(
        "tools/benchmark.py", "train", "--shape=tiny", "--peer=retro-pytorch", "--peer_python=/nowhere/python"
    )
    bare = subprocess.run([sys.executable, "-c", retro_pytorch.IMPORTS], capture_output=True, check=False)
    if bare.returncode:
        message = error_line(
            "tools/benchmark.py", "train", "--shape=tiny", "--peer=retro-pytorch", f"--peer_python={sys.executable}"
        )
        assert "lacks what the peer needs: ModuleNotFoundError" in message


def test_sides_take_turns_and_the_ratio_is_to_the_better_one(monkeypatch: pytest.MonkeyPatch):
    order = []

    def run(python: str, module: str, job: dict, environment: dict | None = None) -> dict:
        peer = module == retro_pytorch.MODULE
        side = "ours" if not peer else "compiled" if job["compile"] else "eager"
        order.append(side)
        seconds = {"ours": 1.0, "eager": 4.0, "compiled": 2.0}[side]
        assert python == ("peer-python" if peer else sys.executable) and job["steps"] == 4
        timed = {
            "step_seconds": [seconds] * job["steps"],
            "data_wait_seconds": [0.0] * job["steps"],
            "warmup_seconds": [10.0, seconds, 4.0],
            "peak_memory_bytes": {"ours": 300, "eager": 100, "compiled": 200}[side],
            "cores": 2,
            "cores_busy": 2.0,
            "other_cores_busy": None,
            "parameters": 7,
        }
        if peer:
            return {**timed, "heads": [4], "torch": "0"}
        device = {"devices": 1, "device_kind": "cpu", "platform": "cpu", "peak_flops": None, "mesh": {}}
        return {**timed, **device, "compile_seconds": 1.0, "compile_peak_memory_bytes": 50}

    monkeypatch.setattr(children, "run", run)
    monkeypatch.setattr(retro_pytorch, "compiler_missing", lambda: None)
    ours, eager, compiled, comparison = train.against_peer(_config(), train.Plan(12, 1, 3, 0, 0), "peer-python")
    assert order == ["ours", "eager", "compiled"] * 3
    assert ours["steps"] == eager["steps"] == 12 and ours["rounds"] == 3
    assert compiled["compile_seconds"] == (10 - 2) + (4 - 2) and compiled["heads"] == [4]
    assert comparison["peer_best"] == "compiled"
    assert comparison["speed_ratio_to_peer"] == 2.0 and comparison["memory_ratio_to_peer"] == 1.5
    assert comparison["peer_eager_target_tokens_per_second"] == 2 * 128 / 4
    assert comparison["ours_peak_memory_bytes"] == 300 and comparison["peer_eager_peak_memory_bytes"] == 100

    order.clear()
    monkeypatch.setattr(retro_pytorch, "compiler_missing", lambda: "no compiler")
    *_, comparison = train.against_peer(_config(), train.Plan(12, 1, 3, 0, 0), "peer-python")
    assert order == ["ours", "eager"] * 3
    assert comparison["peer_best"] == "eager" and comparison["peer_compiled_left_out"] == "no compiler"


def test_the_share_of_the_peak_counts_every_device(monkeypatch: pytest.MonkeyPatch):
    config = _config()
    timed = {
        "step_seconds": [2.0],
        "data_wait_seconds": [0.0],
        "warmup_seconds": [2.0],
        "peak_memory_bytes": 1,
        "cores": 2,
        "cores_busy": 1.0,
        "other_cores_busy": 0.0,
        "parameters": 1,
        "devices": 4,
        "device_kind": "chip",
        "platform": "tpu",
        "peak_flops": 1e9,
        "mesh": {},
        "compile_seconds": 1.0,
        "compile_peak_memory_bytes": 1,
    }
    monkeypatch.setattr(children, "run", lambda *_: timed)
    line = train.alone(config, train.Plan(1, 1, 1, 0, 0))
    assert line["mfu"] == pytest.approx(step_flops(config) / (2.0 * 4 * 1e9))
    assert line["mfu"] < line["mfu_all_pairs"] and line["hfu"] == pytest.approx(hardware_flops(config) / 8e9)
    assert line["peak_memory_of"] == "device"


def test_warm_up_steps_do_not_count_and_waiting_does():
    seen = []
    timed = measure.time_steps(seen.append, iter(range(10)), warmup=2, steps=3)
    assert seen == [0, 1, 2, 3, 4]
    assert len(timed["step_seconds"]) == len(timed["data_wait_seconds"]) == 3 and len(timed["warmup_seconds"]) == 2
    assert all(wait <= step for wait, step in zip(timed["data_wait_seconds"], timed["step_seconds"], strict=True))
    assert timed["peak_memory_bytes"] > 2**20


def test_a_side_that_fails_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "breaks.py").write_text("raise SystemExit('error: no chips today')")
    (tmp_path / "dies.py").write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match=r"^breaks: no chips today$"):
        children.run(sys.executable, "breaks", {})
    with pytest.raises(UserError, match="dies: was killed, probably for want of memory"):
        children.run(sys.executable, "dies", {})


@pytest.mark.slow
def test_the_peer_runs_with_the_heads_that_were_asked_for():
    python = retro_pytorch.environment(None)
    config = dataclasses.replace(
        _config(), model=train.model_of("tiny", 8192), data=DataConfig(length=512, neighbours=2), batch_size=1
    )
    for dtype in ("float32", "bfloat16"):
        job = {**retro_pytorch.job(config, compiled=False), "dtype": dtype, "steps": 1, "warmup": 1, "cores": 0}
        result = children.run(python, retro_pytorch.MODULE, job, retro_pytorch.ENVIRONMENT)
        assert result["heads"] == [4] and result["parameters"] == 11_496_704
        assert result["step_seconds"][0] > 0 and result["cores"] == len(os.sched_getaffinity(0))


def _config(*, remat: str = "none", k: int = 2) -> TrainConfig:
    return TrainConfig(
        model=RetroConfig.preset("demo", remat=remat), data=DataConfig(length=128, neighbours=k), batch_size=2
    )
