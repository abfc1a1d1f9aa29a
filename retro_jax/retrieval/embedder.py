"""Texts and chunks to vectors, with a frozen BERT: the keys of the database and the queries (spec: paper section 2.3).

A vector is the mean of BERT's last hidden states over the real word pieces, without [CLS] and [SEP]; both are fed to
BERT. Database and queries go through the same function. Inputs are padded to a few lengths and a few batch sizes, so a
handful of programs is compiled however odd the data.
"""

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from retro_jax.data.arrays import ArrayWriter, files_of
from retro_jax.data.stage import (
    Manifest,
    ShardWriter,
    Stage,
    fingerprint,
    is_finished,
    load_manifest,
    shard_name,
    verify_checksums,
)
from retro_jax.errors import UserError
from retro_jax.files import file_sha256
from retro_jax.parallel import hosts
from retro_jax.progress import Progress
from retro_jax.retrieval.bert import Bert, load_bert
from retro_jax.retrieval.checkpoints import resolve_embedder
from retro_jax.retrieval.wordpiece import WordPiece

LENGTHS = (48, 56, 64, 72, 80, 96, 128, 256)
COMPUTE_DTYPES = ("float32", "bfloat16")
_SECONDS_BETWEEN_LOOKS = 0.2
_BLOCK = 2048  # texts tokenised at once, while the device works on the block before


class ChunkTokenizer(Protocol):
    """What of the language model's tokenizer is needed here."""

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclasses.dataclass(frozen=True)
class EmbeddingBatch:
    """Vectors of n texts.

    Attributes:
      vectors: [n, E] float32; zero where `empty`.
      empty: [n] bool, the text has no word piece.
      cut: [n] bool, the text had more word pieces than fit and the rest was not read.
    """

    vectors: np.ndarray
    empty: np.ndarray
    cut: np.ndarray


