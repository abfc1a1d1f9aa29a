"""docs/retrieval-service.md stays true: its commands, flags, metrics and calls exist."""

import re
import shlex

from small_run import ROOT

from retro_jax.retrieval.service import retrieval_v1_pb2 as pb
from retro_jax.retrieval.service.client import RetrievalClient
from retro_jax.retrieval.service.metrics import Metrics

PAGE = (ROOT / "docs" / "retrieval-service.md").read_text()


def flags_of(program: str) -> set[str]:
    text = (ROOT / program).read_text() + (ROOT / "retro_jax" / "program.py").read_text()
    return set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text))


def test_commands_are_of_programs_and_flags_that_exist():
    commands = "".join(re.findall(r"```shell\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    ours = [shlex.split(command) for command in commands if command.startswith("python ")]
    assert len(ours) == 7
    for _, program, *flags in ours:
        given = {flag.removeprefix("--").partition("=")[0] for flag in flags}
        assert given <= flags_of(program), (program, given - flags_of(program))
    for file in re.findall(r"--(?:file|filename)=(\S+)", PAGE):
        assert (ROOT / file).is_file()


def test_every_flag_of_the_program_is_in_the_table():
    table = PAGE[PAGE.index("## 7.") :]
    listed = set(re.findall(r"`--(\w+)`", table))
    program = (ROOT / "launch" / "serve_retrieval.py").read_text()
    assert listed == set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', program))


def test_every_metric_is_on_the_page():
    text = PAGE[PAGE.index("## 6.") : PAGE.index("## 7.")]
    for family in Metrics().registry.collect():
        if family.name.startswith("retro_retrieval_"):
            name = family.name.removeprefix("retro_retrieval_").removesuffix("_info")
            assert re.search(rf"`{name}(_total|_info)?[`{{]", text), name


def test_calls_on_the_page_exist():
    for method in pb.DESCRIPTOR.services_by_name["Retrieval"].methods_by_name:
        assert f"`{method}`" in PAGE
    for name in re.findall(r"client\.(\w+)\(", PAGE):
        assert callable(getattr(RetrievalClient, name))
