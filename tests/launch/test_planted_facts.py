"""The database is the knowledge: a running sampler's answers change with the documents, and no weight is touched."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from planted_run import make_planted_run
from serving import serving
from small_run import program, run_program

from retro_jax.inference.decoding import Decoding
from retro_jax.inference.sampling import Request, Sampler
from retro_jax.inference.text import begins_with
from retro_jax.retrieval.embedder import Embedder
from retro_jax.retrieval.live import LiveDatabase
from retro_jax.retrieval.service.client import RetrievalClient
from retro_jax.retrieval.update import add_documents, remove_documents
from retro_jax.training.trained import load_trained

GREEDY = Decoding(temperature=0)
GUESSED = 0.25  # a value is one of twelve


@pytest.fixture(scope="module")
def embedder(embedder_directory):
    return Embedder.load(embedder_directory, normalize=True, max_length=128)


@pytest.fixture(scope="module")
def planted(embedder, tmp_path_factory):
    return make_planted_run(tmp_path_factory.mktemp("planted"), embedder)


@pytest.fixture(scope="module")
def run(planted):
    return load_trained(planted.workdir)


@pytest.fixture
def database(planted, tmp_path):
    return shutil.copytree(planted.database, tmp_path / "database")


def ask(run, sampler, questions):
    """Share of right answers, and the ids of the chunks that were retrieved."""
    texts, ids = [[] for _ in questions], []
    requests = [Request(run.tokenizer.encode(question["prompt"])) for question in questions]
    for index, token in sampler.generate_batch(requests, max_new_tokens=4, decoding=GREEDY):
        texts[index].append(token.token)
        ids += [chunk.ids for chunk in token.retrieved]
    answers = [run.tokenizer.decode(tokens) for tokens in texts]
    right = [begins_with(text, question["answer"]) for text, question in zip(answers, questions, strict=True)]
    return np.mean(right), np.concatenate([*ids, np.zeros(0, int)])


def sampler_of(run, retriever):
    options = {"vocab_size": run.tokenizer.vocab_size, "neighbours": 1, "max_context": 128, "mesh": run.mesh}
    return Sampler(run.config.model, run.plan, run.params, retriever=retriever, **options)


def test_facts_of_people_never_trained_on_are_looked_up_and_without_the_database_guessed(planted, run, embedder):
    questions = planted.lines("questions")[:96]
    assert ask(run, sampler_of(run, LiveDatabase(planted.database, embedder)), questions)[0] >= 0.9
    assert ask(run, sampler_of(run, None), questions)[0] <= GUESSED


def follow_changes(planted, run, embedder, database, retriever, wait):
    """Asks a sampler that is never made anew, before and after documents are added and removed."""
    sampler, questions = sampler_of(run, retriever), planted.lines("late_questions")
    assert ask(run, sampler, questions)[0] <= GUESSED
    add_documents(database, [planted.text / "late.jsonl"], embedder)
    assert ask(run, sampler, questions)[0] <= GUESSED  # until it is told to look
    wait()
    right, ids = ask(run, sampler, questions)
    assert right >= 0.9
    late = {record["id"] for record in planted.lines("late")}
    assert late <= {document for document, _ in retriever.documents(ids)}
    remove_documents(database, ids=late)
    wait()
    right, ids = ask(run, sampler, questions)
    assert right <= GUESSED
    assert not late & {document for document, _ in retriever.documents(ids)}


def test_a_running_sampler_learns_and_forgets_with_a_database_here(planted, run, embedder, database):
    live = LiveDatabase(database, embedder)

    def wait():
        assert live.refresh() and not live.refresh()

    follow_changes(planted, run, embedder, database, live, wait)


def test_a_running_sampler_learns_and_forgets_with_a_service(planted, run, embedder, embedder_directory, database):
    flags = (f"--database={database}", f"--embedder={embedder_directory}", "--reload_seconds=0.1")
    with serving(*flags) as (address, _), RetrievalClient(address) as client:

        def wait():
            while not client.refresh():  # the service looks for changes by itself
                pass

        follow_changes(planted, run, embedder, database, client, wait)


def test_the_program_reads_prompts_line_by_line_and_follows_the_database(
    planted, embedder, embedder_directory, database, tmp_path
):
    question, output = planted.lines("late_questions")[0], tmp_path / "answers.json"
    flags = [f"--workdir={planted.workdir}", f"--database={database}", f"--embedder={embedder_directory}"]
    flags += ["--interactive", "--temperature=0", "--stop=.", "--max_new_tokens=8", f"--output={output}"]
    process = program("launch/sample.py", *flags, stdin=subprocess.PIPE)

    def answer():
        process.stdin.write(question["prompt"] + "\n")
        process.stdin.flush()
        return next(line for line in process.stdout if line.startswith(question["prompt"]))

    before = answer()
    add_documents(database, [planted.text / "late.jsonl"], embedder)
    after = answer()
    remove_documents(database, ids=[planted.lines("late")[0]["id"]])
    removed = answer()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert after == f"{question['prompt']} {question['answer']}\n" and after not in (before, removed)
    assert stderr.count("the database has changed") == 2
    documents = [
        {entry["document"] for entry in each["neighbours"]} for each in json.loads(output.read_text())["results"]
    ]
    own = planted.lines("late")[0]["id"]
    assert [own in each for each in documents] == [False, True, False]


def test_many_prompts_are_answered_and_counted(planted, embedder_directory, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(each) + "\n" for each in planted.lines("questions")[:40]))
    output = tmp_path / "answers.json"
    status, stdout, stderr = run_program(
        "launch/sample.py",
        f"--workdir={planted.workdir}",
        f"--database={planted.database}",
        f"--embedder={embedder_directory}",
        f"--prompts={questions}",
        "--temperature=0",
        "--stop=.",
        "--max_new_tokens=8",
        f"--output={output}",
    )
    assert status == 0, stderr
    result = json.loads(output.read_text())
    right = sum(each["samples"][0]["right"] for each in result["results"])
    assert result["asked"] == len(result["results"]) == 40 and result["right"] == right >= 36
    assert f"{right} of 40 answers are right ({right / 40:.1%})" in stdout
    assert stdout.count("[right]") == right and stdout.count("[wrong, ") == 40 - right


def test_a_service_that_is_lost_is_an_error_or_means_off_and_is_told(planted, embedder_directory):
    prompt = planted.lines("questions")[0]["prompt"]
    flags = [f"--workdir={planted.workdir}", "--interactive", "--temperature=0", "--max_new_tokens=8"]
    with serving(f"--database={planted.database}", f"--embedder={embedder_directory}") as (address, server):
        flags += [f"--service={address}", "--service_seconds=20"]
        programs = [
            program("launch/sample.py", *flags, f"--on_retrieval_failure={what}", stdin=subprocess.PIPE)
            for what in ("error", "off")
        ]
        for each in programs:
            each.stdin.write(prompt + "\n")
            each.stdin.flush()
            assert any(line.startswith("chunk 1, neighbour 1") for line in each.stdout)
        server.kill()
    strict, lenient = programs
    _, stderr = strict.communicate(prompt + "\n", timeout=60)
    assert strict.returncode == 1 and "UNAVAILABLE" in stderr and "Traceback" not in stderr
    stdout, stderr = lenient.communicate(prompt + "\n", timeout=60)
    assert lenient.returncode == 0, stderr
    assert prompt in stdout and "chunk 1 went on without neighbours (OFF)" in stdout and "UNAVAILABLE" in stdout
