"""Computes the datastore of kNN-LM for a run and a database; run again it goes on where it stopped.

    python tools/build_datastore.py --workdir=runs/baseline --database=train --output=results/baseline/datastore

`launch/evaluate.py --methods=knn_lm` builds it when it is not there, in the directory `datastore` of the method's work;
here it can be built beforehand, and its size be seen: 2 bytes for each token and component of the model's width.
"""

from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.evaluation.methods import MethodContext, MethodOptions
from retro_jax.evaluation.methods.datastore import build_datastore
from retro_jax.evaluation.windows import default_windows
from retro_jax.training.trained import load_trained

_WORKDIR = flags.DEFINE_string("workdir", None, "Run whose activations are the keys.", required=True)
_DATABASE = flags.DEFINE_string("database", None, "Directory of the database; corpus/ is needed.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.", required=True)
