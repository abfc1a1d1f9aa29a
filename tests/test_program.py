"""How every program fails: one line that names the thing, an exit status, no traceback."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from absl import flags
from retro_jax import program
from retro_jax.errors import UserError

LENGTH = flags.DEFINE_integer("length", 3, "some number")

def main():
    {body}

program.run(main)
"""


def run(body, *arguments):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body), *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("body", "arguments", "line"),
    [
        ("raise UserError('the tokenizer is green; paint it')", [], "error: the tokenizer is green; paint it"),
        ("open('/nowhere/at.all')", [], "error: /nowhere/at.all: no such file or directory"),
        ("open('/')", [], "error: /: is a directory, expected a file"),
        ("open('x' * 300)", [], f"error: {'x' * 300}: File name too long"),
        ("open('/dev/full', 'w').write('x' * 99999)", [], "error: no space left on the device; free some"),
        ("pass", ["--lenght=4"], "error: Unknown command line flag 'lenght'. Did you mean: length"),
        ("pass", ["--length=four"], "error: flag --length=four: invalid literal"),
        ("pass", ["more"], "error: unexpected argument 'more'; every option is a --flag"),
        ("pass", ["--length=\udcff"], "is not valid UTF-8"),
    ],
)
def test_a_mistake_is_one_line_and_status_one(body, arguments, line):
    result = run(body, *arguments)
    assert result.returncode == 1, result.stderr
    assert line in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr


def test_what_has_to_be_waited_for_is_one_line_and_status_75():
    result = run("from retro_jax.errors import TemporaryError; raise TemporaryError('process 3 did not come')")
    assert (result.returncode, result.stderr) == (75, "error: process 3 did not come\n")


def test_a_defect_of_ours_keeps_its_traceback():
    result = run("1 / 0")
    assert result.returncode != 0 and "ZeroDivisionError" in result.stderr and "Traceback" in result.stderr


def test_a_program_that_succeeds_says_nothing_on_stderr():
    result = run("print('done')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_jax_comes_only_to_programs_that_may_have_several_processes():
    result = run("assert 'jax' not in sys.modules; program.define_cluster_flags(); print('done')")
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_a_reader_that_goes_away_is_no_error():
    script = PROGRAM.format(body="[print('y' * 100) for _ in range(100_000)]")
    result = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$1" | head -1', "bash", script],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == "y" * 100 + "\n" and result.stderr == ""
