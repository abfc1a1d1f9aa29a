"""The README's commands for a model of one's own, as they stand there, on a small Llama."""

import dataclasses
import json
import re

from small_models import LLAMA, byte_level_tokenizer, pretrained
from small_run import ROOT, SAMPLE, run_script

import retro_jax
from retro_jax.interop.export import export_huggingface

# The recipe is for models of billions of parameters.
SMALL = {
    "config.model.cca_layers": "2,3",
    "config.model.encoder_width": 12,
    "config.model.encoder_layers": 1,
    "config.model.encoder_num_heads": 2,
    "config.model.encoder_head_size": 6,
    "config.model.encoder_ffw_width": 18,
    "config.optimizer.warmup_steps": 1,
    "config.steps": 2,
    "config.batch_size": 2,
}


def test_the_five_commands_of_the_readme_retrofit_a_model(tmp_path):
    for name in ("tools", "launch", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "text").mkdir()
    records = [json.loads(line) for line in SAMPLE.read_text().splitlines()[:12]]
    lines = [json.dumps({**record, "text": record["text"][:900]}) for record in records]
    (tmp_path / "text" / "train-0.jsonl").write_text("\n".join(lines) + "\n")
    base = dataclasses.replace(LLAMA, vocab_size=289, cca_layers=(), pad_id=289, bos_id=0, eos_id=0, unk_id=-1)
    given = byte_level_tokenizer(tmp_path / "given.json")
    export_huggingface(pretrained(base, given, context=512), tmp_path / "BASE", name="Base")
    section = re.search(r"## RETROfit your own model\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    commands = re.findall(r"^    (.+)$", section, re.MULTILINE)
    assert len(commands) == 5
    small = " ".join(f"--{name}={value}" for name, value in SMALL.items())
    script = "\n".join(f"{command} {small}" if "launch/train.py" in command else command for command in commands)
    stdout = run_script(script, tmp_path)
    assert "step 2: loss" in stdout
    assert retro_jax.load_pretrained(tmp_path / "exports" / "fit").config.cca_layers == (2, 3)
