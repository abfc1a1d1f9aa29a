import errno
import json
from pathlib import Path

import numpy as np
import pytest

from retro_jax.data import stage as stage_module
from retro_jax.data.arrays import save_array
from retro_jax.data.stage import ShardWriter, Stage, load_manifest, shard_name, verify_checksums
from retro_jax.errors import UserError
from retro_jax.files import atomic_write, write_json

NAMES = [shard_name("part", i, 3, ".txt") for i in range(3)]
SETTINGS = {"size": 7, "nested": {"seed": 0}}


def run_stage(directory, *, settings=SETTINGS, inputs=None, fail_at=None, written=None):
    """A stage of three shards that fails while it writes shard `fail_at`."""
    with Stage(directory, "parts", settings=settings, inputs=inputs or {"corpus": "abc"}) as stage:
        if stage.complete:
            return stage.manifest
        for i, name in enumerate(NAMES):
            if stage.has(name):
                continue
            with stage.shard(name) as (path, counts):
                path.write_text(f"content {i}\n" * (i + 1))
                if i == fail_at:
                    raise KeyboardInterrupt
                counts["rows"] = i + 1
            if written is not None:
                written.append(i)
        return stage.finish({"rows": sum(stage.counts(name)["rows"] for name in NAMES)})


def files(directory):
    return sorted(path.name for path in directory.iterdir())


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "a" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError
    assert path.read_text() == "old"
    assert files(path.parent) == ["file.txt"]


def test_finished_stage_holds_shards_and_manifest_and_nothing_else(tmp_path):
    manifest = run_stage(tmp_path / "out")
    assert files(tmp_path / "out") == sorted([*NAMES, "manifest.json"])
    assert manifest.counts == {"rows": 6}
    assert [shard.name for shard in manifest.shards] == NAMES
    assert load_manifest(tmp_path / "out", "parts") == manifest
    verify_checksums(tmp_path / "out", manifest.shards)


def test_interrupted_stage_goes_on_behind_its_last_finished_shard(tmp_path):
    whole = run_stage(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "out", fail_at=2)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(UserError, match="begun and not finished"):
        load_manifest(tmp_path / "out", "parts")
    (tmp_path / "out" / f".tmp-123-{NAMES[2]}").write_text("left behind by a killed process")
    written = []
    assert run_stage(tmp_path / "out", written=written) == whole
    assert written == [2]
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_shard_without_its_side_file_is_written_again(tmp_path):
    whole = run_stage(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "out", fail_at=2)
    (tmp_path / "out" / f"{NAMES[0]}.done.json").unlink()
    (tmp_path / "out" / NAMES[1]).write_text("cut")
    written = []
    assert run_stage(tmp_path / "out", written=written) == whole
    assert written == [0, 1, 2]


def test_finished_stage_is_not_made_again(tmp_path):
    first = run_stage(tmp_path / "out")
    written = []
    assert run_stage(tmp_path / "out", written=written) == first
    assert written == []


@pytest.mark.parametrize("fail_at", [None, 2])
def test_other_settings_or_inputs_are_refused_by_name(tmp_path, fail_at):
    if fail_at is None:
        run_stage(tmp_path / "out")
    else:
        with pytest.raises(KeyboardInterrupt):
            run_stage(tmp_path / "out", fail_at=fail_at)
    with pytest.raises(UserError, match=r"settings\.nested\.seed = 0, now it is 1"):
        run_stage(tmp_path / "out", settings={"size": 7, "nested": {"seed": 1}})
    with pytest.raises(UserError, match=r"inputs\.corpus = abc, now it is xyz"):
        run_stage(tmp_path / "out", inputs={"corpus": "xyz"})
    with pytest.raises(UserError, match=r"settings\.size = 7, now it is absent"):
        run_stage(tmp_path / "out", settings={"nested": {"seed": 0}})


def test_stage_that_finished_nothing_leaves_no_trace(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "out", fail_at=0)
    assert not (tmp_path / "out").exists()
    run_stage(tmp_path / "out", settings={"size": 8})


