"""A disk that fills while an index is built costs one line and no shard that was finished."""

import sys

import numpy as np
from test_full_disk import on_a_small_disk

from retro_jax.data.stage import load_manifest
from retro_jax.retrieval.index import Index


def test_an_index_stops_at_a_full_disk_and_goes_on(make_embeddings, tmp_path):
    vectors = np.random.default_rng(0).normal(size=(4000, 32)).astype(np.float32)
    embeddings = make_embeddings([vectors])
    output = tmp_path / "disk" / "index"
    command = (
        f"{sys.executable} tools/build_index.py --embeddings={embeddings.directory} --output={output} --num_shards=4 "
        f"--kind=tree --min_recall=0.3; "
        f"s=$?; ls -A {output} | sed 's/^/left: /' >&2; (exit $s)"
    )
    stderr = on_a_small_disk(tmp_path, "512k", command)
    first, second = stderr.split("status: ")[0], stderr.split("status: ")[1:]
    errors = [line for line in first.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in first, first
    assert "no space left on the device" in errors[0] or "is the disk full?" in errors[0], errors[0]
    assert [part.splitlines()[0] for part in second] == ["1", "0"], stderr
    left = [line.removeprefix("left: ") for line in first.splitlines() if line.startswith("left: ")]
    assert "shard-00000-of-00004" in left and not any(name.startswith(".tmp-") and "shard" in name for name in left)
    index = Index.load(tmp_path / "result" / "index")
    assert index.size == 4000 and load_manifest(tmp_path / "result" / "index", "index")
    # Trees of a recall of 0.3 and more, learnt anew each time; ids that were mixed up would find next to nothing.
    assert (index.search(vectors, 1)[0][:, 0] == np.arange(4000)).mean() > 0.5
