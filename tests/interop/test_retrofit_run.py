"""From a checkpoint of another library, with its tokenizer, to a RETRO that is trained, exported and sampled from."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from small_models import LLAMA, byte_level_tokenizer, pretrained, write_run
from small_run import SAMPLE, error_line, run_program, write_random_neighbours

import retro_jax
from retro_jax.config import CheckpointConfig, DataConfig, MeshConfig, OptimizerConfig, TrainConfig, to_dict
from retro_jax.data.corpus import Corpus, build_corpus
from retro_jax.data.sequences import SequenceSource, write_sequences
from retro_jax.data.text import read_documents
from retro_jax.data.tokenizer import Tokenizer
from retro_jax.errors import UserError
from retro_jax.interop.checkpoint import open_base, open_checkpoint
from retro_jax.interop.export import export_huggingface
from retro_jax.model import to_layers
from retro_jax.retrieval.neighbours import NeighbourTable
from retro_jax.training.loop import train

M, T = 4, 16
LONG, ENDS = 4 * T, [0, 7]  # the base's context, and what ends a text for it


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama with GPT-2's kind of tokenizer and as many rows as that has tokens: none to spare for PAD.

    Its context is longer than the sequences, and it has two end tokens.
    """
    directory = tmp_path_factory.mktemp("base")
    ours = byte_level_tokenizer(directory / "given.json")
    model = dataclasses.replace(LLAMA, vocab_size=289, cca_layers=(), pad_id=289, bos_id=0, eos_id=0, unk_id=-1)
    source = dataclasses.replace(pretrained(model, ours, context=LONG), base_settings={"eos_token_id": ENDS})
    export_huggingface(source, directory / "hub", name="Base")
    return directory / "hub"


