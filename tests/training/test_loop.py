"""The loop in this process: never waits for the device, skips what went wrong, goes back when told, keeps the best."""

import dataclasses
import itertools
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import MODEL

from retro_jax.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    StabilityConfig,
    TrainConfig,
    ValidationConfig,
)
from retro_jax.errors import UserError
from retro_jax.training import checkpoint, loop
from retro_jax.training.goodput import summarise
from retro_jax.training.loop import train
from retro_jax.training.metrics import read_metrics, read_validations
from retro_jax.training.profile import ProfileWindow

STEPS = 8


@pytest.fixture(scope="module")
def config(small_data):
    """Eight steps, saved at 3, 6 and 8."""
    return TrainConfig(
        model=MODEL,
        data=DataConfig(sequences=(str(small_data.sequences),)),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=2),
        mesh=MeshConfig(data=2, tensor=2),
        checkpoint=CheckpointConfig(every_steps=3, keep_last=5),
        steps=STEPS,
        batch_size=8,
        log_every=1,
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """Workdir of the run, never interrupted."""
    workdir = tmp_path_factory.mktemp("loop") / "whole"
    assert train(config, workdir).step == STEPS
    return workdir


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def losses(workdir):
    return {line["step"]: line["loss"] for line in read_metrics(workdir)}


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def wrapped(monkeypatch, call):
    """Lets `call(run_step, state, batch, step)` stand where the loop dispatches a step."""
    make = loop.make_train_step

    class Step:
        def __init__(self, *arguments, **named):
            self.jitted = make(*arguments, **named)
            self.count = 0

        def lower(self, *arguments):
            self.lowered = self.jitted.lower(*arguments)
            return self

        def compile(self):
            self.compiled = self.lowered.compile()
            return self

        def __call__(self, state, batch):
            self.count += 1
            return call(self.compiled, state, batch, self.count)

    monkeypatch.setattr(loop, "make_train_step", Step)


def test_the_metrics_of_a_step_are_fetched_after_the_next_one_is_dispatched(monkeypatch, config, tmp_path):
    events, steps = [], {}

    def call(run_step, state, batch, step):
        events.append(("dispatch", step))
        state, metrics = run_step(state, batch)
        steps[id(metrics["loss"])] = step, metrics
        return state, metrics

    fetch = jax.device_get

    def recorded(tree):
        if isinstance(tree, dict) and "loss" in tree:
            events.append(("fetch", steps[id(tree["loss"])][0]))
        return fetch(tree)

    wrapped(monkeypatch, call)
    monkeypatch.setattr(jax, "device_get", recorded)
    train(dataclasses.replace(config, checkpoint=CheckpointConfig(every_steps=1000)), tmp_path / "run")
    order = [("dispatch", 1)]
    for step in range(2, STEPS + 1):
        order += [("dispatch", step), ("fetch", step - 1)]
    assert events == [*order, ("fetch", STEPS)]


def test_a_copy_that_was_not_meant_is_an_error(monkeypatch, config, tmp_path):
    double = jax.jit(lambda x: 2 * x)

    def call(run_step, state, batch, step):
        double(np.ones(3, np.float32))  # copies to the device, as a slip in the step would
        return run_step(state, batch)

    wrapped(monkeypatch, call)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        train(config, tmp_path / "run")


def test_lines_tell_speed_and_work(whole):
    lines = read_metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["model_tflops_per_second"] > 0 and line["hardware_tflops_per_second"] > 0
        assert "mfu" not in line  # a CPU's peak is not known
        # 4 chunks of 8 tokens with 2 neighbours of 16: four times as many besides the targets.
        assert line["processed_tokens_per_second"] > 4.99 * line["tokens_per_second"] > 0
        assert line["skipped_steps"] == 0 and line["examples_seen"] == 8 * line["step"]
    assert [line["learning_rate"] for line in lines][:3] == pytest.approx([1e-7, 5e-3, 1e-2], rel=1e-2)
    summary = summarise(whole)
    assert summary["steps"] == STEPS and 0 < summary["goodput"] < 1
    assert min(summary["seconds"][kind] for kind in ("init", "compile", "data", "step", "save")) > 0


