"""The recipe of planted facts does what its docstring and the README say, by the commands that stand there."""

import re
import runpy
import textwrap

import pytest
from small_run import ROOT, run_script

RECIPE = ROOT / "experiments" / "planted.py"


def share(stdout: str) -> float:
    right, asked = re.findall(r"^(\d+) of (\d+) answers are right", stdout, re.MULTILINE)[-1]
    return int(right) / int(asked)


@pytest.mark.slow
def test_facts_of_people_never_trained_on_are_looked_up_and_come_and_go_with_the_register(tmp_path, embedder_directory):
    for name in ("tools", "launch", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "embedder").symlink_to(embedder_directory)

    def shell(script: str) -> str:
        return run_script(script, tmp_path)

    lines = runpy.run_path(str(RECIPE))["__doc__"].splitlines()
    commands = textwrap.dedent("\n".join(line for line in lines if line.startswith("    ")))
    assert share(shell(commands)) >= 0.9
    ask = commands[commands.rindex("python launch/sample.py") :].replace("questions", "late_questions")
    without = re.sub("--(database|embedder)=[^ ]+ ", "", commands[commands.rindex("python launch/sample.py") :])
    assert share(shell(without)) <= 0.2
    assert share(shell(ask)) <= 0.3
    shell(
        "python tools/update_database.py add --database=planted/register --input=planted/text/late.jsonl "
        "--embedder=embedder"
    )
    assert share(shell(ask)) >= 0.9
