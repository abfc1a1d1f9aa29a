"""A RETRO that looks facts up: people who do not exist, and a register of them that is the database.

    python tools/make_planted_text.py --output=planted/text
    python tools/train_tokenizer.py --input=planted/text/train.jsonl,planted/text/register.jsonl --model_type=bpe \\
      --vocab_size=1024 --output=planted/tokenizer.model
    for name in train register; do
      python tools/build_corpus.py --input=planted/text/$name.jsonl --tokenizer=planted/tokenizer.model \\
        --chunk_length=32 --output=planted/$name/corpus
      python tools/embed_chunks.py --corpus=planted/$name/corpus --embedder=embedder --normalize \\
        --output=planted/$name/embeddings
    done
    python tools/build_index.py --embeddings=planted/register/embeddings --output=planted/register/index
    python tools/find_neighbours.py --corpus=planted/train/corpus --embeddings=planted/train/embeddings \\
      --database=planted/register --output=planted/train/neighbours
    python tools/write_sequences.py --corpus=planted/train/corpus --neighbours=planted/train/neighbours \\
      --database=planted/register --length=64 --k=1 --output=planted/sequences
    python launch/train.py --config=experiments/planted.py --workdir=planted/retro
    python launch/sample.py --workdir=planted/retro --database=planted/register --embedder=embedder \\
      --prompts=planted/text/questions.jsonl --temperature=0 --stop=. --max_new_tokens=8

The last command asks for facts of people on whom nothing was trained, and counts the right answers: 296 of 300. Without
--database and --embedder it asks the same weights OFF: 25, one in twelve, which is what guessing gives. The README goes
on with people who enter the register later. `embedder` is the output of tools/fetch_embedder.py.
Hardware: 2 CPU cores, one to two minutes for the training and as much for the vectors.
"""

import ml_collections

from retro_jax.config import CheckpointConfig, DataConfig, OptimizerConfig, RetroConfig, TrainConfig, to_config_dict


def get_config(preset: str = "demo") -> ml_collections.ConfigDict:
    """`preset`: "demo", or "demo-baseline" for the same decoder without retrieval.

    The encoder does not see the retrieving chunk (the first ablation of the paper's Table 13): what there is to look
    up does not depend on it, and without it copying is learnt in fewer steps.
    """
    return to_config_dict(
        TrainConfig(
            model=RetroConfig.preset(
                preset,
                vocab_size=1024,
                num_layers=2,
                cca_layers=() if preset.endswith("-baseline") else (1, 2),
                chunk_length=32,
                neighbour_length=64,
                encoder_ca_layers=(),
            ),
            data=DataConfig(sequences=("planted/sequences",), neighbours=1),
            optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=20),
            checkpoint=CheckpointConfig(every_steps=100),
            steps=360,
            batch_size=32,
            log_every=20,
        )
    )
