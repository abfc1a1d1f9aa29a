"""Writes a trained model for other tools, and says done when what was written gives the same numbers.

python launch/export.py --checkpoint=runs/retro --format=safetensors --output=retro-export
python launch/export.py --checkpoint=runs/retro --format=hf --output=retro-hf            # Llama-type decoders, GPT-2
python launch/export.py --checkpoint=runs/retro --format=stablehlo --output=retro-hlo      # programs of --length tokens

--checkpoint is a run's directory, one of its checkpoints (runs/retro/checkpoints/1000), or an exported model.
docs/export.md describes the formats.
"""

from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.errors import UserError
from retro_jax.interop.checkpoint import open_checkpoint
from retro_jax.interop.export import export_huggingface, export_native
from retro_jax.interop.stablehlo import export_stablehlo

_FORMATS = {"safetensors": export_native, "hf": export_huggingface, "stablehlo": export_stablehlo}

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Run, checkpoint of a run, or exported model.")
_FORMAT = flags.DEFINE_enum("format", "safetensors", list(_FORMATS), "What to write.")
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write, not there yet.")
_NAME = flags.DEFINE_string("name", None, "Name of the model in its card; that of the directory by default.")
_LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens of the StableHLO programs, whole chunks; by default those of the training.", lower_bound=1
)
flags.mark_flags_as_required(["checkpoint", "output"])


def main() -> None:
    options = {} if _LENGTH.value is None else {"length": _LENGTH.value}
    if options and _FORMAT.value != "stablehlo":
        raise UserError("--length goes with --format=stablehlo; the other formats have none")
    source = open_checkpoint(_CHECKPOINT.value)
    output = Path(_OUTPUT.value)
    _FORMATS[_FORMAT.value](source, output, name=_NAME.value or output.name, **options)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"{output}: {size:,} bytes written and checked")


if __name__ == "__main__":
    program.run(main)
