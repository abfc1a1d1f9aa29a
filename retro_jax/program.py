"""How a program of launch/ or tools/ starts and how it fails: flags, one-line errors, exit status."""

import contextlib
import errno
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import ml_collections
from absl import app, flags, logging

from retro_jax.errors import TemporaryError, UserError

if TYPE_CHECKING:
    from retro_jax.data.distribute import BeamOptions
    from retro_jax.retrieval.live import LiveDatabase
    from retro_jax.retrieval.service.access import Service
    from retro_jax.retrieval.service.client import RetrievalClient
    from retro_jax.training.trained import TrainedRun


def run(main: Callable[..., None], *, positional: bool = False) -> None:
    """Parses flags, runs `main`, and turns a user's mistake into one line on stderr and exit status 1.

    Unknown flags are mistakes (absl names the nearest flag), and so are positional arguments unless `positional`, when
    `main` gets their list. A full disk, a missing file and a refused permission are reported with the file's name.
    What only has to be waited for (`TemporaryError`) exits with 75, SIGINT with 130.

    A program that has called `start_cluster` ends together with the other processes of its run: when one fails, the
    others say which and exit with 1, or 75 as it does; when one is lost, with 75; when all come to their end, they
    part.
    """

    def checked(arguments: Sequence[str]) -> None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell every step of theirs at INFO
        # Orbax logs the traceback of a failed save and raises it as well; the raised one becomes the one line.
        logging.get_absl_handler().addFilter(lambda record: "orbax" not in record.pathname)
        if len(arguments) > 1 and not positional:
            _fail(f"unexpected argument {arguments[1]!r}; every option is a --flag (try --help)")
        try:
            with _together():
                main(list(arguments[1:])) if positional else main()
        except UserError as error:
            _fail(str(error), error.exit_status)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            _exit(128 + signal.SIGINT, "interrupted")
        except BrokenPipeError:
            if _cluster() is None:
                sys.stderr.close()  # the reader of our output has gone, and Python would complain when it flushes
            _exit(128 + signal.SIGPIPE, "nobody reads its output any more")
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            _fail(f"{name}{_MESSAGES.get(error.errno, error.strerror or str(error))}")
        except Exception as error:
            if _cluster() is None:
                raise
            traceback.print_exc()
            _exit(1, f"{type(error).__name__}: {error}")

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow complains of GPUs that it does not need
    app.run(checked, flags_parser=_parse_flags)


_MESSAGES = {
    errno.ENOSPC: "no space left on the device; free some and run the same command again, finished parts are kept",
    errno.EDQUOT: "disk quota exceeded; free some and run the same command again, finished parts are kept",
    errno.ENOENT: "no such file or directory",
    errno.EACCES: "permission denied",
    errno.EROFS: "read-only file system",
    errno.EISDIR: "is a directory, expected a file",
    errno.ENOTDIR: "a part of the path is not a directory",
}


def _parse_flags(arguments: Sequence[str]) -> list[str]:
    for argument in arguments:
        if not argument.isprintable() and any("\ud800" <= character <= "\udfff" for character in argument):
            _fail(f"argument {argument!r} is not valid UTF-8")
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        _fail(" ".join(str(error).split()))


def loaded(recipe: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The value of a config-file flag. A recipe that failed to load says so only when it is used: here.

    Raises:
      UserError: it cannot be loaded.
    """
    try:
        recipe.to_dict()
    except (OSError, SyntaxError, AttributeError) as error:
        raise UserError(f"--config cannot be loaded: {' '.join(str(error).split())}") from None
    return recipe


def define_cluster_flags() -> None:
    """Defines the flags by which the processes of a run find each other; for programs that call `start_cluster`."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT at which process 0 listens, for a run of several processes.")
    flags.DEFINE_integer("num_processes", None, "Processes of the run.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", lower_bound=0)
    flags.DEFINE_integer("cluster_timeout", 300, "Seconds to wait for the other processes at the start.", lower_bound=1)


def start_cluster() -> None:
    """Joins this process to the others of its run, by the flags of `define_cluster_flags` or the cluster it runs on.

    The first call of a main function, before anything asks JAX for devices. Only process 0 shows progress then.
    """
    from retro_jax import progress
    from retro_jax.parallel import hosts  # brings JAX, which not every program needs

    # A proxy would stand between JAX and its coordinator. gRPC looks at the first of the two that is set.
    variable = "no_grpc_proxy"
    spared = os.environ.get(variable) or os.environ.get("no_proxy")
    os.environ[variable] = f"{spared},{hosts.LOOPBACK}" if spared else hosts.LOOPBACK
    values = flags.FLAGS
    hosts.start(
        hosts.Cluster(values.coordinator, values.num_processes, values.process_id, values.cluster_timeout), os.environ
    )
    if hosts.is_one_of_several() and not hosts.is_primary():
        progress.silence()


