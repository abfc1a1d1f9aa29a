import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_data import write_jsonl

from retro_jax.data.sources import Source, repeated_rows, write_digests
from retro_jax.data.stage import ShardWriter
from retro_jax.data.text import ReadCounts
from retro_jax.errors import UserError

FILES = st.lists(st.lists(st.integers(0, 12), max_size=8), min_size=1, max_size=4)


def digests(directory, sources):
    writer = ShardWriter(directory)
    for i, source in enumerate(sources):
        write_digests(writer, {"source": dataclasses.asdict(source), "shard": f"{i}.npy"})
    return [directory / f"{i}.npy" for i in range(len(sources))]


@settings(deadline=None, max_examples=40)
@given(files=FILES, merged_at_once=st.integers(1, 40))
def test_ids_used_before_are_found_whatever_is_merged_at_once(tmp_path_factory, files, merged_at_once):
    directory = tmp_path_factory.mktemp("ids")
    sources = []
    for i, file in enumerate(files):
        path = write_jsonl(directory / f"{i}.jsonl", [{"id": str(number), "text": "words"} for number in file])
        sources.append(Source(str(path), str(directory), skip_bad=True))
    seen: dict[int, tuple[int, int]] = {}
    expected = [[] for _ in files]
    first = None
    for i, file in enumerate(files):
        for row, number in enumerate(file):
            if number in seen:
                first = first or (i, row)
                expected[i].append(row)
            seen.setdefault(number, (i, row))
    paths = digests(directory, sources)
    found = repeated_rows(sources, paths, merged_at_once=merged_at_once)
    assert [rows.tolist() for rows in found] == expected
    strict = [dataclasses.replace(source, skip_bad=False) for source in sources]
    if first is None:
        repeated_rows(strict, paths, merged_at_once=merged_at_once)
        return
    with pytest.raises(UserError, match=rf"{first[0]}\.jsonl:{first[1] + 1}: the id '\d+' was already used at"):
        repeated_rows(strict, paths, merged_at_once=merged_at_once)


def test_rows_named_in_a_file_are_left_out_and_the_others_keep_their_numbers(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("one", " ", "two", "three")])
    (tmp_path / "out.jsonl").write_text('{"row": 1, "id": "two"}\n')
    source = Source(str(path), str(tmp_path), skip_bad=False, excluded=str(tmp_path / "out.jsonl"))
    counts = ReadCounts()
    assert [(row, document.text) for row, document in source.documents(counts)] == [(0, "one"), (2, "three")]
    assert (counts.documents, counts.empty_documents) == (3, 1)
    assert source.document(2).place.endswith("a.jsonl:4")
    assert np.load(digests(tmp_path, [source])[0]).shape == (2,)
