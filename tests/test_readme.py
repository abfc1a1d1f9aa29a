"""The README stays true: its commands and its Python are run as they stand there."""

import dataclasses
import json
import re

import pytest
from small_run import ROOT, SAMPLE, run_script

from retro_jax.config import RetroConfig

README = (ROOT / "README.md").read_text()

SMALL_RECIPE = """
from retro_jax.config import CheckpointConfig, OptimizerConfig, RetroConfig, TrainConfig, to_config_dict


def get_config(preset="tiny"):
    model = RetroConfig(**{model!r})
    if preset == "tiny-baseline":
        model = RetroConfig(**{{**vars(model), "cca_layers": ()}})
    optimizer = OptimizerConfig(warmup_steps=1)
    return to_config_dict(TrainConfig(model=model, optimizer=optimizer, steps=2, batch_size=2))
"""
MODEL = RetroConfig(
    vocab_size=1024,
    width=16,
    num_layers=2,
    num_heads=2,
    head_size=8,
    ffw_width=32,
    cca_layers=(2,),
    encoder_width=16,
    encoder_layers=1,
    encoder_num_heads=2,
    encoder_head_size=8,
    encoder_ffw_width=32,
    scan_layers=False,
)


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def checkout(tmp_path, embedder_directory):
    """The programs of the repository beside a small corpus, a small recipe and the embedder already fetched."""
    for name in ("tools", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "tiny.py").write_text(SMALL_RECIPE.format(model=dataclasses.asdict(MODEL)))
    (tmp_path / "embedder").symlink_to(embedder_directory)
    records = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    (tmp_path / "text").mkdir()
    for name, chosen in (("train-0", records[:20:2]), ("train-1", records[1:20:2]), ("valid", records[20:23])):
        lines = [json.dumps({**record, "text": record["text"][:900]}) for record in chosen]
        (tmp_path / "text" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_commands_for_your_own_corpus_work_in_order(checkout):
    (script,) = blocks("bash")
    # The sample is too small for a vocabulary of 8,192.
    commands = script.replace("--vocab_size=8192", "--vocab_size=800")
    stdout = run_script(commands, checkout)
    modes = [line.split()[2] for line in stdout.splitlines() if line.startswith("runs/") and "%" in line]
    assert modes == ["baseline", "off", "on", "shuffled"]
    assert "The history of" in stdout


def test_the_python_example_works():
    (example,) = blocks("python")
    namespace = {}
    exec(example, namespace)
    assert namespace["logits"].shape == (1, 512, namespace["config"].vocab_size)


def test_every_program_is_in_the_table():
    listed = set(re.findall(r"^\| `((?:tools|launch)/\w+\.py)`", README, re.MULTILINE))
    there = {f"{path.parent.name}/{path.name}" for name in ("tools", "launch") for path in (ROOT / name).glob("*.py")}
    assert listed == there


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z-]+)`?", README)) <= targets
