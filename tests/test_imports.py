"""What needs TensorFlow or ScaNN says so; the model and the trainer do not."""

import subprocess
import sys

import pytest

BLOCKED = """
import sys
for name in ("tensorflow", "tensorflow_text", "scann", "apache_beam", "tokenizers"):
    sys.modules[name] = None
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import retro_jax; retro_jax.Retro; retro_jax.RetroConfig.preset('172m')",
        "import retro_jax.training.loop, retro_jax.evaluation.bits_per_byte, retro_jax.inference.sampling",
        "import retro_jax.retrieval.neighbours, retro_jax.data.batches, retro_jax.retrieval.database",
        "import runpy; runpy.run_path('launch/train.py', run_name='not_main')",
        "import runpy; runpy.run_path('launch/evaluate.py', run_name='not_main')",
        "import runpy; runpy.run_path('launch/sample.py', run_name='not_main')",
        "import runpy; runpy.run_path('launch/answer.py', run_name='not_main')",
        "import runpy; runpy.run_path('launch/export.py', run_name='not_main')",
        "import runpy; runpy.run_path('launch/explore.py', run_name='not_main')",
    ],
)
def test_training_and_evaluation_need_neither_tensorflow_nor_scann(statement):
    result = subprocess.run([sys.executable, "-c", BLOCKED + statement], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