class Embedder:
    """A frozen BERT with its word pieces; made by `Embedder.load`.

    Attributes:
      dimension: E, width of a vector.
      settings: what the vectors depend on (architecture, checksums, pooling, normalisation, longest input, type of the
        products), for manifests.
      fingerprint: 16 hex digits of the settings but the type of the products, which changes a direction by less than
        1e-4 (cosine); equal for two embedders exactly when their vectors are comparable.
    """

    def __init__(
        self,
        bert: Bert,
        wordpiece: WordPiece,
        *,
        normalize: bool,
        max_length: int,
        compute_dtype: str = "float32",
        lengths: Sequence[int] = LENGTHS,
        rows_per_device: int | None = None,
        checksums: dict[str, str] | None = None,
    ) -> None:
        """Puts the weights on every local device. See `load` for the arguments."""
        if wordpiece.vocab_size > bert.config.vocab_size:
            raise UserError(
                f"vocab.txt has {wordpiece.vocab_size} lines, config.json says vocab_size {bert.config.vocab_size}: "
                "they are not of one checkpoint"
            )
        if not 3 <= max_length <= bert.config.max_position_embeddings:
            raise UserError(
                f"max_length must be 3 to {bert.config.max_position_embeddings} for this embedder, is {max_length}"
            )
        if compute_dtype not in COMPUTE_DTYPES:
            raise UserError(f"compute_dtype {compute_dtype!r} is none of {', '.join(COMPUTE_DTYPES)}")
        self.dimension = bert.config.hidden_size
        comparable = {
            "architecture": dataclasses.asdict(bert.config),
            "wordpiece": dataclasses.asdict(wordpiece.settings),
            "pooling": "mean without [CLS] and [SEP]",
            "normalize": normalize,
            "max_length": max_length,
            **(checksums or {}),
        }
        self.fingerprint = fingerprint(comparable)
        self.settings = comparable | {"compute_dtype": compute_dtype}
        self._wordpiece = wordpiece
        self._max_length = max_length
        self._lengths = sorted({min(length, max_length) for length in lengths} | {max_length})
        devices = jax.local_devices()
        # A CPU core works fastest on what stays in its cache; an accelerator needs rows to fill it.
        rows = rows_per_device or (16 if devices[0].platform == "cpu" else 256)
        self._batch_sizes = [len(devices) * n for n in sorted({1, min(8, rows), rows})]
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        self._by_row = NamedSharding(mesh, PartitionSpec("data"))
        graph, parameters = nnx.split(bert)
        if compute_dtype == "bfloat16":
            parameters = _with_bfloat16_kernels(parameters)
        self._parameters = jax.device_put(parameters, NamedSharding(mesh, PartitionSpec()))

        def forward(parameters: nnx.State, tokens: jax.Array, sizes: jax.Array) -> jax.Array:
            """tokens [B, T] with [CLS] and [SEP], sizes [B] (0: row of padding) -> [B, E]."""
            positions = jnp.arange(tokens.shape[1])
            hidden = nnx.merge(graph, parameters)(tokens, positions < sizes[:, None])
            pooled = (positions >= 1) & (positions < sizes[:, None] - 1)
            total = jnp.einsum("bt,bte->be", pooled.astype(hidden.dtype), hidden, precision=jax.lax.Precision.HIGHEST)
            mean = total / jnp.maximum(sizes - 2, 1)[:, None]
            if normalize:
                mean = mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
            return mean

        self._forward = jax.jit(forward, out_shardings=self._by_row)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        normalize: bool,
        max_length: int = 256,
        compute_dtype: str = "float32",
        lengths: Sequence[int] = LENGTHS,
        rows_per_device: int | None = None,
    ) -> "Embedder":
        """Loads a BERT checkpoint.

        Args:
          path: directory with config.json, vocab.txt and model.safetensors, or a Hugging Face hub id.
          normalize: scale vectors to length 1 (for checkpoints trained with cosine similarity; the paper does not).
          max_length: word pieces fed to BERT at most, with [CLS] and [SEP]; longer texts are cut and flagged.
          compute_dtype: type of the operands of all products, which are summed in float32. "bfloat16" is quicker where
            the hardware has it (TPU, recent GPU, CPU with AVX512-BF16 or AMX) and slower where it has not.
          lengths: lengths that inputs are padded to; they do not change the vectors.
          rows_per_device: largest batch on one device; None chooses by platform.

        Raises:
          UserError: what is wrong with the checkpoint or the arguments; TensorFlow Text not installed.
        """
        directory = resolve_embedder(os.fspath(path))
        bert = load_bert(directory)
        wordpiece = WordPiece(directory)
        checksums = {
            "weights_sha256": file_sha256(directory / "model.safetensors"),
            "vocab_sha256": file_sha256(directory / "vocab.txt"),
        }
        return cls(
            bert,
            wordpiece,
            normalize=normalize,
            max_length=max_length,
            compute_dtype=compute_dtype,
            lengths=lengths,
            rows_per_device=rows_per_device,
            checksums=checksums,
        )

    def embed(self, texts: Sequence[str]) -> EmbeddingBatch:
        """Embeds n texts of any length, in order."""
        return self._embed_pieces(self._wordpiece(list(texts)))

    def embed_chunks(self, tokens: np.ndarray, tokenizer: ChunkTokenizer) -> EmbeddingBatch:
        """Embeds chunks of the language model's tokens [n, M], by way of their text."""
        return self.embed(chunk_texts(tokens, tokenizer))

    def embed_blocks(self, blocks: Iterator[list[str]]) -> Iterator[EmbeddingBatch]:
        """Embeds a stream of blocks of texts; the next block is read and tokenised while this one is computed."""

        def prepare() -> list[np.ndarray] | None:
            texts = next(blocks, None)
            return None if texts is None else self._wordpiece(texts)

        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(prepare)
            while (pieces := pending.result()) is not None:
                pending = pool.submit(prepare)
                yield self._embed_pieces(pieces)

    def _embed_pieces(self, pieces: list[np.ndarray]) -> EmbeddingBatch:
        limit = self._max_length - 2
        sizes = np.array([len(row) for row in pieces], np.int64)
        vectors = np.zeros((len(pieces), self.dimension), np.float32)
        inputs = np.minimum(sizes, limit) + 2
        bucket = np.searchsorted(self._lengths, inputs)
        running = []
        for b, length in enumerate(self._lengths):
            rows = np.flatnonzero((bucket == b) & (sizes > 0))
            for batch in self._batches(rows):
                running.append((batch, self._launch([pieces[i][:limit] for i in batch], length)))
        for batch, result in running:
            vectors[batch] = np.asarray(result)[: len(batch)]
        return EmbeddingBatch(vectors, empty=sizes == 0, cut=sizes > limit)

    def _batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        largest = self._batch_sizes[-1]
        for start in range(0, len(rows), largest):
            yield rows[start : start + largest]

    def _launch(self, pieces: list[np.ndarray], length: int) -> jax.Array:
        """Starts BERT on up to a full batch of word pieces; the result [rows, E] may still be in computation."""
        rows = next(size for size in self._batch_sizes if size >= len(pieces))
        tokens = np.full((rows, length), self._wordpiece.pad_id, np.int32)
        sizes = np.zeros(rows, np.int32)
        for i, row in enumerate(pieces):
            sizes[i] = len(row) + 2
            tokens[i, 0], tokens[i, 1 : len(row) + 1] = self._wordpiece.cls_id, row
            tokens[i, len(row) + 1] = self._wordpiece.sep_id
        return self._forward(self._parameters, *jax.device_put((tokens, sizes), self._by_row))


