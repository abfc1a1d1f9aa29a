import gzip
import hashlib
import json

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_data import SAMPLE, write_jsonl

from retro_jax.data.text import ReadCounts, expand_inputs, read_documents
from retro_jax.errors import UserError


def read(*paths, **options):
    counts = ReadCounts()
    return list(read_documents(paths, counts=counts, **options)), counts


def content(documents):
    return [(document.id, document.text, document.group, document.metadata) for document in documents]


def test_the_same_lines_read_alike_plain_gzipped_and_in_zstandard_frames(tmp_path):
    plain = SAMPLE.read_bytes()
    (tmp_path / "a.jsonl").write_bytes(plain)
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(plain)
    cut = len(plain) // 3
    frames = [zstandard.ZstdCompressor().compress(part) for part in (plain[:cut], plain[cut:])]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    expected, counts = read(tmp_path / "a.jsonl")
    assert counts.documents == len(expected) == len(plain.splitlines())
    assert expected[0].metadata["title"] == "Switzerland"
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        documents, counts = read(tmp_path / name)
        assert content(documents) == content(expected)
        assert counts.position == (tmp_path / name).stat().st_size


def test_id_and_group_have_defaults(tmp_path):
    records = [{"text": "a"}, {"text": "b", "id": "x"}, {"text": "c", "id": 7, "group": "g"}]
    documents, _ = read(write_jsonl(tmp_path / "f.jsonl", records))
    assert [(document.id, document.group) for document in documents] == [
        ("f.jsonl:1", "sha256:" + hashlib.sha256(b"a").hexdigest()),
        ("x", "x"),
        ("7", "g"),
    ]


def test_files_of_one_name_in_two_directories_have_distinct_ids(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "f.jsonl", [{"text": name}])
    documents, _ = read(tmp_path / "one" / "f.jsonl", tmp_path / "two" / "f.jsonl")
    assert [document.id for document in documents] == ["one/f.jsonl:1", "two/f.jsonl:1"]


def test_only_strings_among_the_known_keys_become_metadata(tmp_path):
    record = {"text": "a", "title": "T", "url": 5, "language": "en", "other": "x"}
    (document,), _ = read(write_jsonl(tmp_path / "f.jsonl", [record]))
    assert document.metadata == {"title": "T", "language": "en"}


def test_blank_lines_and_a_byte_order_mark_are_no_documents_and_empty_ones_are_counted(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": " \\n "}\n{"text": ""}\n{"text": "b"}')
    documents, counts = read(path)
    assert [document.text for document in documents] == ["a", "b"]
    assert (counts.documents, counts.empty_documents, counts.bad_lines) == (2, 2, 0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff\xfe"}', "not UTF-8 \\(byte 0xff at column 11\\)"),
        (b'{"text": "a"', "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"txt": "a"}', 'has no "text"'),
        (b'{"text": null}', '"text" is not a string'),
        (b'{"text": "a", "id": ["x"]}', '"id" is neither'),
        (b'{"text": "a", "group": true}', '"group" is neither'),
        (b'{"text": "\\ud800 lone"}', '"text" holds a lone surrogate'),
        (b'{"text": "a", "title": "\\udfff"}', '"title" holds a lone surrogate'),
        (b"[" * 100_000, "not JSON"),
    ],
    ids=range(10),
)
def test_bad_line_is_named_or_counted(tmp_path, line, message):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n')
    with pytest.raises(UserError, match=rf"f\.jsonl:3: {message}") as error:
        read(path)
    assert "\n" not in str(error.value)
    documents, counts = read(path, skip_bad=True)
    assert [document.text for document in documents] == ["first", "last"]
    assert counts.bad_lines == 1


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "another format"])
def test_damaged_compressed_file_is_named(tmp_path, suffix, damage):
    plain = SAMPLE.read_bytes()
    data = bytearray(
        gzip.compress(plain) if suffix.endswith("gz") else zstandard.ZstdCompressor(write_checksum=True).compress(plain)
    )
    if damage == "truncated":
        del data[-9:]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0x55
    else:
        data = bytearray(plain)
    path = tmp_path / f"f{suffix}"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"f{suffix}:\d+: "):
        read(path)
    _, counts = read(path, skip_bad=True)
    assert counts.bad_lines >= 1


@settings(deadline=None, max_examples=150)
@given(text=st.text(st.sampled_from("ab \né日\U0001f600\r"), max_size=120), piece=st.integers(4, 40))
def test_pieces_of_a_text_file_join_to_it_and_end_at_line_ends(tmp_path_factory, text, piece):
    path = tmp_path_factory.getbasetemp() / "pieces.txt"
    data = text.encode()
    path.write_bytes(data)
    documents, counts = read(path, piece_bytes=piece)
    if counts.empty_documents == 0:
        assert "".join(document.text for document in documents) == text
    assert len({document.group for document in documents}) <= 1
    for document in documents:
        assert len(document.text.encode()) <= 2 * piece
    assert len({document.id for document in documents}) == len(documents)
    longest = max((len(line) for line in data.split(b"\n")), default=0)
    if longest < piece:
        assert all(document.text.endswith("\n") for document in documents[:-1])


def test_small_text_file_is_one_document_named_after_it(tmp_path):
    (tmp_path / "note.txt").write_bytes("\ufeffline\r\nline\n".encode())
    (document,), _ = read(tmp_path / "note.txt")
    assert (document.id, document.text, document.group) == (
        "note.txt",
        "line\r\nline\n",
        "sha256:" + hashlib.sha256(b"line\r\nline\n").hexdigest(),
    )


def test_bad_line_of_a_text_file_is_named_or_left_out(tmp_path):
    path = tmp_path / "f.txt"
    path.write_bytes(b"one\ntwo\nth\xffree\nfour\n")
    for piece in (5, 1000):
        with pytest.raises(UserError, match=r"f\.txt:3: not UTF-8 \(byte 0xff at column 3\)"):
            read(path, piece_bytes=piece)
        documents, counts = read(path, piece_bytes=piece, skip_bad=True)
        assert "".join(document.text for document in documents) == "one\ntwo\nfour\n"
        assert counts.bad_lines == 1


def test_documents_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "b"}\nbroken\n')
    documents = read_documents([path])
    assert [next(documents).text, next(documents).text] == ["a", "b"]
    with pytest.raises(UserError, match=r"f\.jsonl:3"):
        next(documents)


def test_inputs_are_paths_patterns_and_lists(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c[1].txt"):
        (tmp_path / name).write_text(json.dumps({"text": "x"}))
    names = [path.name for path in expand_inputs(f"{tmp_path}/*.jsonl,{tmp_path}/c[1].txt,{tmp_path}/a.jsonl")]
    assert names == ["a.jsonl", "b.jsonl", "c[1].txt"]
    assert [path.name for path in expand_inputs([f"{tmp_path}/b.jsonl"])] == ["b.jsonl"]


def test_inputs_that_are_missing_or_of_another_kind_are_named(tmp_path):
    (tmp_path / "x.csv").write_text("a")
    for pattern, message in (
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("*.jsonl", "no such file"),
        ("x.csv", "x.csv: unknown kind of file"),
        (".", "is a directory; name its files"),
    ):
        with pytest.raises(UserError, match=message):
            expand_inputs(str(tmp_path / pattern))
    with pytest.raises(UserError, match="no input files"):
        expand_inputs(" , ")
    with pytest.raises(UserError, match="no such file"):
        list(read_documents([tmp_path / "nowhere.jsonl"]))
