"""The connection to MLflow: its store and experiment, errors that say what to do, names and values that it accepts."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from lewis import private_names, store
from lewis.errors import InputError, LewisError, TransientError
from lewis.quick_imports import quick_imports
from lewis.redact import redacted
from lewis.store.manifest import DamagedError
from lewis.store.verification import PUT_BACK

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

MAX_KEY, MAX_PARAM = 250, 6000  # characters
FILES = "lewis.files"  # tag of a run: its files, each with its size and SHA-256
PART = "lewis.documents"  # tag of a version, and of a run's input, if only a part was scored: `64 of 1319`
BATCH = 100  # parameters per request
HEALING = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}
_FILES = re.compile(r"(https?://\S+?/mlflow-artifacts/artifacts)/")
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)")
_UNKNOWN_USER = {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}  # answers with status 401


class AwayError(TransientError):
    """A server does not answer; the caller can wait until it does.

    Attributes:
        url: of the server.
    """

    def __init__(self, message: str = "", url: str = "", *, mlflow: bool = False) -> None:
        """
        Args:
            url: of the server.
            mlflow: whether it is asked with the user and the password of MLflow.
        """
        super().__init__(message)
        self.url, self._mlflow = url, mlflow

    def answers(self) -> bool:
        """Whether the server answers now; a refusal, a status below 500, is an answer."""
        import requests

        user = os.environ.get("MLFLOW_TRACKING_USERNAME", ""), os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
        try:
            return requests.get(self.url, timeout=30, auth=user if self._mlflow else None).status_code < 500
        except requests.RequestException:
            return False


def without_tables(*names: str) -> None:
    """Make imports of packages for tables fail in this process: MLflow works as if they were not installed.

    They take 50 MB and a second. Call it in a process that has not imported them yet and writes no tables.

    Args:
        names: of packages; by default pandas, pyarrow and scipy, of which MLflow's server needs the first.
    """
    for name in names or ("pandas", "pyarrow", "scipy"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # so that an import of it fails


@contextmanager
def client(doing: str) -> Iterator["MlflowClient"]:
    """Give a client of `MLFLOW_TRACKING_URI`, or of a database in the store; create database and experiment if missing.

    Args:
        doing: what the block does, for the error message.

    Raises:
        AwayError: if the server, or the bucket of its artifacts, does not answer.
        TransientError: if the server is busy.
        InputError: if the server wants a user and a password, or others than it is given; or the store was moved.
        LewisError: if MLflow or the disk refuses, or the database is damaged.
    """
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")  # read when MLflow is first imported
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # it would print a password in the URL
    with quick_imports():
        import mlflow
        from mlflow.exceptions import MlflowException
        from requests import RequestException

    uri = os.environ.get("MLFLOW_TRACKING_URI") or database()
    try:
        # Two processes that create the same database or experiment at the same time fail, and a client creates both.
        with store.lock("mlflow"), quick_imports():
            create_database(uri)
            mlflow.set_tracking_uri(uri)
            connected = mlflow.MlflowClient(uri)
            experiment(connected)
        yield connected
    except (MlflowException, RequestException) as error:
        answer = error.response if isinstance(error, RequestException) else None
        if (answer is not None and answer.status_code == 401) or getattr(error, "error_code", "") in _UNKNOWN_USER:
            user = os.environ.get("MLFLOW_TRACKING_USERNAME")
            given = f"the password of {user}" if user else "no user"
            fix = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to those of the server"
            raise InputError(f"MLflow at {uri}: expected a user and a password, {given} was refused; {fix}") from None
        heals = isinstance(error, RequestException) or error.error_code in HEALING
        if heals and uri.startswith("http") and not (away := _away(f"MLflow at {uri}", doing, uri)).answers():
            raise away from error
        if heals and (files := _FILES.search(str(error))):  # such as a bucket
            what = f"MLflow at {uri}: {doing}: it does not reach the store of its files; see that this is up"
            raise AwayError(f"{what}, then run again", f"{files[1]}?path=", mlflow=True) from error
        raise (TransientError if heals else LewisError)(f"MLflow at {uri}: {doing}: {error}") from error
    except OSError as error:
        raise LewisError(f"MLflow at {uri}: {doing}: {error}") from error
    except Exception as error:
        # Of a database that is opened; later MLflow makes it an error of its own. Not imported where a server has it.
        sql = sys.modules.get("sqlalchemy.exc")
        if sql and isinstance(error, sql.DatabaseError):
            if isinstance(error, sql.OperationalError):  # the database is locked, or its server does not answer
                raise TransientError(f"MLflow at {uri}: {doing}: {error.orig}") from error
            raise LewisError(f"MLflow at {uri}: {doing}: {error.orig}; {PUT_BACK}") from error
        bucket = getattr(error, "kwargs", {}).get("endpoint_url")  # of botocore's errors; the package is an extra
        if bucket is None:
            raise
        raise _away(f"the bucket of MLflow's artifacts, {bucket}", doing, bucket) from error


def _away(server: str, doing: str, url: str) -> AwayError:
    return AwayError(f"{server}: {doing}: it does not answer; see that it is up, then run again", url)


def database() -> str:
    """The URI of the tracking store that is used where `MLFLOW_TRACKING_URI` names none: a database in the store."""
    return f"sqlite:///{_folder() / 'mlflow.db'}"


def place_of(uri: str) -> Path | str:
    """Where a database is, by its URI: the file of sqlite, or the URL of a server, without a password."""
    return Path(os.path.abspath(found["path"])) if (found := _SQLITE.match(uri)) else redacted(uri)


def absolute(uri: str) -> str:
    """Return the URI of a tracking store with the absolute path, if it is a file of sqlite."""
    found = _SQLITE.match(uri)
    if not found or found["path"] == ":memory:":
        return uri
    return uri[: found.start("path")] + os.path.abspath(found["path"]) + uri[found.end("path") :]


def exists() -> bool:
    """Whether there is a tracking store: one that `MLFLOW_TRACKING_URI` names, or a database in the store.

    An empty file is none: a full disk or a damaged one may leave it.
    """
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return True
    with suppress(FileNotFoundError):
        return (_folder() / "mlflow.db").stat().st_size > 0
    return False


def check_exists(what: str) -> None:
    """Check that there is a tracking store, for commands that only read and must not create one.

    Raises:
        InputError: naming what is looked for.
    """
    if not exists():
        raise InputError(f"{what}: nothing is registered in {store.home()}; set LEWIS_HOME or MLFLOW_TRACKING_URI")


def check_not_elsewhere() -> None:
    """Check that an empty registry means that nothing was registered, not that the versions are in another MLflow.

    Each connection creates the folder of artifacts. So where there is one, and no database, MLflow was elsewhere.

    Raises:
        InputError: if `MLFLOW_TRACKING_URI` is not set, and there is that folder and no database.
    """
    if not exists() and artifacts_folder().exists():
        raise InputError(
            f"{store.home()}: expected the MLflow that this store was used with; MLFLOW_TRACKING_URI is not set, and "
            f"{_folder() / 'mlflow.db'} is missing or empty; set MLFLOW_TRACKING_URI, or put back that file. If "
            f"nothing is registered, remove {artifacts_folder()}"
        )


def experiment_name(team: str = "") -> str:
    """Return the experiment's name, `MLFLOW_EXPERIMENT_NAME` or `lewis`; for a team with a suffix: `lewis/research`."""
    return "/".join(filter(None, (os.environ.get("MLFLOW_EXPERIMENT_NAME") or "lewis", team)))