def define_beam_flags() -> None:
    """Defines the flags that say where the units of a stage are worked off; read by `beam_options`."""
    flags.DEFINE_string("runner", "local", "local, or a Beam runner: PortableRunner, FlinkRunner, SparkRunner, ...")
    flags.DEFINE_integer("workers", 1, "processes of the local runner", lower_bound=1)
    flags.DEFINE_multi_string("beam_options", [], "options for Beam, as --beam_options=--job_endpoint=HOST:PORT")


def beam_options() -> "BeamOptions":
    """What the flags of `define_beam_flags` say."""
    from retro_jax.data.distribute import BeamOptions

    values = flags.FLAGS
    options = tuple(part for text in values.beam_options for part in shlex.split(text))
    return BeamOptions(values.runner, values.workers, options)


def define_service_flags(seconds: float) -> None:
    """Defines the flags that say where a retrieval service is; read by `service`. `seconds`: deadline by default."""
    flags.DEFINE_string("service", None, "HOST:PORT of a retrieval service to ask instead; several with commas")
    flags.DEFINE_string("service_ca", None, "PEM file of the authorities that vouch for the service")
    flags.DEFINE_string("service_certificate", None, "PEM file to show to the service")
    flags.DEFINE_string("service_key", None, "PEM file of its private key")
    flags.DEFINE_string("service_token_file", None, "file with the bearer token of the service")
    flags.DEFINE_bool("service_allow_plaintext", False, "send the token without TLS elsewhere than on loopback")
    flags.DEFINE_float("service_seconds", seconds, "deadline of one call to the service", lower_bound=0.001)


def service() -> "Service | None":
    """What the flags of `define_service_flags` say; None when they name no service."""
    from retro_jax.retrieval.service.access import Service

    values = flags.FLAGS
    if values.service is None:
        return None
    return Service(
        values.service,
        values.service_ca,
        values.service_certificate,
        values.service_key,
        values.service_token_file,
        values.service_seconds,
        values.service_allow_plaintext,
    )


def define_retriever_flags(seconds: float) -> None:
    """Defines the flags that say where neighbours come from; read by `retriever`. `seconds`: of a service's call."""
    flags.DEFINE_string("database", None, "Retrieval database; without one the model runs OFF.")
    flags.DEFINE_string("embedder", None, "Directory (or hub id) of the database's embedder.")
    define_service_flags(seconds)


def retriever(run: "TrainedRun") -> "LiveDatabase | RetrievalClient | None":
    """The database or service that the flags of `define_retriever_flags` name, opened for live queries; None for none.

    Raises:
      UserError: flags that do not go together, or what they name does not fit the run.
    """
    values = flags.FLAGS
    if where := service():
        if values.database or values.embedder:
            raise UserError("--service goes without --database and --embedder: the service has them")
        client = where.connect()
        if not client.description.embeds:
            raise UserError(f"{where.addresses} cannot embed what was generated: start it with --embedder")
        run.check_tokenizer(client.tokenizer_fingerprint, where.addresses)
        return client
    if not values.database:
        if values.embedder:
            raise UserError("--embedder is of use only with --database")
        return None
    if not values.embedder:
        raise UserError("live queries of --database need --embedder, the one the database was embedded with")
    from retro_jax.retrieval.embedder import Embedder, EmbeddingSet
    from retro_jax.retrieval.live import LiveDatabase

    settings = EmbeddingSet(Path(values.database) / "embeddings").manifest.settings["embedder"]
    embedder = Embedder.load(values.embedder, normalize=settings["normalize"], max_length=settings["max_length"])
    database = LiveDatabase(values.database, embedder)
    run.check_tokenizer(database.tokenizer_fingerprint, values.database)
    return database


def _cluster() -> ModuleType | None:
    """The module of several processes, when this one is of several."""
    hosts = sys.modules.get("retro_jax.parallel.hosts")
    return hosts if hosts is not None and hosts.is_one_of_several() else None


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Parts from the other processes of the run at the end, or finds out which of them made this one fail."""
    try:
        yield
    except SystemExit:
        if cluster := _cluster():
            cluster.leave()  # an end that the program has chosen, as after SIGTERM
        raise
    except Exception:
        if cluster := _cluster():
            with cluster.named_failure():
                raise
        raise
    if cluster := _cluster():
        cluster.leave()


def _fail(message: str, status: int = UserError.exit_status) -> NoReturn:
    with contextlib.suppress(BrokenPipeError):  # nobody reads it; the other processes must be told all the same
        print(f"error: {message}", file=sys.stderr)
    _exit(status, message)


def _exit(status: int, reason: str) -> NoReturn:
    if cluster := _cluster():
        cluster.fail(reason, temporary=status == TemporaryError.exit_status)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.flush()
        os._exit(status)  # JAX's own end would wait for the other processes
    sys.exit(status)
