"""Every recipe of experiments/ is a valid configuration; the paper's have the paper's numbers."""

import dataclasses
import re
import runpy
from pathlib import Path

import pytest

from retro_jax.config import TrainConfig, from_config_dict
from retro_jax.errors import UserError
from retro_jax.model.parameters import matrix_parameters
from retro_jax.result_sizes import SIZES
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


# Matrices of the parts of the paper's smallest model (paper table 2; the sum is its 172 M).
DECODER, ENCODER_LAYER, CONDITIONING, CCA = 132_120_576, 11_010_048, 4_587_520, 4_587_520
RETRO = DECODER + 2 * ENCODER_LAYER + CONDITIONING


@pytest.mark.parametrize(
    ("name", "matrices", "neighbours", "bits_per_byte"),
    [
        ("default", RETRO + 3 * CCA, 2, "0.822"),
        ("no-query-conditioning", RETRO + 3 * CCA - CONDITIONING, 2, "0.829"),
        ("no-cross-positions", RETRO + 3 * CCA - 4 * 896 * 1024, 2, "0.826"),
        ("shared-embeddings", RETRO + 3 * CCA, 2, "0.823"),
        ("6-layer-encoder", RETRO + 3 * CCA + 4 * ENCODER_LAYER, 2, "0.821"),
        ("neighbour-only", RETRO + 3 * CCA, 2, "0.950"),
        ("continuation-only", RETRO + 3 * CCA, 2, "0.895"),
        ("no-retrieval", DECODER, 2, "0.987"),
        ("1-neighbour", RETRO + 3 * CCA, 1, "0.858"),
        ("4-neighbours", RETRO + 3 * CCA, 4, "0.847"),
        ("cca-1", RETRO + CCA, 2, "0.827"),
        ("cca-6", RETRO + CCA, 2, "0.823"),
        ("cca-12", RETRO + CCA, 2, "0.831"),
        ("cca-all", RETRO + 12 * CCA, 2, "0.860"),
        ("cca-every-3-from-1", RETRO + 4 * CCA, 2, "0.823"),
    ],
)
def test_ablations_change_what_the_papers_table_13_says(name, matrices, neighbours, bits_per_byte):
    config = recipe("ablations.py", name)
    assert matrix_parameters(config.model)["total"] == matrices
    assert config.data.neighbours == neighbours
    assert (config.steps, config.batch_size) == (300_000, 256)
    document = runpy.run_path(str(EXPERIMENTS / "ablations.py"))["__doc__"]
    assert re.search(rf"^ +{name} .* {bits_per_byte}$", document, re.MULTILINE)


def test_every_ablation_is_listed_and_a_wrong_name_is_answered_with_the_nearest():
    ablations = runpy.run_path(str(EXPERIMENTS / "ablations.py"))
    listed = re.findall(r"^    (\S+) .*0\.\d{3}$", ablations["__doc__"], re.MULTILINE)
    assert listed == list(ablations["MODELS"])
    assert recipe("ablations.py", "shared-embeddings").model.share_embeddings
    assert recipe("ablations.py", "cca-12").model.cca_layers == (12,)
    with pytest.raises(UserError, match="did you mean 'cca-all'"):
        recipe("ablations.py", "cca-al")


@pytest.mark.parametrize("size", ["172m", "425m", "1.5b", "7.5b"])
def test_the_paper_recipe_has_every_size_and_its_baseline(size):
    retro, baseline = recipe("paper.py", size), recipe("paper.py", f"{size}-baseline")
    assert baseline.model.is_baseline and not retro.model.is_baseline
    assert dataclasses.replace(retro.model, cca_layers=()) == baseline.model
    assert dataclasses.replace(retro, model=baseline.model) == baseline
    document = runpy.run_path(str(EXPERIMENTS / "paper.py"))["__doc__"]
    assert f"{size} 0." in " ".join(document.split())


def test_the_fine_tuning_on_questions_has_the_papers_settings_and_a_decoder_alone_has_no_retrieval():
    config = recipe("question_answering.py")
    assert (config.steps, config.batch_size, config.data.neighbours) == (25_000, 128, 20)
    rates = learning_rate(config.optimizer, config.steps)
    assert (float(rates(750)), float(rates(25_000))) == pytest.approx((1e-6, 1e-7), rel=1e-3)
    assert config.unfreeze_decoder and config.cca_gate == 1
    alone = recipe("question_answering.py", "small-decoder")
    assert alone.model.is_baseline and alone.cca_gate == 0 and alone.unfreeze_decoder
    with pytest.raises(UserError, match="did you mean 'small'"):
        recipe("question_answering.py", "smal-decoder")


@pytest.mark.parametrize("name", SIZES)
def test_every_size_of_the_results_has_two_recipes_that_fit_its_data_and_its_evaluation(name):
    size, retro, baseline = SIZES[name], recipe("results.py", name), recipe("results.py", f"{name}-baseline")
    assert baseline.model.is_baseline and dataclasses.replace(baseline, model=retro.model) == retro
    assert dataclasses.replace(retro.model, cca_layers=()) == baseline.model
    assert retro.model.vocab_size == size.vocab_size and size.length % retro.model.chunk_length == 0
    assert retro.data.neighbours <= 2  # as many as the sequences have
    learning_rate(retro.optimizer, retro.steps)
    assert all(step % retro.checkpoint.keep_every == 0 and step < retro.steps for step in size.steps)
    planted = recipe("planted.py")
    learning_rate(planted.optimizer, size.planted_steps)
    with pytest.raises(UserError, match=f"did you mean '{name}'"):
        recipe("results.py", name[:-1])
