"""The database is the knowledge: a running sampler's answers change with the documents, and no weight is touched."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from riddle_run import make_riddle_run, write_documents
from serving import serving
from small_run import program, run_program
from tiny_bert import write_tiny_bert

from retro_jax.inference.decoding import Decoding
from retro_jax.inference.sampling import Request, Sampler
from retro_jax.inference.text import begins_with
from retro_jax.retrieval.embedder import Embedder
from retro_jax.retrieval.live import LiveDatabase
from retro_jax.retrieval.service.client import RetrievalClient
from retro_jax.retrieval.update import add_documents, remove_documents
from retro_jax.training.trained import load_trained

GREEDY = Decoding(temperature=0)
GUESSED = 0.3  # an answer is one of sixteen


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def embedder(bert):
    return Embedder.load(bert, normalize=True, max_length=64, lengths=(64,), rows_per_device=8)


@pytest.fixture(scope="module")
def riddles(embedder, tmp_path_factory):
    return make_riddle_run(tmp_path_factory.mktemp("riddles"), embedder)


@pytest.fixture(scope="module")
def run(riddles):
    return load_trained(riddles.workdir)


@pytest.fixture
def database(riddles, tmp_path):
    return shutil.copytree(riddles.database, tmp_path / "database")


@pytest.fixture
def late(riddles, tmp_path):
    return write_documents(tmp_path / "late.jsonl", riddles.late)


def ask(run, sampler, riddles):
    """Share of right answers, and the ids of the chunks that were retrieved."""
    texts, ids = [[] for _ in riddles], [np.zeros(0, int)]
    requests = [Request(run.tokenizer.encode(riddle.words)) for riddle in riddles]
    for index, token in sampler.generate_batch(requests, max_new_tokens=3, decoding=GREEDY):
        texts[index].append(token.token)
        ids += [chunk.ids for chunk in token.retrieved]
    answers = [run.tokenizer.decode(tokens) for tokens in texts]
    right = [begins_with(text, riddle.answer) for text, riddle in zip(answers, riddles, strict=True)]
    return np.mean(right), np.concatenate(ids)


def sampler_of(run, retriever):
    options = {"vocab_size": run.tokenizer.vocab_size, "neighbours": 1, "max_context": 16, "mesh": run.mesh}
    return Sampler(run.config.model, run.plan, run.params, retriever=retriever, **options)


def test_what_was_never_trained_on_is_looked_up_and_without_the_database_guessed(riddles, run, embedder):
    assert ask(run, sampler_of(run, LiveDatabase(riddles.database, embedder)), riddles.known)[0] >= 0.9
    assert ask(run, sampler_of(run, None), riddles.known)[0] <= GUESSED


def follow_changes(riddles, run, embedder, database, late, retriever, refresh):
    """Asks a sampler that is never made anew, before and after documents are added and removed."""
    sampler, names = sampler_of(run, retriever), {riddle.words for riddle in riddles.late}
    assert ask(run, sampler, riddles.late)[0] <= GUESSED
    add_documents(database, [late], embedder)
    assert ask(run, sampler, riddles.late)[0] <= GUESSED  # until it is told to look
    refresh()
    right, ids = ask(run, sampler, riddles.late)
    assert right >= 0.9
    assert {document for document, _ in retriever.documents(ids)} == names
    remove_documents(database, ids=names)
    refresh()
    right, ids = ask(run, sampler, riddles.late)
    assert right <= GUESSED
    assert not names & {document for document, _ in retriever.documents(ids)}


def test_a_running_sampler_learns_and_forgets_with_a_database_here(riddles, run, embedder, database, late):
    live = LiveDatabase(database, embedder)

    def refresh():
        assert live.refresh() and not live.refresh()

    follow_changes(riddles, run, embedder, database, late, live, refresh)


@pytest.mark.slow  # the same with a database here, above; searches by a service equal those here
def test_a_running_sampler_learns_and_forgets_with_a_service(riddles, run, embedder, bert, database, late):
    flags = (f"--database={database}", f"--embedder={bert}", "--reload_seconds=0.1")
    with serving(*flags) as (address, _), RetrievalClient(address) as client:

        def refresh():
            while not client.refresh():  # the service looks for changes by itself
                pass

        follow_changes(riddles, run, embedder, database, late, client, refresh)


def test_the_program_reads_prompts_line_by_line_and_follows_the_database(
    riddles, embedder, bert, database, late, tmp_path
):
    riddle, output = riddles.late[0], tmp_path / "answers.json"
    flags = [f"--workdir={riddles.workdir}", f"--database={database}", f"--embedder={bert}", f"--output={output}"]
    flags += ["--interactive", "--temperature=0", "--stop=.", "--max_new_tokens=4"]
    process = program("launch/sample.py", *flags, stdin=subprocess.PIPE)

    def answer():
        process.stdin.write(riddle.words + "\n")
        process.stdin.flush()
        return next(line for line in process.stdout if line.startswith(riddle.words))

    before = answer()
    add_documents(database, [late], embedder)
    after = answer()
    remove_documents(database, ids=[riddle.words])
    removed = answer()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert after.startswith(f"{riddle.words} {riddle.answer}") and after not in (before, removed)
    assert stderr.count("the database has changed") == 2
    results = json.loads(output.read_text())["results"]
    documents = [{entry["document"] for entry in each["neighbours"]} for each in results]
    assert [riddle.words in each for each in documents] == [False, True, False]


def test_many_prompts_are_answered_and_counted(riddles, bert, tmp_path):
    questions, output = tmp_path / "questions.jsonl", tmp_path / "answers.json"
    rows = [{"prompt": riddle.words, "answer": riddle.answer} for riddle in riddles.known[:20]]
    questions.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": riddles.late[0].words}]))
    flags = [f"--workdir={riddles.workdir}", f"--database={riddles.database}", f"--embedder={bert}"]
    flags += [f"--prompts={questions}", "--temperature=0", "--stop=.", "--max_new_tokens=4", f"--output={output}"]
    status, stdout, stderr = run_program("launch/sample.py", *flags)
    assert status == 0, stderr
    result = json.loads(output.read_text())
    right = sum(each["samples"][0].get("right", False) for each in result["results"])
    assert len(result["results"]) == 21 and result["asked"] == 20 and result["right"] == right >= 18
    assert f"{right} of 20 answers are right ({right / 20:.1%})" in stdout
    assert stdout.count("[right]") == right and stdout.count("[wrong, ") == 20 - right


def test_a_service_that_is_lost_is_an_error_or_means_off_and_is_told(riddles, bert):
    prompt = riddles.known[0].words
    flags = [f"--workdir={riddles.workdir}", "--interactive", "--temperature=0", "--max_new_tokens=4"]
    with serving(f"--database={riddles.database}", f"--embedder={bert}") as (address, server):
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
