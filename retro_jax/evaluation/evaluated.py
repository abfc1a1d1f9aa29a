"""A set of documents to evaluate on: its corpus, the neighbours of its chunks, and what is asked about them.

SET/corpus              the corpus stage
SET/neighbours          the neighbours stage in the database; only for what retrieves
SET/documents.jsonl     the text it was made from; only where documents say more than their text:
                        "completion" the end of the text that is asked for, "words" its words in the original
"""

import dataclasses
import os
from pathlib import Path

from retro_jax.data.corpus import Corpus
from retro_jax.data.sequences import NeighbourText
from retro_jax.evaluation.neighbourhood import NeighbourIds
from retro_jax.retrieval.neighbours import NeighbourTable


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """What is scored, and what may be retrieved for it.

    Attributes:
      name: of the set.
      corpus: its documents.
      neighbours: of its chunks in the database; None where nothing is retrieved.
      database: corpus of that database.
    """

    name: str
    corpus: Corpus
    neighbours: NeighbourIds | None
    database: NeighbourText | None

    @classmethod
    def open(cls, directory: str | os.PathLike, database: NeighbourText | None) -> "Evaluated":
        """Opens a set's directory; its neighbours too, when they and a database are there.

        Raises:
          UserError: no corpus there, or a part that is damaged.
        """
        directory = Path(directory)
        corpus, table = Corpus(directory / "corpus"), directory / "neighbours"
        if database is None or not table.is_dir():
            return cls(directory.name, corpus, None, None)
        return cls(directory.name, corpus, NeighbourTable(table), database)
