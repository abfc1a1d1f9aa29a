"""BM25's neighbours and BM25's order from the command line, on a database that has a corpus and nothing else."""

import numpy as np
from small_run import error_line, run_program

from retro_jax.data.corpus import Corpus
from retro_jax.retrieval.neighbours import NeighbourTable


def test_candidates_are_found_and_put_into_order(small_data, tmp_path):
    corpus, database = f"--corpus={small_data.corpus}", f"--database={small_data.database}"
    found, reranked = tmp_path / "found", tmp_path / "reranked"
    status, stdout, stderr = run_program(
        "tools/find_neighbours.py", corpus, database, "--retriever=bm25", "--k1=0", "--k=6", f"--output={found}"
    )
    assert status == 0, stderr
    chunks = Corpus(small_data.corpus).num_chunks
    assert f"{chunks:,} chunks, 6 neighbours each" in stdout
    status, stdout, stderr = run_program(
        "tools/rerank_neighbours.py", corpus, database, f"--candidates={found}", "--k=2", f"--output={reranked}"
    )
    assert status == 0, stderr
    assert f"{chunks:,} chunks, 2 neighbours each" in stdout
    candidates, table = NeighbourTable(found), NeighbourTable(reranked)
    assert (table.k, table.filter) == (2, "document")
    every = np.arange(chunks)
    assert (table.ids(every)[:, :, None] == candidates.ids(every)[:, None, :]).any(-1).all()
    assert (np.diff(table.distances(every), axis=1) >= 0).all()
    line = error_line(
        "tools/rerank_neighbours.py", corpus, database, f"--candidates={found}", "--k=7", f"--output={tmp_path / 'x'}"
    )
    assert "has 6 a chunk: find more" in line
