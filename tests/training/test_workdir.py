"""A workdir belongs to one run, whatever moment its first start was killed at."""

import dataclasses

import pytest

from retro_jax.config import CheckpointConfig, DataConfig, RetroConfig, StabilityConfig, TrainConfig, ValidationConfig
from retro_jax.errors import UserError
from retro_jax.training.workdir import BASE, CONFIG, TOKENIZER, begun_with, claim_workdir, load_config, open_workdir

MODEL = RetroConfig(vocab_size=64, width=8, num_layers=1, num_heads=1, head_size=8, ffw_width=8)
RUN = TrainConfig(model=MODEL, data=DataConfig(sequences=("a",)))


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer-of-the-data.model"
    path.write_bytes(b"model")
    return path


def test_the_configuration_is_kept_and_found_again(tmp_path, tokenizer):
    open_workdir(tmp_path / "run", RUN, tokenizer)
    assert load_config(tmp_path / "run") == RUN
    assert (tmp_path / "run" / TOKENIZER).read_bytes() == b"model"
    assert begun_with(tmp_path / "run") is None


@pytest.mark.parametrize("left", [[], [TOKENIZER], [TOKENIZER, f".tmp-77-{CONFIG}"], [f".tmp-77-{TOKENIZER}"]])
def test_what_a_killed_start_left_does_not_matter(tmp_path, tokenizer, left):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_bytes(b"model")
    open_workdir(tmp_path / "run", RUN, tokenizer)
    assert load_config(tmp_path / "run") == RUN


def test_settings_that_change_no_number_may_change(tmp_path, tokenizer):
    open_workdir(tmp_path / "run", RUN, tokenizer)
    changed = dataclasses.replace(
        RUN,
        log_every=3,
        checkpoint=CheckpointConfig(5),
        data=DataConfig(sequences=("b",)),
        microbatches=2,
        vocab_block=100,
        model=dataclasses.replace(MODEL, remat="block"),
        stability=StabilityConfig(max_bad_steps=3),
        validation=ValidationConfig(sequences=("c",)),
    )
    open_workdir(tmp_path / "run", changed, tokenizer)
    assert load_config(tmp_path / "run") == changed


def test_every_other_setting_is_refused_by_name_and_nothing_is_overwritten(tmp_path, tokenizer):
    open_workdir(tmp_path / "run", RUN, tokenizer)
    other = dataclasses.replace(RUN, steps=7, model=dataclasses.replace(MODEL, width=16))
    with pytest.raises(UserError, match=r"run with model.width = 8 \(now 16\), steps = 1000 \(now 7\)"):
        open_workdir(tmp_path / "run", other, tokenizer)
    tokenizer.write_bytes(b"another")
    with pytest.raises(UserError, match="was begun with another tokenizer"):
        open_workdir(tmp_path / "run", RUN, tokenizer)
    assert (tmp_path / "run" / TOKENIZER).read_bytes() == b"model"
    assert load_config(tmp_path / "run") == RUN


def test_a_claimed_workdir_is_opened_by_its_claimant_and_refused_to_others(tmp_path, tokenizer):
    with claim_workdir(tmp_path / "run"):
        open_workdir(tmp_path / "run", RUN, tokenizer)
        with pytest.raises(UserError, match=r"run is in use by process \d+ on .* since .*; wait for that run"):
            claim_workdir(tmp_path / "run")
    with claim_workdir(tmp_path / "run"):
        assert load_config(tmp_path / "run") == RUN
    with pytest.raises(UserError, match="is not empty and holds no run"):
        claim_workdir(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"run", tokenizer.name}


def test_a_directory_with_other_files_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="is not empty and holds no run"):
        open_workdir(tmp_path, RUN, tokenizer)
    with pytest.raises(UserError, match="is a file"):
        open_workdir(tokenizer, RUN, tokenizer)
    with pytest.raises(UserError, match="no run is here"):
        load_config(tmp_path)


def test_the_model_that_a_run_begins_with_may_move_but_not_be_another(tmp_path, tokenizer):
    run = lambda name: dataclasses.replace(RUN, init_from=name)  # noqa: E731
    record = lambda name, fingerprint: {"init_from": name, "model": {}, "fingerprint": fingerprint}  # noqa: E731
    open_workdir(tmp_path / "run", run("a"), tokenizer, record("a", "0123"))
    open_workdir(tmp_path / "run", run("b"), tokenizer, record("b", "0123"))
    with pytest.raises(UserError, match="began with another model, 0123 of b, than c is now, 4567; give another"):
        open_workdir(tmp_path / "run", run("c"), tokenizer, record("c", "4567"))
    assert begun_with(tmp_path / "run") == record("b", "0123") and load_config(tmp_path / "run") == run("b")
    open_workdir(tmp_path / "run", run("b"), tokenizer)  # it is there no more
    assert begun_with(tmp_path / "run") == record("b", "0123")
    (tmp_path / "run" / BASE).write_text("{")
    with pytest.raises(UserError, match=r"base\.json: not JSON"):
        begun_with(tmp_path / "run")
