"""A full disk gets one line and loses nothing that was finished; with space again the same command goes on."""

import os
import subprocess
import sys

import pytest
from small_run import ROOT, SAMPLE

from retro_jax.training.metrics import read_metrics


def on_a_small_disk(tmp_path, size, command):
    """Runs `command` twice in a namespace where $DISK is a file system of `size`, made large before the second run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
        mount -t tmpfs -o size={size} none {disk} || exit 99
        {command}
        echo "status: $?" >&2
        ls {disk}/run/checkpoints >&2
        mount -o remount,size=1g {disk}
        {command}
        echo "status: $?" >&2
        cp -r {disk} {tmp_path}/result
    """
    result = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if "unshare:" in result.stderr:
        pytest.skip("a disk of our own needs user namespaces, which this machine forbids")
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_training_stops_at_a_full_disk_and_goes_on_bit_for_bit(small_data, finished_run, tmp_path):
    workdir = tmp_path / "disk" / "run"
    command = (
        f"{sys.executable} launch/train.py --config={small_data.recipe} --workdir={workdir} "
        "--config.checkpoint.every_steps=1 --config.checkpoint.keep_last=100"
    )
    stderr = on_a_small_disk(tmp_path, "2m", command)
    first, second = stderr.split("status: ")[0], stderr.split("status: ")[1:]
    errors = [line for line in first.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in first, first
    assert "space" in errors[0] and str(workdir) in errors[0]
    assert [part.splitlines()[0] for part in second] == ["1", "0"]
    expected = {line["step"]: line["loss"] for line in read_metrics(finished_run)}
    assert {line["step"]: line["loss"] for line in read_metrics(tmp_path / "result" / "run")} == expected


@pytest.mark.parametrize(
    ("size", "tool", "flags", "shard"),
    [
        ("300k", "build_corpus", "--tokenizer={tokenizer}", ""),
        ("600k", "find_duplicates", f"--evaluation={SAMPLE}", "table-"),
    ],
)
def test_a_stage_stops_at_a_full_disk_and_goes_on(tmp_path, small_data, size, tool, flags, shard):
    flags = flags.format(tokenizer=small_data.corpus / "tokenizer.model")
    output = tmp_path / "disk" / "output"
    command = f"{sys.executable} tools/{tool}.py --input={SAMPLE} {flags} --output={output}"
    stderr = on_a_small_disk(tmp_path, size, command)
    first, second = stderr.split("status: ")[0], stderr.split("status: ")[1:]
    errors = [line for line in first.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "no space left on the device" in errors[0] and "Traceback" not in first, first
    assert errors[0].startswith(f"error: {output}/{shard}"), errors[0]
    assert [part.splitlines()[0] for part in second] == ["1", "0"]
    assert (tmp_path / "result" / "output" / "manifest.json").is_file()
