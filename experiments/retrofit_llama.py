"""RETROfit of a model that others trained, Llama, Mistral, Qwen or GPT-2, as the paper does it (section 4.2, Table 12).

    python launch/train.py --config=experiments/retrofit_llama.py --workdir=runs/fit --config.init_from=BASE \\
        --config.data.sequences=DIR

BASE is a Hugging Face checkpoint with safetensors; DIR is written with the tokenizer in it:
`tools/build_corpus.py --tokenizer=BASE/tokenizer.json`. CCA in every third layer from the sixth, the paper's encoder;
`--config.model.cca_layers=2,4` and `--config.model.encoder_width=256` fit small models.

Hardware: a model of 7B needs its parameters in float32 and, for a tenth of them, gradients and two moments: about
40 GB over the devices of `fsdp`, and activations. Steps are the paper's 6 million sequences.
"""

import ml_collections

from retro_jax.config import CheckpointConfig, DataConfig, OptimizerConfig, RetroConfig, TrainConfig, to_config_dict


def get_config() -> ml_collections.ConfigDict:
    return to_config_dict(
        TrainConfig(
            model=RetroConfig.preset("7.5b", cca_layers=(), remat="block"),
            init_from="base",
            data=DataConfig(neighbours=2),
            optimizer=OptimizerConfig(peak_learning_rate=1e-4, warmup_steps=750),
            checkpoint=CheckpointConfig(every_steps=500),
            steps=6_000_000 // 256,
            batch_size=256,
        )
    )