@pytest.fixture(scope="module")
def sequences(base, tmp_path_factory):
    """Sequences with random neighbours, tokenised with the base's tokenizer."""
    root = tmp_path_factory.mktemp("data")
    documents = list(read_documents([SAMPLE]))[::4]
    rows = [{"id": document.id, "text": document.text[:300]} for document in documents]
    (root / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_corpus([root / "text.jsonl"], Tokenizer(base / "tokenizer.json"), root / "corpus", chunk_length=M)
    corpus = Corpus(root / "corpus")
    write_random_neighbours(root / "neighbours", corpus, corpus)
    write_sequences(corpus, NeighbourTable(root / "neighbours"), corpus, root / "sequences", length=T, k=2)
    return root / "sequences"


@pytest.fixture(scope="module")
def run(base, sequences, tmp_path_factory):
    """Workdir of two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "fit"
    config = TrainConfig(
        model=dataclasses.replace(LLAMA, cca_layers=(2, 3)),
        init_from=str(base),
        data=DataConfig(sequences=(str(sequences),)),
        optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=1),
        checkpoint=CheckpointConfig(every_steps=2),
        mesh=MeshConfig(data=jax.device_count(), fsdp=1),  # too small to be split
        steps=2,
        batch_size=8,
    )
    result = train(config, workdir, base=open_base(base))
    assert result.step == 2 and np.isfinite(result.loss)
    return workdir


def test_data_of_that_tokenizer_has_its_padding_and_ends(sequences):
    source = SequenceSource(sequences)
    corpus = Corpus(sequences.parent / "corpus")
    assert corpus.pad_id == 289 and corpus.tokens(-1).tolist() == [289] * M
    arrays = [source[index] for index in range(len(source))]
    tokens = np.concatenate([each["tokens"] for each in arrays])
    assert (tokens == 289).any() and (tokens == 0).any() and tokens.max() == 289
    assert any((each["neighbours"] == 289).any() for each in arrays)
    document = corpus.tokens(np.arange(corpus.document_range(0)[1])).reshape(-1)
    assert document[0] == 0 and corpus.tokenizer.decode(document) == next(iter(read_documents([SAMPLE]))).text[:300]


def test_the_program_exports_and_refuses_what_is_there(base, tmp_path):
    flags = [f"--checkpoint={base}", "--format=safetensors", f"--output={tmp_path / 'out'}"]
    status, stdout, stderr = run_program("launch/export.py", *flags)
    assert status == 0, stderr
    assert "bytes written and checked" in stdout
    found, source = retro_jax.load_pretrained(tmp_path / "out"), retro_jax.load_pretrained(base)
    assert found.config == source.config and found.context == source.context == LONG
    jax.tree.map(np.testing.assert_array_equal, found.params, source.params)
    assert found.tokenizer.fingerprint == source.tokenizer.fingerprint


def test_a_run_knows_the_context_and_the_end_tokens_of_its_base(base, tmp_path):
    settings = {"bos_token_id": 0, "eos_token_id": ENDS, "max_position_embeddings": LONG}
    assert open_base(base).settings == settings
    source = dataclasses.replace(
        pretrained(LLAMA, Tokenizer(base / "tokenizer.json"), context=T), base_settings=settings
    )
    run = write_run(tmp_path / "run", source)
    assert open_checkpoint(run).base_settings == open_base(run).settings == settings
    longer = write_run(tmp_path / "longer", dataclasses.replace(source, context=5 * T))
    assert open_base(longer).settings == settings | {"max_position_embeddings": 5 * T}


def test_data_made_with_another_tokenizer_of_the_same_size_are_refused(base, sequences):
    opened = open_base(base)
    opened.check_tokenizer(SequenceSource(sequences).tokenizer_fingerprint, "data")
    with pytest.raises(UserError, match="data was made with tokenizer 0123"):
        opened.check_tokenizer("0123", "data")


@pytest.mark.slow
def test_the_trained_model_is_the_base_without_retrieval(run, base):
    fitted, before = open_checkpoint(run).load(), retro_jax.load_pretrained(base)
    assert fitted.config.cca_layers == (2, 3) and fitted.config.pad_id == 289
    now, then = to_layers(fitted.params, fitted.config), to_layers(before.params, before.config)
    for name, array in then.items():
        assert np.asarray(now[name]).tobytes() == np.asarray(array).tobytes(), name
    assert any(np.asarray(now[name]).any() for name in now if name.endswith("cca.output")), "they began at 0"


@pytest.mark.slow
def test_the_program_exports_it_and_the_export_is_it(run, base, tmp_path):
    flags = [f"--checkpoint={run}", "--format=hf", f"--output={tmp_path / 'out'}"]
    status, stdout, stderr = run_program("launch/export.py", *flags)
    assert status == 0, stderr
    assert "bytes written and checked" in stdout
    found, source = retro_jax.load_pretrained(tmp_path / "out"), open_checkpoint(run / "checkpoints" / "2").load()
    assert found.config == source.config and found.neighbours == 2 and found.context == T
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found.params), jax.device_get(source.params))
    assert found.tokenizer.fingerprint == source.tokenizer.fingerprint
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written | {"torch_dtype": None} == json.loads((base / "config.json").read_text()) | {"torch_dtype": None}
    assert "is there already" in error_line("launch/export.py", *flags)


@pytest.mark.slow
def test_the_programs_train_it_and_sample_from_it(base, sequences, tmp_path):
    config = to_dict(
        TrainConfig(
            model=dataclasses.replace(LLAMA, cca_layers=(2, 3)),
            data=DataConfig(sequences=(str(sequences),)),
            optimizer=OptimizerConfig(warmup_steps=1),
            steps=2,
            batch_size=8,
        )
    )
    (tmp_path / "recipe.py").write_text(
        f"import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({config!r})\n"
    )
    flags = [f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'run'}", f"--config.init_from={base}"]
    status, stdout, stderr = run_program("launch/train.py", *flags)
    assert status == 0, stderr
    assert "of them trained" in stdout and "step 2: loss" in stdout
    given = tmp_path / "neighbours.json"
    given.write_text(json.dumps({"1": ["The history of the museum", "A list"]}))
    flags = [f"--workdir={tmp_path / 'run'}", "--prompt=The history of", f"--neighbours={given}", "--max_new_tokens=9"]
    status, stdout, stderr = run_program("launch/sample.py", *flags)
    assert status == 0, stderr
    assert stdout.startswith("The history of")
    corpus = sequences.parent / "corpus"
    flags = [f"--workdir={tmp_path / 'run'}", f"--corpus={corpus}", "--modes=off", f"--output={tmp_path / 'bpb.json'}"]
    status, _, stderr = run_program("launch/evaluate.py", *flags)
    assert status == 0, stderr
    (found,) = json.loads((tmp_path / "bpb.json").read_text())["results"]
    assert found["bytes"] == Corpus(corpus).num_bytes and found["bits_per_byte"] > 0
