import json
import random

import numpy as np
import pytest
from sample_data import write_jsonl

from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.distribute import BeamOptions
from retro_jax.data.duplicates import find_duplicates, read_titles, title_key
from retro_jax.data.shingles import jaccard, shingles
from retro_jax.data.text import read_documents
from retro_jax.errors import UserError

N = 5


def some_words(rng, count):
    return [f"w{rng.randrange(3000)}" for _ in range(count)]


def edited(rng, found, edits):
    """The words with some of them replaced."""
    found = list(found)
    for place in rng.sample(range(len(found)), edits):
        found[place] = f"new{rng.randrange(10**6)}"
    return found


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """(training files, evaluation files): 60 training documents are edited copies of evaluation documents."""
    root = tmp_path_factory.mktemp("planted")
    rng = random.Random(0)
    evaluation = [some_words(rng, 300) for _ in range(40)]
    files = [
        write_jsonl(
            root / f"valid-{i}.jsonl", [{"id": f"v{j}", "text": " ".join(evaluation[j])} for j in range(i, 40, 2)]
        )
        for i in range(2)
    ]
    training = [some_words(rng, 300) for _ in range(60)]
    training += [edited(rng, evaluation[i % 40], edits) for i, edits in enumerate([0, 1, 3, 5, 6, 7, 8, 9, 12, 20] * 6)]
    rng.shuffle(training)
    documents = [{"id": f"t{i}", "text": " ".join(found)} for i, found in enumerate(training)]
    documents += [{"id": "short", "text": "too short"}, {"id": "title", "title": "Hi-Fi", "text": "some article"}]
    train = [write_jsonl(root / f"train-{i}.jsonl", documents[i::3]) for i in range(3)]
    return train, files


def expected(train, evaluation, threshold=0.8):
    """Ids of the documents to remove, by comparing every pair."""
    sets = {document.id: set(shingles(document.text, N).tolist()) for document in read_documents(evaluation)}
    result = {}
    for document in read_documents(train):
        found = set(shingles(document.text, N).tolist())
        best = max((jaccard(len(found & other), len(found), len(other)), name) for name, other in sets.items())
        if best[0] >= threshold:
            result[document.id] = best
    return result


def removed(directory):
    return {
        record["id"]: record
        for path in sorted(directory.glob("removed-*.jsonl"))
        for record in map(json.loads, path.read_text().splitlines())
    }


@pytest.mark.parametrize("mode", ["exact", "minhash"])
def test_both_modes_remove_what_comparing_every_pair_removes(planted, tmp_path, mode):
    train, evaluation = planted
    manifest = find_duplicates(train, evaluation, tmp_path / "out", n=N, mode=mode)
    wanted = expected(train, evaluation)
    found = removed(tmp_path / "out")
    assert found.keys() == wanted.keys() and 20 < len(wanted) < 60
    for name, (similarity, other) in wanted.items():
        assert found[name]["reason"] == "near_duplicate"
        assert (found[name]["of"], found[name]["similarity"]) == (other, round(similarity, 4))
    assert manifest.counts["documents"] == 122 and manifest.counts["near_duplicates"] == len(wanted)
    assert manifest.counts["mode"] == mode
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["manifest.json", *(shard.name for shard in manifest.shards)]
    )


def test_automatic_mode_depends_on_the_size_of_the_table(planted, tmp_path):
    train, evaluation = planted
    for limit, mode in ((10**6, "exact"), (100, "minhash")):
        manifest = find_duplicates(train, evaluation, tmp_path / mode, n=N, table_limit=limit)
        assert manifest.counts["mode"] == mode


def test_several_processes_find_the_same(planted, tmp_path):
    train, evaluation = planted
    one = find_duplicates(train, evaluation, tmp_path / "one", n=N)
    two = find_duplicates(train, evaluation, tmp_path / "two", n=N, options=BeamOptions(workers=2))
    assert one == two


def test_listed_titles_are_removed_and_so_are_texts_shorter_than_a_shingle(planted, tmp_path):
    train, _ = planted
    (tmp_path / "titles.txt").write_text("Something else\nhi @-@ fi\n")
    short = write_jsonl(tmp_path / "short.jsonl", [{"id": "v", "text": "Too  short"}])
    manifest = find_duplicates(train, [short], tmp_path / "out", titles=tmp_path / "titles.txt", n=N)
    found = removed(tmp_path / "out")
    assert {name: record["reason"] for name, record in found.items()} == {"short": "near_duplicate", "title": "title"}
    assert found["title"]["title"] == "Hi-Fi"
    assert (manifest.counts["titles"], manifest.counts["title_bytes"]) == (1, len("some article"))
    alone = find_duplicates(train, [], tmp_path / "alone", titles=tmp_path / "titles.txt", n=N)
    assert (alone.counts["titles"], alone.counts["near_duplicates"]) == (1, 0)