def _with_bfloat16_kernels(parameters: nnx.State) -> nnx.State:
    """The same parameters with the matrices of all affine maps as bfloat16; what is not multiplied stays float32."""

    def convert(location: tuple, leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.bfloat16) if any(getattr(key, "key", None) == "kernel" for key in location) else leaf

    return jax.tree_util.tree_map_with_path(convert, parameters)


def chunk_texts(tokens: np.ndarray, tokenizer: ChunkTokenizer) -> list[str]:
    """The text of each chunk of tokens [n, M]; special tokens give nothing."""
    return [tokenizer.decode(row) for row in np.asarray(tokens).tolist()]


def embed_corpus(corpus: Any, embedder: Embedder, directory: str | os.PathLike) -> Manifest:
    """The embeddings stage: one array [chunks, E] float32 for each shard of the corpus; goes on after the last shard.

    Chunks without a word piece have a zero vector. Chunks, empty ones and cut ones are counted in the manifest. The
    processes of a run of several (`retro_jax.parallel.hosts`) all call this and share the shards; process i of n takes
    shards i, i + n, ..., on its own devices. Process 0 holds the directory's lock and writes the manifest.

    Args:
      corpus: a `retro_jax.data.corpus.Corpus`.
      embedder: makes the vectors; its settings stand in the manifest.
      directory: to write, on a file system that all processes see.

    Raises:
      UserError: the directory belongs to something else; a shard of the corpus is damaged; the embedder gives vectors
        that are not finite.
    """
    offsets = np.asarray(corpus.shard_offsets).tolist()
    count = len(offsets) - 1
    shards = [(shard_name("embeddings", i, count, ".npy"), offsets[i], offsets[i + 1]) for i in range(count)]
    if not hosts.is_primary():
        if not hosts.agree(0, "embeddings complete"):
            _embed_shards(corpus, embedder, ShardWriter(directory), shards)
            hosts.agree(0, "embeddings finished")
        return load_manifest(directory, "embeddings")
    settings = {"embedder": embedder.settings, "embedder_fingerprint": embedder.fingerprint}
    settings["dimension"] = embedder.dimension
    inputs = {"corpus": corpus.fingerprint, "tokenizer": corpus.tokenizer_fingerprint}
    with Stage(directory, "embeddings", settings=settings, inputs=inputs) as stage:
        if not hosts.agree(int(stage.complete), "embeddings complete"):
            try:
                _embed_shards(corpus, embedder, ShardWriter(directory), shards)
                while not all(is_finished(directory, name) for name, _, _ in shards):
                    time.sleep(_SECONDS_BETWEEN_LOOKS)  # a process that is lost ends this one
            finally:
                stage.reload()  # what is finished stays when the stage is left
            names = [name for name, _, _ in shards]
            totals = {key: sum(stage.counts(name)[key] for name in names) for key in ("chunks", "empty", "cut")}
            stage.finish(totals)
            hosts.agree(1, "embeddings finished")
        return stage.manifest