def test_other_micro_batches_and_another_mesh_go_on_with_equal_losses(config, whole, copied):
    shutil.rmtree(copied / "checkpoints" / "8")
    shutil.rmtree(copied / "checkpoints" / "6")
    other = dataclasses.replace(config, microbatches=2, mesh=MeshConfig(fsdp=4, context=2))
    train(other, copied)
    assert losses(copied).keys() == losses(whole).keys()
    for step, loss in losses(whole).items():
        assert losses(copied)[step] == pytest.approx(loss, rel=1e-5)


def test_checkpoints_are_written_by_the_clock_as_well(config, tmp_path):
    every = CheckpointConfig(every_steps=1000, every_minutes=1e-9, keep_last=100)
    train(dataclasses.replace(config, checkpoint=every, log_every=3), tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [3, 6, 8]


def damage(checkpoint):
    """Flips a bit of its largest file."""
    largest = max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)


def test_a_damaged_checkpoint_stops_the_run_and_going_back_is_asked_for_once(config, whole, copied, capsys):
    damage(copied / "checkpoints" / "8")
    with pytest.raises(UserError, match=r"checkpoints/8: damaged checkpoint .*; --resume_from=6 takes the one before"):
        train(config, copied)
    with pytest.raises(UserError, match=r"--resume_from=5: no checkpoint of this step .*; there are 3, 6, 8"):
        train(config, copied, resume_from=5)
    assert checkpoints(copied) == [3, 6, 8]
    assert train(config, copied, resume_from=3).step == STEPS
    assert "going back to step 3; removed the newer checkpoints: 8, 6" in capsys.readouterr().err
    assert losses(copied) == losses(whole) and checkpoints(copied) == [3, 6, 8]
    assert summarise(copied)["steps"] == STEPS and summarise(copied)["seconds"]["lost"] > 0
    train(config, copied, resume_from=3)  # a launcher that starts the same command again loses nothing
    captured = capsys.readouterr()
    assert "--resume_from=3 was followed before: going on from the newest checkpoint, step 8" in captured.err
    assert "from step 8 to 8" in captured.out
    shutil.rmtree(copied / "checkpoints" / "8")
    damage(copied / "checkpoints" / "6")
    way_out = f"6: damaged checkpoint .*; remove {copied}/checkpoints/6, and the run goes on from the one .*, step 3$"
    with pytest.raises(UserError, match=way_out):  # --resume_from=3 is used up
        train(config, copied, resume_from=3)
    shutil.rmtree(copied / "checkpoints" / "6")
    train(config, copied, resume_from=3)
    assert losses(copied) == losses(whole)


def test_a_start_whose_checkpoint_cannot_be_read_takes_no_steps_off(config, copied):
    damage(copied / "checkpoints" / "3")
    with pytest.raises(UserError, match="checkpoints/3: damaged checkpoint"):
        train(config, copied, resume_from=3)
    train(config, copied)
    summary = summarise(copied)
    assert summary["steps"] == STEPS and summary["seconds"]["lost"] == 0 < summary["seconds"]["away"]


@pytest.mark.parametrize("first", [0, 6])
def test_the_processes_meet_after_compiling_and_before_the_first_step(monkeypatch, config, copied, tmp_path, first):
    events = []

    def call(run_step, state, batch, step):
        events.append("step")
        return run_step(state, batch)

    wrapped(monkeypatch, call)
    compiled, state = loop.make_train_step.compile, ("initialise" if first == 0 else "restored")
    monkeypatch.setattr(loop.make_train_step, "compile", lambda self: (events.append("compile"), compiled(self))[1])
    monkeypatch.setattr(loop.hosts, "barrier", lambda name: events.append(f"all {name}"))
    initialise, digests = loop.initialise, checkpoint.digests
    monkeypatch.setattr(loop, "initialise", lambda *given: (events.append("initialise"), initialise(*given))[1])
    monkeypatch.setattr(checkpoint, "digests", lambda arrays: (events.append("restored"), digests(arrays))[1])
    workdir = copied if first else tmp_path / "fresh"
    shutil.rmtree(copied / "checkpoints" / "8")
    train(config, workdir)
    expected = ["compile", "all compiled", *(["all loaded"] if first else []), state, "all ready", "step"]
    assert events[: len(expected)] == expected