def artifacts_folder() -> Path:
    """The folder for the artifacts of experiments, unless a server of the user's own keeps them."""
    return _folder() / "artifacts"


def local_path(location: str) -> Path | None:
    """Return the folder of artifacts at a location that MLflow names; None if it is not on this machine's disks."""
    parts = urlparse(location)
    return Path(url2pathname(parts.path)) if parts.scheme in ("", "file") else None


def check_not_moved(artifacts: Path) -> None:
    """Check that the store was not moved: MLflow names files by their whole path.

    Args:
        artifacts: the folder of an experiment's artifacts, as MLflow names it.

    Raises:
        InputError: if that is `artifacts_folder` of another store, and is not there.
    """
    own = artifacts_folder()
    if artifacts.parts[-2:] != own.parts[-2:] or store.holds(artifacts) or artifacts.exists():
        return
    old, new = artifacts.parents[1], store.home()
    raise InputError(
        f"{old}: MLflow names the files of versions by this folder, which is not there. If the store was moved to "
        f"{new}, move it back and set LEWIS_HOME, or make a link: ln -s {new} {old}"
    )


def experiment(client: "MlflowClient", team: str = "") -> str:
    """The id of the experiment `experiment_name`; created if it does not exist.

    Raises:
        InputError: if it has been deleted, or the store was moved, so that new files would go to its old folder.
    """
    from mlflow.exceptions import MlflowException

    name = experiment_name(team)
    artifacts = artifacts_folder()
    store.make_folder(artifacts)
    found = client.get_experiment_by_name(name)
    if found is None:
        # A server knows where its artifacts go. Without a server, MLflow would put them into the current folder.
        location = None if client.tracking_uri.startswith("http") else artifacts.as_uri()
        kind = {"mlflow.experimentKind": "custom_model_development"}  # else its page is that of traces
        try:
            return str(client.create_experiment(name, artifact_location=location, tags=kind))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)  # another machine has made it, or the request was sent again
        assert found is not None
    if found.lifecycle_stage != "active":
        restore = f"mlflow experiments restore -x {found.experiment_id}"
        raise InputError(f"MLflow's experiment {name!r} is deleted: run `{restore}`, or set MLFLOW_EXPERIMENT_NAME")
    # A server's clients on other machines may lack its folder, and ask only about what is in its database.
    if not client.tracking_uri.startswith("http") and (folder := local_path(found.artifact_location)):
        check_not_moved(folder)
    return str(found.experiment_id)


