"""Fine-tuning on questions: all weights of a RETRO that reads passages, or of a decoder alone (paper section 4.3).

    python launch/train.py --config=experiments/question_answering.py --workdir=runs/answers \\
        --config.init_from=runs/retro --config.data.sequences=answers
    python launch/train.py --config=experiments/question_answering.py:small-decoder --workdir=runs/closed \\
        --config.init_from=runs/baseline --config.data.sequences=answers

`answers` is the output of tools/write_answers.py. `paper` has the paper's settings (appendix C.4): 25,000 steps of 128
questions with 20 passages each, 1e-6 to 1e-7; Wang et al. (2023) take `--config.optimizer.peak_learning_rate=1e-5` for
models of a few hundred million parameters and 3e-6 for 1.5 billion. The paper has dropout in the decoder, at a rate
that it does not tell; this model has none. With "-decoder" encoder and cross-attention are left out of it: a baseline
stays one, and a RETRO is trained OFF. That is closed-book answering, or, with passages in the prompt, a decoder that
reads.

Checkpoints are kept, so that launch/answer.py --steps=all can choose the one with most exact matches on dev.

Expected (paper table 5, 7.5b on Natural Questions): 45.5 exact matches of 100, 30.4 for the baseline closed book.
Hardware: `paper` as pre-training; `small` and `trial` two CPU cores, `large` one GPU (launch/question_answering.py).
"""

import ml_collections

from retro_jax.config import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    RetroConfig,
    TrainConfig,
    did_you_mean,
    to_config_dict,
)
from retro_jax.errors import UserError

# Preset that says how the model is computed; the model itself is that of init_from. Steps, questions of a step, rate.
SIZES = {
    "paper": (RetroConfig.preset("7.5b", remat="query,key,value,relative,mixed"), 25_000, 128, 1e-6),
    "large": (RetroConfig.preset("tiny", dtype="bfloat16"), 2_000, 64, 3e-4),
    "small": (RetroConfig.preset("tiny"), 400, 16, 1e-3),
    "trial": (RetroConfig.preset("tiny"), 20, 4, 1e-3),
}


def get_config(name: str = "paper") -> ml_collections.ConfigDict:
    """`name`: one of SIZES, or with "-decoder" for a decoder alone."""
    size = name.removesuffix("-decoder")
    if size not in SIZES:
        raise UserError(f"size {size!r} is unknown{did_you_mean(size, SIZES)}")
    model, steps, batch_size, rate = SIZES[size]
    alone = name.endswith("-decoder")
    every = 1_000 if size == "paper" else steps // 4
    return to_config_dict(
        TrainConfig(
            model=RetroConfig.preset("tiny", dtype=model.dtype, remat=model.remat, cca_layers=()) if alone else model,
            init_from="runs/baseline" if alone else "runs/retro",
            unfreeze_decoder=True,
            cca_gate=0 if alone else 1,
            data=DataConfig(sequences=("answers",), neighbours=20),
            optimizer=OptimizerConfig(
                peak_learning_rate=rate, warmup_steps=750 if size == "paper" else max(steps // 20, 1)
            ),
            checkpoint=CheckpointConfig(every_steps=every, keep_every=every),
            steps=steps,
            batch_size=batch_size,
        )
    )
