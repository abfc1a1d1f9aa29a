"""Every recipe of experiments/ is a valid configuration; the paper's have the paper's numbers."""

import runpy
from pathlib import Path

import pytest

from retro_jax.config import TrainConfig, from_config_dict
from retro_jax.errors import UserError
from retro_jax.training.optimizer import learning_rate

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"


def recipe(name, *arguments):
    return from_config_dict(TrainConfig, runpy.run_path(str(EXPERIMENTS / name))["get_config"](*arguments))


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_documented(path):
    config = recipe(path.name)
    learning_rate(config.optimizer, config.steps)
    document = runpy.run_path(str(path))["__doc__"]
    assert f"--config=experiments/{path.name}" in document and "Hardware:" in document


@pytest.mark.parametrize(
    ("name", "steps", "batch", "peak"),
    [("172m", 800_000, 256, 2e-4), ("1.5b", 800_000, 256, 2e-4), ("7.5b", 200_000, 1024, 1e-4)],
)
def test_paper_recipes_train_on_419_430_400_000_tokens(name, steps, batch, peak):
    config = recipe("paper.py", name)
    assert (config.steps, config.batch_size, config.optimizer.peak_learning_rate) == (steps, batch, peak)
    assert config.steps * config.batch_size * 2048 == 419_430_400_000
    assert config.optimizer.warmup_steps == 750 and config.optimizer.final_fraction == 0.1


def test_an_argument_chooses_the_baseline_and_a_wrong_one_is_named():
    assert recipe("demo.py", "demo-baseline").model.is_baseline
    with pytest.raises(UserError, match="did you mean 'demo-baseline'"):
        recipe("demo.py", "demo-baselin")