def run_of(client: "MlflowClient", run_id: str | None) -> "Run | None":
    """Return a run by its id; None without an id, or if the run was deleted permanently, as `mlflow gc` does."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def every(search: Callable[..., Any], *given: Any) -> Iterator[Any]:
    """Yield all results of a search, which MLflow returns in pages, for example a hundred models in each.

    Args:
        search: a method of the client.
        given: its arguments.
    """
    page = search(*given)
    yield from page
    while page.token:
        page = search(*given, page_token=page.token)
        yield from page


def log_numbers(
    client: "MlflowClient",
    run_id: str,
    model_id: str | None,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    documents: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Log parameters on a run, and metrics on the run and its model, with any names and in any number.

    Args:
        model_id: of the run's model; None if it has none.
        params, metrics: name -> value. A value of `params` that is too long is cut.
        documents: name of a metric -> name and digest of the dataset that it was measured on (`log_datasets`).
    """
    from mlflow.entities import Metric, Param
    from mlflow.utils.time import get_current_time_millis

    now, of = get_current_time_millis(), documents or {}
    points = []
    for name, value in metrics.items():
        task, digest = of.get(name, (None, None))
        points.append(
            Metric(key(name), float(value), now, 0, model_id=model_id, dataset_name=task, dataset_digest=digest)
        )
    settings = [Param(key(name), cut(str(value), MAX_PARAM, "recipe.yaml")) for name, value in params.items()]
    for start in range(0, max(len(points), len(settings)), BATCH):
        client.log_batch(run_id, points[start : start + BATCH], settings[start : start + BATCH])


@dataclass(frozen=True)
class RunInput:
    """A dataset that a run was given.

    Attributes:
        name: of the evaluation task, or of the calibration set.
        digest: of its content; at most 36 characters.
        context: `evaluation` or `calibration`.
        kind: of its source: `hugging_face` as MLflow has it, or `lm-eval`, `files` or `texts`.
        source: where it comes from, as plain data; from the Hub with the keys of MLflow's `HuggingFaceDatasetSource`.
        part: which part of its documents an evaluation that ended early scored, such as `64 of 164`; else empty.
    """

    name: str
    digest: str
    context: str
    kind: str
    source: Mapping[str, Any]
    part: str = ""