def test_stage_killed_while_it_wrote_its_plan_can_be_started_again(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".tmp-123-plan.json").write_text("{")
    run_stage(tmp_path / "out")
    assert files(tmp_path / "out") == sorted([*NAMES, "manifest.json"])


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run_stage(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        run_stage(tmp_path / "notes.txt")
    run_stage(tmp_path / "out")
    with pytest.raises(UserError, match="holds the parts stage; expected corpus"):
        load_manifest(tmp_path / "out", "corpus")
    with pytest.raises(UserError, match="no such directory"):
        load_manifest(tmp_path / "nowhere", "parts")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_missing_and_truncated_shards_are_named(tmp_path):
    run_stage(tmp_path / "out")
    shard = tmp_path / "out" / NAMES[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{NAMES[1]}: 19 bytes, the manifest says 20"):
        load_manifest(tmp_path / "out", "parts")
    shard.unlink()
    with pytest.raises(UserError, match=rf"{NAMES[1]}: shard is missing"):
        load_manifest(tmp_path / "out", "parts")


def test_flipped_byte_is_found_by_the_checksum_and_named(tmp_path):
    manifest = run_stage(tmp_path / "out")
    shard = tmp_path / "out" / NAMES[2]
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    load_manifest(tmp_path / "out", "parts")
    with pytest.raises(UserError, match=rf"{NAMES[2]}: checksum differs"):
        verify_checksums(tmp_path / "out", manifest.shards)


def test_damaged_or_newer_manifest_is_refused(tmp_path):
    run_stage(tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    content = json.loads(path.read_text())
    write_json(path, {**content, "format_version": 99})
    with pytest.raises(UserError, match="format version 99"):
        load_manifest(tmp_path / "out", "parts")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="not a manifest"):
        load_manifest(tmp_path / "out", "parts")


def test_fingerprint_changes_with_anything_in_the_manifest(tmp_path):
    one = run_stage(tmp_path / "one")
    assert one.fingerprint == run_stage(tmp_path / "two").fingerprint
    assert one.fingerprint != run_stage(tmp_path / "three", inputs={"corpus": "xyz"}).fingerprint


def test_a_shard_whose_side_file_cannot_be_written_is_made_again(tmp_path, monkeypatch):
    def full_disk(path, value):
        if str(path).endswith(".done.json"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "write_json", full_disk)
        with pytest.raises(OSError, match="No space left"):
            run_stage(tmp_path / "stage")
    assert run_stage(tmp_path / "stage").counts == {"rows": 6}


def test_side_files_left_by_a_kill_behind_the_manifest_are_removed(tmp_path):
    run_stage(tmp_path / "stage")
    before = files(tmp_path / "stage")
    for name in ("plan.json", f"{NAMES[0]}.done.json", ".lock"):
        (tmp_path / "stage" / name).write_text("{}")
    run_stage(tmp_path / "stage")
    assert files(tmp_path / "stage") == before


def test_a_kill_while_a_shard_is_taken_back_leaves_nothing_of_it(tmp_path, monkeypatch):
    def build():
        with Stage(tmp_path / "stage", "parts", settings=SETTINGS, inputs={}) as stage:
            for name in ("help.txt", "part.txt"):
                if not stage.has("part.txt"):
                    with stage.shard(name) as (path, _):
                        path.write_text(name)
            stage.keep(["part.txt"])
            stage.finish({})

    unlink = Path.unlink

    def unlink_and_die(path, **options):
        unlink(path, **options)
        if path.name.startswith("help.txt"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_and_die)
        with pytest.raises(KeyboardInterrupt):
            build()
    build()
    assert files(tmp_path / "stage") == ["manifest.json", "part.txt"]


def write_pair(writer, text, meanwhile=lambda: None):
    """A folder of two files with the same text; `meanwhile` is called between them."""
    with writer.folder("pair") as folder:
        for name in ("one.txt", "two.txt"):
            with folder.shard(name) as (path, counts):
                path.write_text(text)
                counts["text"] = text
            meanwhile()
            meanwhile = lambda: None  # noqa: E731


def pair(directory):
    return {path.name: path.read_text() for path in (directory / "pair").glob("*.txt")}


def test_a_folder_is_of_one_writer_when_two_write_it_at_a_time(tmp_path):
    with Stage(tmp_path, "parts", settings=SETTINGS, inputs={}) as stage:
        write_pair(ShardWriter(tmp_path), "aa", meanwhile=lambda: write_pair(ShardWriter(tmp_path), "bb"))
        assert pair(tmp_path) == {"one.txt": "bb", "two.txt": "bb"}
        stage.reload()
        assert [stage.counts(f"pair/{name}.txt")["text"] for name in ("one", "two")] == ["bb", "bb"]
        manifest = stage.finish({})
    assert [shard.name for shard in manifest.shards] == ["pair/one.txt", "pair/two.txt"]
    verify_checksums(tmp_path, manifest.shards)
    assert files(tmp_path) == ["manifest.json", "pair"] and files(tmp_path / "pair") == ["one.txt", "two.txt"]


def test_a_folder_that_is_not_finished_is_not_there(tmp_path):
    with Stage(tmp_path, "parts", settings=SETTINGS, inputs={}) as stage:
        with stage.shard(NAMES[0]) as (path, _):
            path.write_text("finished")

        def look():
            stage.reload()
            assert not stage.has("pair/one.txt") and not (tmp_path / "pair").exists()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_pair(ShardWriter(tmp_path), "aa", meanwhile=look)
        (tmp_path / ".tmp-run").touch()
        with pytest.raises(UserError, match="is over"):
            write_pair(ShardWriter(tmp_path, run=".tmp-run"), "aa", meanwhile=(tmp_path / ".tmp-run").unlink)
        assert files(tmp_path) == [".lock", NAMES[0], f"{NAMES[0]}.done.json", "plan.json"]
        # What a process that was killed leaves behind.
        (tmp_path / ".tmp-1-pair" / "deeper").mkdir(parents=True)
        (tmp_path / ".tmp-1-pair" / "deeper" / ".tmp-2").touch()
    with Stage(tmp_path, "parts", settings=SETTINGS, inputs={}) as stage:
        assert stage.has(NAMES[0]) and ".tmp-1-pair" not in files(tmp_path)


def test_a_folder_is_taken_back_whole(tmp_path):
    with Stage(tmp_path, "parts", settings=SETTINGS, inputs={}) as stage:
        write_pair(ShardWriter(tmp_path), "aa")
        stage.reload()
        (tmp_path / "pair" / "two.txt").unlink()
        stage.drop_folder("pair")
        assert not stage.has("pair/one.txt") and not (tmp_path / "pair").exists()
        stage.drop_folder("pair")
        write_pair(ShardWriter(tmp_path), "bb")
        assert pair(tmp_path) == {"one.txt": "bb", "two.txt": "bb"}


@pytest.mark.parametrize("rows", [np.ones((3, 2), "<i8"), np.ones(5, [("a", "<i8", (2,)), ("b", "<f4")]), np.zeros(0)])
def test_arrays_are_written_as_numpy_does(tmp_path, rows):
    save_array(tmp_path / "ours.npy", rows)
    np.save(tmp_path / "numpy.npy", rows)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_a_full_disk_is_told_with_the_name_of_the_shard(tmp_path):
    """/dev/full is a disk without space; NumPy's own message for it has neither number nor name."""
    with Stage(tmp_path, "parts", settings=SETTINGS, inputs={}) as stage:
        with pytest.raises(OSError) as raised, stage.shard("rows.npy") as (path, _):
            path.symlink_to("/dev/full")
            save_array(path, np.zeros(100_000))
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "rows.npy"))
        with pytest.raises(OSError) as raised, stage.shard("text.txt") as (path, _):
            path.symlink_to("/dev/full")
            path.write_text("text")
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "text.txt"))
