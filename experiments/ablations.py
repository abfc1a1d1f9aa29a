"""The ablations of the paper's Table 13 (appendix D): its smallest model, one thing changed at a time.

    python launch/train.py --config=experiments/ablations.py:default --workdir=runs/default --config.data.sequences=DIR
    python launch/train.py --config=experiments/ablations.py:cca-all --workdir=runs/cca-all --config.data.sequences=DIR

DIR is the output of tools/write_sequences.py with --length=2048, --k=2 (--k=4 for 4-neighbours) and a tokenizer of at
most 128,000 tokens. Each trains for 300,000 steps of 256 sequences, 157,286,400,000 tokens, otherwise as
experiments/paper.py:172m does.

Expected, C4 bits per byte with a database of 1.75 T tokens (paper table 13):

    name                     changed                                                     bits/byte
    default                  nothing                                                         0.822
    no-query-conditioning    the encoder does not see the chunk that retrieved               0.829
    no-cross-positions       no relative positions in cross-attention                        0.826
    shared-embeddings        encoder and decoder have one embedding table                    0.823
    6-layer-encoder          six encoder layers, not two                                     0.821
    neighbour-only           the encoder reads neighbours without their continuations        0.950
    continuation-only        the encoder reads the continuations alone                       0.895
    no-retrieval             the decoder alone                                               0.987
    1-neighbour              one neighbour a chunk in training, not two                      0.858
    4-neighbours             four neighbours a chunk in training                             0.847
    cca-1                    chunked cross-attention in layer 1 alone, not in 6, 9 and 12    0.827
    cca-6                    in layer 6 alone                                                0.823
    cca-12                   in layer 12 alone                                               0.831
    cca-all                  in all twelve                                                   0.860
    cca-every-3-from-1       in layers 1, 4, 7 and 10                                        0.823

Most rows are within a hundredth of the default; with half of what is retrieved or none of it, with other numbers of
neighbours in training, and with cross-attention in all layers it is more.

Hardware: TPU or GPU. By the TPU compiler the default takes 13.8 of 30.75 GiB a chip and 1.0 to 1.1 s a step on
v4:2x4x4, so 3.5 days at the least (see experiments/paper.py:172m, whose mesh and micro-batches these share).
"""

import ml_collections

from retro_jax.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RetroConfig,
    TrainConfig,
    did_you_mean,
    to_config_dict,
)
from retro_jax.errors import UserError

TOKENS = 157_286_400_000
BATCH_SIZE = 256

# What is changed in the model, and how many neighbours it reads in training.
MODELS = {
    "default": {},
    "no-query-conditioning": {"encoder_ca_layers": ()},
    "no-cross-positions": {"cross_positions": False},
    "shared-embeddings": {"share_embeddings": True},
    "6-layer-encoder": {"encoder_layers": 6},
    "neighbour-only": {"neighbour_part": "neighbour"},
    "continuation-only": {"neighbour_part": "continuation"},
    "no-retrieval": {"cca_layers": ()},
    "1-neighbour": {},
    "4-neighbours": {},
    "cca-1": {"cca_layers": (1,)},
    "cca-6": {"cca_layers": (6,)},
    "cca-12": {"cca_layers": (12,)},
    "cca-all": {"cca_layers": tuple(range(1, 13))},
    "cca-every-3-from-1": {"cca_layers": (1, 4, 7, 10)},
}
NEIGHBOURS = {"1-neighbour": 1, "4-neighbours": 4}


def get_config(name: str = "default") -> ml_collections.ConfigDict:
    """`name` is one of the table above."""
    if name not in MODELS:
        raise UserError(f"ablation {name!r} is unknown{did_you_mean(name, MODELS)}")
    return to_config_dict(
        TrainConfig(
            model=RetroConfig.preset("172m", remat="query,key,value,relative,mixed", **MODELS[name]),
            data=DataConfig(neighbours=NEIGHBOURS.get(name, 2)),
            mesh=MeshConfig(data=8, fsdp=-1),
            optimizer=OptimizerConfig(peak_learning_rate=2e-4, warmup_steps=750),
            checkpoint=CheckpointConfig(every_steps=1000),
            steps=TOKENS // (2048 * BATCH_SIZE),
            batch_size=BATCH_SIZE,
            microbatches=2,
            log_every=20,
        )
    )