def poisoned(monkeypatch, bad_steps):
    """Gives the batches of these steps a token beyond the vocabulary, of which the model makes NaN."""
    send, count = loop.to_devices, 0

    def to_devices(arrays, *rest):
        nonlocal count
        count += 1
        if count in bad_steps:
            arrays = {**arrays, "tokens": arrays["tokens"].copy()}
            arrays["tokens"][3, 5] = MODEL.vocab_size + 7
        return send(arrays, *rest)

    monkeypatch.setattr(loop, "to_devices", to_devices)


def test_bad_steps_are_skipped_and_told(monkeypatch, config, small_data, tmp_path, capsys):
    poisoned(monkeypatch, {3, 4, 7})
    skipping = dataclasses.replace(config, stability=StabilityConfig(max_bad_steps=2))
    train(skipping, tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 4, 7]
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2, 2, 2, 3, 3]
    assert [line["bad_steps_in_a_row"] for line in lines] == [0, 0, 1, 2, 0, 0, 1, 0]
    # The schedule counts the steps that were taken.
    assert lines[2]["learning_rate"] == lines[3]["learning_rate"] == lines[4]["learning_rate"]
    told = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert [line.split(":")[0] for line in told] == ["step 3", "step 4", "step 7"]
    assert f"the batch was examples 16 to 23: records {small_data.sequences}:" in told[0]
    assert told[1].endswith("number 2 in a row")


