"""Metric lines and TensorBoard events agree, and follow the checkpoint a run resumes from."""

import json

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from retro_jax.data.tfrecord import read_records
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


@pytest.mark.parametrize("target", ["/dev/full"])
def test_a_full_disk_is_an_error_at_once(tmp_path, target):
    writer = MetricsWriter(tmp_path, resumed_step=0)
    (tmp_path / FILE).unlink()
    writer._file.close()
    writer._file = open(target, "a", buffering=1)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        writer.write(1, {"loss": 1.0})
    writer._events.close()
