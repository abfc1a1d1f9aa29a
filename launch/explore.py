"""Shows what retrieval did to a text, token by token: a page on this machine, or one file.

    python launch/explore.py --workdir=runs/retro --database=database --embedder=minilm
    python launch/explore.py --workdir=runs/retro --service=127.0.0.1:50051 --port=8000
    python launch/explore.py --workdir=runs/retro --database=database --embedder=minilm --prompt_file=text.txt \\
        --max_new_tokens=0 --html=explorer.html

The server listens on loopback only. From another machine: ssh -L 8420:127.0.0.1:8420 HOST
"""

from pathlib import Path

from absl import flags

from retro_jax import program
from retro_jax.errors import UserError
from retro_jax.explorer.explorer import Explorer
from retro_jax.explorer.page import render
from retro_jax.explorer.session import Limits, Session
from retro_jax.files import atomic_write
from retro_jax.inference.decoding import Decoding
from retro_jax.inference.neighbours import ON_FAILURE
from retro_jax.training.trained import load_trained

_WORKDIR = flags.DEFINE_string("workdir", None, "Trained run.")
_STEP = flags.DEFINE_integer("step", None, "Its checkpoint; the newest by default.")
_PORT = flags.DEFINE_integer("port", 8420, "Port on loopback; 0 takes a free one.", lower_bound=0, upper_bound=65_535)
_HTML = flags.DEFINE_string("html", None, "Write the page of --prompt to this file, and serve nothing.")
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue or to look at; what the page begins with.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "The same from a file.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Tokens to generate; 0 looks at the prompt.", lower_bound=0)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Temperature of the draw; 0 is greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 keeps all.")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "Keep the most likely tokens up to this probability.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
_K = flags.DEFINE_integer("k", None, "Neighbours for each chunk; as in training by default.", lower_bound=1)
_MAX_CONTEXT = flags.DEFINE_integer("max_context", None, "Tokens the model sees; the trained length by default.")
_ON_FAILURE = flags.DEFINE_enum(
    "on_retrieval_failure", "error", ON_FAILURE, "What becomes of a chunk whose retrieval fails: off goes on without."
)
_MOST_PROMPT = flags.DEFINE_integer("limit_prompt_tokens", 2048, "Longest prompt of the page.", lower_bound=1)
_MOST_NEW = flags.DEFINE_integer("limit_new_tokens", 1024, "Most new tokens of the page.", lower_bound=1)
_REQUESTS = flags.DEFINE_integer(
    "requests", 4, "Requests that take turns on the model; more are refused.", lower_bound=1
)
program.define_retriever_flags(seconds=30)
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    decoding = Decoding(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value, _SEED.value)
    start = Session(_prompt(), _TOKENS.value, decoding)
    if _HTML.value:
        if not start.prompt and not start.max_new_tokens:
            raise UserError("--html needs a text: give --prompt or --prompt_file")
        *_, last = _open().generate(start)
        view = last["view"]
        with atomic_write(_HTML.value) as temporary:
            temporary.write_text(render(view), encoding="utf-8")
        print(f"{_HTML.value}: {len(view['tokens'])} tokens in {len(view['chunks'])} chunks")
        return
    # Here, so that writing a page needs no web server.
    from retro_jax.explorer.app import create_app
    from retro_jax.explorer.serving import address, listen, serve
    from retro_jax.explorer.turns import Turns

    listener = listen(_PORT.value)  # before the model is loaded, which takes a while
    turns = Turns(_REQUESTS.value)
    app = create_app(_open(), turns, start=start)
    print(f"The explorer: {address(listener)}  (Ctrl-C ends it)", flush=True)
    serve(app, listener, turns.stop)


def _open() -> Explorer:
    run = load_trained(_WORKDIR.value, step=_STEP.value)
    library = program.retriever(run)
    if library is None:
        raise UserError("there is nothing to retrieve from: give --database and --embedder, or --service")
    return Explorer(
        run,
        library,
        name=flags.FLAGS.database or flags.FLAGS.service,
        neighbours=_K.value or run.config.data.neighbours,
        max_context=_MAX_CONTEXT.value or max(run.config.data.length, 2 * run.config.model.chunk_length),
        on_retrieval_failure=_ON_FAILURE.value,
        limits=Limits(_MOST_PROMPT.value, _MOST_NEW.value),
    )


def _prompt() -> str:
    if _PROMPT_FILE.value:
        if _PROMPT.value is not None:
            raise UserError("give --prompt or --prompt_file, not both")
        try:
            return Path(_PROMPT_FILE.value).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{_PROMPT_FILE.value} is not valid UTF-8") from None
    return _PROMPT.value or ""


if __name__ == "__main__":
    program.run(main)