def test_titles_are_headings_of_wikitext_or_lines(tmp_path):
    path = tmp_path / "titles"
    path.write_text(" \n = Robert Boulter = \n \n Robert is . \n = = Career = = \n = Hi @-@ fi = \n")
    assert read_titles(path) == {"robertboulter", "hifi"}
    path.write_text("Robert Boulter\n\nHi-fi\n")
    assert read_titles(path) == {"robertboulter", "hifi"}
    assert title_key("Ｆull_Width (2010)") == "fullwidth2010"
    path.write_text("\n")
    with pytest.raises(UserError, match="there is no title"):
        read_titles(path)
    with pytest.raises(UserError, match="no such file"):
        read_titles(tmp_path / "absent")


def test_corpus_leaves_the_duplicates_out_and_keeps_everything_else(planted, tokenizer, tmp_path):
    train, evaluation = planted
    find_duplicates(train, evaluation, tmp_path / "duplicates", n=N)
    gone = removed(tmp_path / "duplicates").keys()
    manifest = build_corpus(train[:2], tokenizer, tmp_path / "corpus", exclusions=tmp_path / "duplicates")
    corpus = Corpus(tmp_path / "corpus")
    kept = [corpus.document(i).id for i in range(corpus.num_documents)]
    assert kept == [document.id for document in read_documents(train[:2]) if document.id not in gone]
    assert manifest.counts["excluded_documents"] == 82 - len(kept) > 0
    assert "exclusions" in manifest.inputs
    with pytest.raises(UserError, match=r"valid-0\.jsonl: .* was not made for this file"):
        build_corpus(evaluation, tokenizer, tmp_path / "other", exclusions=tmp_path / "duplicates")


def test_an_id_that_only_an_excluded_document_used_before_is_free(tokenizer, tmp_path):
    text = " ".join(f"word{i}" for i in range(40))
    train = write_jsonl(tmp_path / "t.jsonl", [{"id": "x", "text": text}, {"id": "x", "text": "another " * 90}])
    valid = write_jsonl(tmp_path / "v.jsonl", [{"id": "v", "text": text}])
    with pytest.raises(UserError, match="the id 'x' was already used"):
        build_corpus([train], tokenizer, tmp_path / "corpus", chunk_length=8)
    find_duplicates([train], [valid], tmp_path / "duplicates")
    manifest = build_corpus([train], tokenizer, tmp_path / "corpus", chunk_length=8, exclusions=tmp_path / "duplicates")
    assert (manifest.counts["documents"], manifest.counts["excluded_documents"]) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "quick"}, "mode 'quick' is none of auto, exact, minhash"),
        ({"threshold": 0.0}, "the threshold above 0"),
        ({"n": 0}, "n must be at least 1"),
        ({"evaluation": []}, "nothing to compare"),
    ],
)
def test_settings_that_cannot_be_are_refused(planted, tmp_path, changes, message):
    train, evaluation = planted
    with pytest.raises(UserError, match=message):
        find_duplicates(**{"inputs": train, "evaluation": evaluation, "directory": tmp_path / "out", **changes})
    assert not (tmp_path / "out").exists()


def test_bad_line_of_an_evaluation_file_is_named_and_leaves_nothing(planted, tmp_path):
    train, evaluation = planted
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1: not UTF-8"):
        find_duplicates(train, [*evaluation, bad], tmp_path / "out", n=N)
    assert not (tmp_path / "out").exists()
    bad.write_text('{"text": "mended"}\n')
    find_duplicates(train, [*evaluation, bad], tmp_path / "out", n=N)


def test_recall_on_planted_near_duplicates(tmp_path):
    """Of pairs with Jaccard 0.75 to 0.95, both modes remove those at 0.8 and more, and nothing below."""
    rng = random.Random(1)
    originals = [some_words(rng, 600) for _ in range(250)]
    copies = [edited(rng, found, rng.randrange(1, 18)) for found in originals]
    train = write_jsonl(tmp_path / "t.jsonl", [{"id": str(i), "text": " ".join(c)} for i, c in enumerate(copies)])
    valid = write_jsonl(tmp_path / "v.jsonl", [{"id": str(i), "text": " ".join(o)} for i, o in enumerate(originals)])
    wanted = expected([train], [valid])
    similarities = np.array([value for value, _ in expected([train], [valid], 0.0).values()])
    assert ((similarities > 0.75) & (similarities < 0.95)).sum() > 150
    for mode, recall in (("exact", 1.0), ("minhash", 0.99)):
        find_duplicates([train], [valid], tmp_path / mode, n=N, mode=mode)
        found = removed(tmp_path / mode).keys()
        assert found <= wanted.keys()
        assert len(found) >= recall * len(wanted)