def _embed_shards(corpus: Any, embedder: Embedder, writer: ShardWriter, shards: Sequence[tuple[str, int, int]]) -> None:
    """Embeds this process's part of the shards (name, first chunk, end)."""
    own = shards[jax.process_index() :: jax.process_count()]
    left = [shard for shard in own if not is_finished(writer.directory, shard[0])]
    total = sum(stop - start for _, start, stop in own)
    initial = total - sum(stop - start for _, start, stop in left)
    with Progress("embedding", total=total, unit="chunks", initial=initial) as progress:
        for name, start, stop in left:
            corpus.verify(range(start, stop))
            with writer.shard(name) as (path, counts):
                counts.update(_embed_shard(corpus, embedder, path, start, stop, progress))


def _embed_shard(
    corpus: Any, embedder: Embedder, path: Path, start: int, stop: int, progress: Progress
) -> dict[str, int]:
    def blocks() -> Iterator[list[str]]:
        for first in range(start, stop, _BLOCK):
            ids = np.arange(first, min(first + _BLOCK, stop))
            yield chunk_texts(corpus.tokens(ids), corpus.tokenizer)

    counts = {"chunks": stop - start, "empty": 0, "cut": 0}
    with ArrayWriter(path, np.dtype("<f4"), (embedder.dimension,)) as writer:
        for batch in embedder.embed_blocks(blocks()):
            if not np.isfinite(batch.vectors).all():
                raise UserError("the embedder gives vectors that are not finite; its checkpoint is damaged")
            writer.append(batch.vectors)
            counts["empty"] += int(batch.empty.sum())
            counts["cut"] += int(batch.cut.sum())
            progress.update(len(batch.vectors))
    return counts


class EmbeddingSet:
    """Reader of a finished embeddings directory; arrays are memory-mapped.

    Attributes:
      dimension: E.
      embedder_fingerprint, corpus_fingerprint: what the vectors were made with and from.
      manifest: the stage's manifest.
      shard_offsets: first chunk id of each shard, then the number of chunks.
    """

    def __init__(self, directory: str | os.PathLike, *, verify: bool = False) -> None:
        """Opens the shards.

        Args:
          directory: output of the embeddings stage.
          verify: compare every shard's checksum (reads all of it).

        Raises:
          UserError: the directory is not a complete embeddings data set, or a shard is damaged.
        """
        self.directory = Path(directory)
        self.manifest = load_manifest(directory, "embeddings")
        if verify:
            verify_checksums(directory, self.manifest.shards)
        self.dimension: int = self.manifest.settings["dimension"]
        self.embedder_fingerprint: str = self.manifest.settings["embedder_fingerprint"]
        self.corpus_fingerprint: str = self.manifest.inputs["corpus"]
        self._shards = [self._open(self.directory / shard.name) for shard in self.manifest.shards]
        self.shard_offsets = np.cumsum([0] + [len(shard) for shard in self._shards])

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return int(self.shard_offsets[-1])

    def verify(self, chunks: range) -> None:
        """Compares the checksums of the shards with the vectors of these chunks.

        Raises:
          UserError: naming the first shard that differs.
        """
        verify_checksums(self.directory, self.manifest.shards[files_of(self.shard_offsets, chunks)])

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Vectors of consecutive chunks, [n, E] float32."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError("EmbeddingSet slices have step 1")
        return self.vectors(np.arange(start, stop))

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """Vectors [n, E] float32 of global chunk ids [n]; zero rows are chunks without a word piece.

        Raises:
          IndexError: an id outside the set.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= len(self)):
            raise IndexError(f"chunk id outside 0..{len(self) - 1}")
        result = np.empty((len(ids), self.dimension), np.float32)
        shard = np.searchsorted(self.shard_offsets, ids, side="right") - 1
        for s in np.unique(shard):
            at = shard == s
            result[at] = self._shards[s][ids[at] - self.shard_offsets[s]]
        return result

    def _open(self, path: Path) -> np.ndarray:
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{path}: not a NumPy array ({error}); rebuild {self.directory}") from None
        # The keys of a datastore of tokens are kept in half the bytes.
        if array.ndim != 2 or array.shape[1] != self.dimension or array.dtype not in (np.float32, np.float16):
            raise UserError(f"{path}: {array.dtype} {array.shape}, expected float32 [chunks, {self.dimension}]")
        return array