def log_datasets(client: "MlflowClient", run_id: str, datasets: Sequence[RunInput]) -> None:
    """Log datasets as the inputs of a run.

    MLflow looks up each one first, and refuses all if another run of the experiment adds one of them in between. So
    the request is repeated, and then finds that one.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException

    inputs = [
        DatasetInput(
            Dataset(each.name, each.digest, each.kind, json.dumps(each.source)),
            [InputTag("mlflow.data.context", each.context), *([InputTag(PART, each.part)] if each.part else [])],
        )
        for each in datasets
    ]
    for left in reversed(range(2 * len(inputs))):  # at worst others add one of them before each of our tries
        try:
            client.log_inputs(run_id, datasets=inputs)
            return
        except MlflowException as error:
            if error.error_code != "BAD_REQUEST" or not left:
                raise


def log_files(client: "MlflowClient", run_id: str, files: Mapping[str, bytes], *, checked: bool = False) -> None:
    """Log files, by name, as artifacts of a run.

    Args:
        checked: whether their sizes and checksums are noted for `check_files`; those noted before stay noted.
    """
    with store.scratch_folder("files") as scratch:
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        client.log_artifacts(run_id, str(scratch))
    if checked:
        noted = client.get_run(run_id).data.tags.get(FILES, "{}")
        new = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
        client.set_tag(run_id, FILES, json.dumps({**json.loads(noted), **new}))


def file_of(client: "MlflowClient", run_id: str, name: str) -> bytes:
    """Return the content of a file of a run, as the artifact store has it.

    Raises:
        OSError, MlflowException: if there is no such file, or it cannot be read.
    """
    with store.scratch_folder("files") as scratch:
        return Path(client.download_artifacts(run_id, name, str(scratch))).read_bytes()


def check_files(client: "MlflowClient", run_id: str) -> set[str]:
    """Check that the files of a run are those that `log_files` noted; return their names.

    Raises:
        DamagedError: naming a file that is missing or damaged.
    """
    from mlflow.exceptions import MlflowException

    if (run := run_of(client, run_id)) is None:
        raise DamagedError("it was deleted")
    try:
        noted = json.loads(run.data.tags.get(FILES, "{}"))
    except ValueError as error:
        raise DamagedError(f"the tag {FILES} is damaged") from error
    for name, (size, sha256) in noted.items():
        try:
            content = file_of(client, run_id, name)
        except (OSError, MlflowException) as error:
            raise DamagedError(f"{name} cannot be read: {error}") from error
        if (len(content), hashlib.sha256(content).hexdigest()) != (size, sha256):
            raise DamagedError(f"{name}: expected SHA-256 {sha256}, it has another content; put back that of a backup")
    return set(noted)


def key(name: str) -> str:
    """Return `name` with only the characters that MLflow accepts in the name of a metric, a parameter or a tag.

    `gsm8k/exact_match,strict-match` becomes `gsm8k/exact_match/strict-match`, and `arc/acc,none` becomes `arc/acc`.
    MLflow reads names as paths, so `../math` becomes `_../math`, `./merged` becomes `_./merged`, and `/math` `_/math`.
    """
    allowed = re.sub(r"[^/\w.\- ]", "_", name.removesuffix(",none").replace(",", "/"))
    return "/".join(f"_{part}" if part in ("", ".", "..") else part for part in allowed.split("/"))[:MAX_KEY]


def model_name(name: str) -> str:
    """Return `name` without the characters that MLflow or its filters refuse.

    Raises:
        InputError: if nothing is left of it.
    """
    cleaned = re.sub(r"[/:\"'`]", "_", name).strip()
    if not cleaned.strip("."):
        raise InputError(f"register.name: expected the name of a registered model, got {name!r}")
    return cleaned


def cut(text: str, limit: int, whole: str) -> str:
    """Return `text`, cut to `limit` characters; then it ends with a note that all of it is in the file `whole`."""
    note = f"... (cut, all of it is in {whole})"
    return text if len(text) <= limit else text[: limit - len(note)] + note


def create_database(uri: str) -> None:
    """Create a sqlite database in the store, unless it is there; one on a server is left to MLflow.

    It is made under a scratch name and renamed, as MLflow cannot use one with half of its tables.
    """
    path = Path(uri.removeprefix("sqlite:///"))
    if not uri.startswith("sqlite:///") or path.exists():
        return
    store.sweep(store.make_folder(path.parent))
    with store.written_beside(path) as beside:
        create = private_names.MLFLOW_SQL_STORE.get()
        create(f"sqlite:///{beside}", artifacts_folder().as_uri()).engine.dispose()


def _folder() -> Path:
    return store.home() / "mlflow"