def test_one_bad_step_too_many_stops_before_its_state_is_saved(monkeypatch, config, tmp_path):
    poisoned(monkeypatch, {5, 6, 7})
    skipping = dataclasses.replace(config, stability=StabilityConfig(max_bad_steps=2))
    every_step = dataclasses.replace(skipping, checkpoint=CheckpointConfig(every_steps=1, keep_last=9))
    with pytest.raises(
        UserError, match=r"^step 7: loss nan.*examples 48 to 55: records .*last good checkpoint: step 6"
    ):
        train(every_step, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [1, 2, 3, 4, 5, 6]
    monkeypatch.undo()
    poisoned(monkeypatch, {1})  # of this start: step 7 is bad once more, number 3 in a row
    with pytest.raises(UserError, match=r"^step 7: "):
        train(every_step, tmp_path / "run")


def test_validation_comes_once_a_step_and_the_best_checkpoint_is_kept(monkeypatch, config, whole, tmp_path):
    validating = dataclasses.replace(
        config,
        validation=ValidationConfig(sequences=config.data.sequences, every_steps=3, examples=10),
        checkpoint=CheckpointConfig(every_steps=3, keep_last=1, keep_best=1),
    )

    lines = read_validations
    train(validating, tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [3, 6, 8]
    assert all(set(line) == {"step", "validation_loss", "validation_loss_off"} for line in lines(tmp_path / "whole"))
    assert losses(tmp_path / "whole") == losses(whole)
    best = min(lines(tmp_path / "whole"), key=lambda line: line["validation_loss"])["step"]
    assert checkpoints(tmp_path / "whole") == sorted({best, STEPS})

    asked = itertools.count(1)  # after every step, and once within the validation of step 3
    monkeypatch.setattr(loop.hosts, "should_stop", lambda requested: next(asked) == 7)  # as SIGTERM does
    result = train(validating, tmp_path / "stopped")
    assert result.terminated and result.step == 6
    assert [line["step"] for line in lines(tmp_path / "stopped")] == [3]  # a stop does not wait for a validation

    def killed(requested):
        raise RuntimeError("killed")

    monkeypatch.setattr(loop.hosts, "should_stop", killed)  # behind the validation of step 6, before the next save
    with pytest.raises(RuntimeError, match="killed"):
        train(validating, tmp_path / "stopped")
    assert [line["step"] for line in lines(tmp_path / "stopped")] == [3, 6]
    monkeypatch.undo()
    train(validating, tmp_path / "stopped")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    assert losses(tmp_path / "stopped") == losses(whole)


def test_a_stop_is_noticed_in_the_middle_of_a_validation(monkeypatch, config, whole, tmp_path):
    """Step 3 is validated in two batches; its checkpoint is known to be the best all the same, once it was done."""
    best = CheckpointConfig(every_steps=3, keep_last=1, keep_best=1)
    held_out = ValidationConfig(sequences=config.data.sequences, every_steps=3, examples=10)
    validating = dataclasses.replace(config, validation=held_out, checkpoint=best)
    made_up, measure = iter((1.0, 7.0, 8.0)), loop.Validation.measure

    def measured(self, params, stopping):
        found = measure(self, params, stopping)
        return found and {**found, "validation_loss": next(made_up)}

    monkeypatch.setattr(loop.Validation, "measure", measured)
    with monkeypatch.context() as patch:
        asked = itertools.count(1)
        patch.setattr(loop.hosts, "should_stop", lambda requested: next(asked) == 4)
        result = train(validating, tmp_path / "run")
    assert result.terminated and result.step == 3 and checkpoints(tmp_path / "run") == [3]
    assert read_validations(tmp_path / "run") == []
    with monkeypatch.context() as patch:
        asked = itertools.count(1)
        patch.setattr(loop.hosts, "should_stop", lambda requested: next(asked) == 1)
        assert train(validating, tmp_path / "run").step == 4
    assert checkpoints(tmp_path / "run") == [3, 4]
    train(validating, tmp_path / "run")  # knows the loss of step 3 from the line of the start before
    assert [line["validation_loss"] for line in read_validations(tmp_path / "run")] == [1.0, 7.0, 8.0]
    assert checkpoints(tmp_path / "run") == [3, 8] and losses(tmp_path / "run") == losses(whole)


def test_settings_and_data_that_do_not_fit_are_named(config, tmp_path):
    def mistake(**changes):
        with pytest.raises(UserError) as caught:
            train(dataclasses.replace(config, **changes), tmp_path / "run")
        return str(caught.value)

    assert "batch_size 4 is not a multiple of the mesh's data x fsdp = 4 x microbatches 2" in mistake(
        batch_size=4, microbatches=2
    )
    never = CheckpointConfig(every_steps=4, keep_best=1)
    held_out = ValidationConfig(sequences=config.data.sequences, every_steps=3)
    assert "checkpoint.every_steps 4 and validation.every_steps 3 are no multiples" in mistake(
        checkpoint=never, validation=held_out
    )
    assert "no such directory" in mistake(validation=ValidationConfig(sequences=(str(tmp_path / "nowhere"),)))
    assert not (tmp_path / "run").exists()


def test_exhausted_memory_is_one_line_with_what_helps():
    line = r"^too little device memory \(.*; raise mesh.fsdp or microbatches, .*remat"
    with pytest.raises(UserError, match=line), loop._named_memory():
        jax.block_until_ready(jnp.zeros((1 << 46,), jnp.float32))
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"), loop._named_memory():
        raise jax.errors.JaxRuntimeError("INTERNAL: another failure")


def test_the_profiler_records_its_window(config, tmp_path, capsys):
    train(config, tmp_path / "run", profile=(3, 2))
    (trace,) = (tmp_path / "run" / "profile" / "process-0").rglob("*.xplane.pb")
    content = trace.read_bytes()
    assert b"step_num" in content and b"train" in content
    train(config, tmp_path / "run", profile=(3, 2))  # started again behind its window
    assert "nothing to profile: steps 3 to 4 are none of those of this start" in capsys.readouterr().err
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb")) == [trace]


def test_processes_of_one_host_record_apart(monkeypatch, tmp_path):
    for process in (0, 3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        with ProfileWindow(tmp_path, (1, 1), range(1, 2)) as window, window.before(1):
            pass
    assert {path.name for path in (tmp_path / "profile").iterdir()} == {"process-0", "process-3"}


def test_what_a_program_does_before_it_calls_counts_as_init(config, copied):
    before = summarise(copied)["seconds"]["init"]
    train(config, copied, began=time.time() - 100)
    assert 100 < summarise(copied)["seconds"]["init"] - before < 200
