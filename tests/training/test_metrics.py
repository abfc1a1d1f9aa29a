"""Metric lines and TensorBoard events agree, and follow the checkpoint a run resumes from."""

import json

import pytest
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from retro_jax.data.tfrecord import read_records
from retro_jax.training.lines import LineWriter, read_lines
from retro_jax.training.metrics import FILE, MetricsWriter, read_metrics


def events(workdir):
    files = sorted((workdir / "tensorboard").iterdir())
    return [[Event.FromString(record) for record in read_records(file)] for file in files]


def test_lines_and_events_hold_the_same_values(tmp_path):
    with MetricsWriter(tmp_path, resumed_step=0) as writer:
        writer.write(1, {"loss": 2.5, "tokens_per_second": 10.0})
        # Written at once: a reader beside the run sees them before it ends.
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.5, "tokens_per_second": 10.0}]
        (file,) = events(tmp_path)
    assert file[0].file_version == "brain.Event:2"
    values = {value.tag: value.simple_value for value in file[2].summary.value}
    assert file[2].step == 1 and values == {"loss": 2.5, "tokens_per_second": 10.0}


def test_a_resumed_run_drops_what_its_checkpoint_does_not_know(tmp_path):
    with MetricsWriter(tmp_path, resumed_step=0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": float(step)})
    with open(tmp_path / FILE, "a") as file:
        file.write('{"step": 4, "lo')  # cut by a kill
    with MetricsWriter(tmp_path, resumed_step=2) as writer:
        writer.write(3, {"loss": 30.0})
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 2.0, 30.0]
    restart = events(tmp_path)[1][1]
    assert (restart.step, restart.session_log.status) == (3, SessionLog.START)


def test_losses_keep_every_bit(tmp_path):
    value = 0.1 + 0.2
    with MetricsWriter(tmp_path, resumed_step=0) as writer:
        writer.write(1, {"loss": value})
    assert json.loads((tmp_path / FILE).read_text())["loss"] == value


def test_no_file_means_no_lines(tmp_path):
    assert read_metrics(tmp_path) == []


def test_a_value_that_is_not_finite_is_null_and_no_event(tmp_path):
    with MetricsWriter(tmp_path, resumed_step=0) as writer:
        writer.write(1, {"loss": float("nan"), "gradient_norm": float("inf"), "tokens": 3.0})
    assert (tmp_path / FILE).read_text() == '{"step": 1, "loss": null, "gradient_norm": null, "tokens": 3.0}\n'
    (file,) = events(tmp_path)
    assert {value.tag: value.simple_value for value in file[2].summary.value} == {"tokens": 3.0}


def test_a_full_disk_is_an_error_at_once_that_names_the_file(tmp_path):
    (tmp_path / "lines").symlink_to("/dev/full")
    with LineWriter(tmp_path / "lines") as lines, pytest.raises(OSError, match=r"No space left.*lines"):
        lines.append({"step": 1})


@pytest.mark.parametrize("rest", ["", "{", '{"step": 2, "lo', '{"step": 2, "name": "' + "x" * 200_000])
def test_a_line_cut_by_a_kill_is_dropped_and_the_next_one_stands_alone(tmp_path, rest):
    path = tmp_path / "lines"
    path.write_text('{"step": 1}\n' + rest)
    assert read_lines(path) == [{"step": 1}]
    with LineWriter(path) as lines:
        lines.append({"step": 2})
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
