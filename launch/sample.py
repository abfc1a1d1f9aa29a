"""Continues a prompt, retrieving at each chunk boundary, and shows the neighbours that were used.

python launch/sample.py --workdir=runs/retro --database=database --embedder=minilm --prompt="The capital of"
python launch/sample.py --workdir=runs/retro --service=127.0.0.1:50051 --prompt="The capital of"
python launch/sample.py --workdir=runs/retro --prompt="The capital of"          # RETRO[OFF], no retrieval
"""

import codecs
import json
import sys
from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.data.stage import write_json
from retro_jax.errors import UserError
from retro_jax.inference.decoding import Decoding
from retro_jax.inference.sampling import RetrievedChunk, Sampler
from retro_jax.training.trained import load_trained

_WORKDIR = flags.DEFINE_string("workdir", None, "Trained run.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue.")
_DATABASE = flags.DEFINE_string("database", None, "Retrieval database; without one the model runs OFF.")
_EMBEDDER = flags.DEFINE_string("embedder", None, "Directory (or hub id) of the database's embedder.")
_SERVICE = flags.DEFINE_string("service", None, "HOST:PORT of a retrieval service, in place of database and embedder.")
_SERVICE_CA = flags.DEFINE_string("service_ca", None, "PEM file of the authorities that vouch for the service.")
_SERVICE_TOKEN = flags.DEFINE_string("service_token_file", None, "File with the bearer token of the service.")
_K = flags.DEFINE_integer("k", None, "Neighbours for each chunk; as in training by default.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to generate at most.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Temperature of the draw; 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Keep the most likely tokens up to this probability.")
_MAX_CONTEXT = flags.DEFINE_integer("max_context", None, "Tokens the model sees; the trained length by default.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to sample from; the newest by default.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for prompt, continuation and neighbours.")
flags.mark_flags_as_required(["workdir", "prompt"])


def main() -> None:
    decoding = Decoding(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value)
    try:
        _PROMPT.value.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not valid UTF-8") from None
    run = load_trained(_WORKDIR.value, step=_STEP.value)
    database = _open_service(run) if _SERVICE.value else _open_database(run)
    sampler = Sampler(
        run.config.model,
        run.plan,
        run.params,
        vocab_size=run.tokenizer.vocab_size,
        retriever=database,
        max_context=_MAX_CONTEXT.value or max(run.config.data.length, 2 * run.config.model.chunk_length),
        neighbours=_K.value or run.config.data.neighbours,
    )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    text, retrieved = "", []
    print(_PROMPT.value, end="", flush=True)
    for sampled in sampler.generate(
        run.tokenizer.encode(_PROMPT.value), max_new_tokens=_TOKENS.value, decoding=decoding
    ):
        retrieved += sampled.retrieved
        piece = decoder.decode(run.tokenizer.decode_bytes([sampled.token]))
        text += piece
        print(piece, end="", flush=True)
    rest = decoder.decode(b"", final=True)
    text += rest
    print(rest)
    neighbours = [entry for chunk in retrieved for entry in _describe(chunk, database, run.tokenizer)]
    if database is None:
        print("\nno retrieval (OFF)", file=sys.stderr)
    for entry in neighbours:
        print(
            f"\nchunk {entry['chunk']}, neighbour {entry['rank']}, distance {entry['distance']:.4f}, "
            f"document {entry['document']} {entry['title']}\n"
            f"  {json.dumps(entry['neighbour'], ensure_ascii=False)}\n"
            f"  continues: {json.dumps(entry['continuation'], ensure_ascii=False)}"
        )
    if _OUTPUT.value:
        write_json(
            _OUTPUT.value,
            {
                "run": _WORKDIR.value,
                "step": run.step,
                "retrieval": database is not None,
                "prompt": _PROMPT.value,
                "continuation": text,
                "neighbours": neighbours,
            },
        )


def _open_service(run):
    if _DATABASE.value or _EMBEDDER.value:
        raise UserError("--service goes without --database and --embedder: the service has them")
    from retro_jax.retrieval.service.client import RetrievalClient
    from retro_jax.retrieval.service.security import ClientSecurity, read_tokens

    ca = Path(_SERVICE_CA.value) if _SERVICE_CA.value else None
    token = read_tokens(_SERVICE_TOKEN.value)[0] if _SERVICE_TOKEN.value else None
    client = RetrievalClient(_SERVICE.value, security=ClientSecurity(ca, token=token))
    if not client.description.embeds:
        raise UserError(f"{_SERVICE.value} cannot embed what was generated: start it with --embedder")
    run.check_tokenizer(client.description.tokenizer, _SERVICE.value)
    return client


def _open_database(run):
    if not _DATABASE.value:
        if _EMBEDDER.value:
            raise UserError("--embedder is of use only with --database")
        return None
    if not _EMBEDDER.value:
        raise UserError("sampling with --database needs --embedder, the one the database was embedded with")
    from retro_jax.retrieval.database import Database
    from retro_jax.retrieval.embedder import Embedder, EmbeddingSet

    settings = EmbeddingSet(Path(_DATABASE.value) / "embeddings").manifest.settings["embedder"]
    embedder = Embedder.load(_EMBEDDER.value, normalize=settings["normalize"], max_length=settings["max_length"])
    database = Database.open(_DATABASE.value, embedder)
    run.check_tokenizer(database.corpus.tokenizer_fingerprint, _DATABASE.value)
    return database


def _describe(chunk: RetrievedChunk, database, tokenizer) -> list[dict]:
    entries = []
    documents = _documents(database, chunk.ids)
    for rank, (chunk_id, distance, tokens, (document, title)) in enumerate(
        zip(chunk.ids, chunk.distances, chunk.tokens, documents, strict=True), start=1
    ):
        if chunk_id < 0:
            continue
        half = len(tokens) // 2
        entries.append(
            {
                "chunk": chunk.chunk + 1,
                "rank": rank,
                "id": int(chunk_id),
                "distance": float(distance),
                "document": document,
                "title": title,
                "neighbour": tokenizer.decode(tokens[:half]),
                "continuation": tokenizer.decode(tokens[half:]),
            }
        )
    return entries


def _documents(database, ids) -> list[tuple[str, str]]:
    """(id, title) of the document of each chunk."""
    if _SERVICE.value:
        return database.documents(ids)
    corpus = database.corpus
    records = [corpus.document(int(corpus.document_index(chunk))) if chunk >= 0 else None for chunk in ids]
    return [("", "") if record is None else (record.id, record.metadata.get("title", "")) for record in records]


if __name__ == "__main__":
    program.run(main)
