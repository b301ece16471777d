"""The settings: every environment variable `LEWIS_*`, what it may be, and what it does.

    settings.QUOTA.get()  # the value of LEWIS_QUOTA now: an int in bytes, or None

A setting is read at each call, so a service and its tests can change the environment. A variable that is empty, or has
nothing but white space, counts as not set. `lewis settings` prints this table, and deployments/SETTINGS.md has it.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from lewis.errors import InputError, nearest
from lewis.redact import redacted

T = TypeVar("T")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Setting(Generic[T]):
    """One environment variable.

    Attributes:
        name: of the variable.
        what: what it does, in a sentence.
        expected: what a value must be, for error messages and the documentation.
        read: makes the value from the text of the variable, without white space at its ends; raises ValueError, with
            the reason or without a message, if the text is wrong. It is also called with an empty default.
        default: the text that counts if the variable is not set.
        secret: whether the value is never printed.
    """

    name: str
    what: str
    expected: str
    read: Callable[[str], T]
    default: str = ""
    secret: bool = False

    def get(self) -> T:
        """The value now.

        Raises:
            InputError: if the variable has a wrong value; names the setting, what was expected and what was given.
        """
        given = self.given()
        try:
            return self.read(given or self.default)
        except ValueError as error:
            got = "another value (not shown: it is a secret)" if self.secret else repr(given)
            reason = f": {error}" if str(error) else ""
            raise InputError(f"{self.name}: expected {self.expected}, got {got}{reason}; change or unset it") from None

    def given(self) -> str:
        """The text of the variable; empty if it is not set."""
        return os.environ.get(self.name, "").strip()

    def shown(self) -> str:
        """The text that counts now, for people: of a secret only whether it is set, of a URL no password."""
        if self.secret:
            return "set" if self.given() else "not set"
        return redacted(self.given() or self.default)


def secret(name: str, what: str) -> Setting[str]:
    """A setting that is a password or key."""
    return Setting(name, what, "one line", _matching(r"[^\x00-\x1f\x7f]+"), secret=True)


def parse_size(text: str) -> int:
    """`"5GB"` in bytes (decimal units, as transformers' `max_shard_size`).

    Raises:
        ValueError: without a message, if the text is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    size = float(match[1]) * _UNITS[(match[2] or "").removeprefix("B")] if match else 0.0
    if not 1 <= size < 1e18:
        raise ValueError
    return int(size)


def _optional(read: Callable[[str], T]) -> Callable[[str], T | None]:
    return lambda text: read(text) if text else None


def _choice(*values: str) -> Callable[[str], str]:
    return _matching("|".join(values))


def _matching(pattern: str) -> Callable[[str], str]:
    """The text itself, which must match unless it is empty."""

    def read(text: str) -> str:
        if text and not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return read


def _switch(text: str) -> bool:
    return _choice("0", "1")(text) == "1"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or int(text) > 65535:
        raise ValueError
    return int(text)


def _folder(text: str) -> Path:
    """The absolute path, without links."""
    try:
        return Path(text).expanduser().resolve()
    except RuntimeError as error:  # "~nobody", links in a circle
        raise ValueError(error) from error


def _folder_as_named(text: str) -> Path:
    """The absolute path, with the links in it."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # "~nobody"
        raise ValueError(error) from error


def _server(text: str) -> str:
    """The URL of a server, or the command that starts one."""
    if text.startswith(("http://", "https://")):
        return text
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"it cannot be read as a command: {error}") from error
    if text and not all(any(place in word for word in words) for place in ("{model}", "{port}")):
        raise ValueError
    return text


_URL = _matching(r"https?://[^\s/]\S*")
_NAME = _matching(r"[^/%&<>\s]+")
_WORD = _matching(r"\S+")
_EXAMPLE = "`vllm serve {model} --host 127.0.0.1 --port {port}`"

HOME = Setting(
    "LEWIS_HOME",
    "The store: the folder of everything that LEWIS writes.",
    "a folder",
    _folder,
    "~/.cache/lewis",
)
STORE = Setting(
    "LEWIS_STORE",
    "Where machines without a shared disk keep the entries of their stores for each other; without it, nowhere.",
    "a URL that fsspec opens, such as s3://bucket/prefix, or an absolute path",
    lambda text: _matching(r"/.*|[^\s/]+://.*")(text).rstrip("/"),
)
STORE_MERGED = Setting(
    "LEWIS_STORE_MERGED", "Whether merged models are kept in LEWIS_STORE too.", "0 or 1", _switch, "0"
)
QUOTA = Setting(
    "LEWIS_QUOTA",
    "How much the store may have on disk; without it, as much as there is.",
    "a size such as 5GB or 500MB",
    _optional(parse_size),
)
RECIPES = Setting(
    "LEWIS_RECIPES",
    "The folder of the recipes that the service keeps up to date; without it, deployments/recipes in a checkout, else "
    "recipes in the store.",
    "a folder",
    _optional(_folder_as_named),
)
MERGE_DEVICE = Setting(
    "LEWIS_MERGE_DEVICE", "Where merges compute; cuda is a GPU.", "cpu or cuda", _choice("cpu", "cuda"), "cpu"
)
DEVICE_SLOTS = Setting(
    "LEWIS_DEVICE_SLOTS",
    "How many tasks of this machine may compute at once; without it, as many as it has GPUs, or one.",
    "a whole number from 1 up",
    _optional(_count),
)
TASK_RUNNER = Setting(
    "LEWIS_TASK_RUNNER",
    "Where the tasks of a run are executed: in threads, processes, or on a cluster.",
    "thread, process, dask, ray",
    _choice("thread", "process", "dask", "ray"),
    "thread",
)
MAX_WORKERS = Setting(
    "LEWIS_MAX_WORKERS",
    "How many threads, or processes, execute the tasks of a run; without it, 8 threads, or one process more than "
    "LEWIS_DEVICE_SLOTS.",
    "a whole number from 1 up",
    _optional(_count),
)
DASK_ADDRESS = Setting(
    "LEWIS_DASK_ADDRESS",
    "The scheduler of the Dask cluster; without it, a run starts a cluster on its machine.",
    "an address such as tcp://host:8786",
    _WORD,
)
RAY_ADDRESS = Setting(
    "LEWIS_RAY_ADDRESS",
    "The Ray cluster, auto is the one of this machine; without it, a run starts one.",
    "an address such as host:6379, or auto",
    _WORD,
)
EVALUATION_SERVER = Setting(
    "LEWIS_EVALUATION_SERVER",
    "What answers for `evaluate.backend: openai`: the command that starts a server, or the URL of one that runs.",
    f"a command with {{model}} in it, and {{port}}, such as {_EXAMPLE}, or the URL of a server",
    _server,
)
EVALUATE_QUEUE = Setting(
    "LEWIS_EVALUATE_QUEUE",
    "The work queue whose workers score models; without it, models are scored where they are merged.",
    "the name of a work queue, such as gpu",
    _NAME,
)
EVALUATE_POOL = Setting(
    "LEWIS_EVALUATE_POOL",
    "The work pool that has the queue for evaluations.",
    "the name of a work pool, such as evaluate",
    _NAME,
    "lewis",
)
MLFLOW_AUTH = Setting(
    "LEWIS_MLFLOW_AUTH", "Whether the MLflow server of `lewis up` asks for a password.", "0 or 1", _switch, "1"
)
MLFLOW_UI = Setting(
    "LEWIS_MLFLOW_UI",
    "The address of MLflow's pages in links; without it, MLFLOW_TRACKING_URI.",
    "a URL that begins with http:// or https://",
    _URL,
)
LOG_FORMAT = Setting(
    "LEWIS_LOG_FORMAT",
    "How logs are written: as text, or an object of JSON a line.",
    "text or json",
    _choice("text", "json"),
    "text",
)
WORKER_LIMIT = Setting(
    "LEWIS_WORKER_LIMIT", "How many runs the worker of `lewis up` has at once.", "a whole number from 1 up", _count, "4"
)
NOTIFY = Setting(
    "LEWIS_NOTIFY",
    "The block of the Prefect server that sends notifications.",
    "the type and name of a notification block, such as slack-webhook/ops",
    _matching(r"[^/\s]+/[^/]+"),
)
NOTIFY_URL = Setting(
    "LEWIS_NOTIFY_URL",
    "Where notifications are sent without such a block: it gets a POST of `subject` and `body` as JSON.",
    "a URL that begins with http:// or https://",
    _URL,
    secret=True,
)
WEBHOOK_HOST = Setting(
    "LEWIS_WEBHOOK_HOST", "The address that the webhook receiver listens on.", "a host, such as 0.0.0.0", _WORD,
    "127.0.0.1",
)  # fmt: skip
WEBHOOK_PORT = Setting(
    "LEWIS_WEBHOOK_PORT",
    "The port that the webhook receiver listens on; 0, which `lewis up` does not take, is a free one.",
    "a port, 0 to 65535",
    _port,
    "4300",
)
WEBHOOK_URL = Setting(
    "LEWIS_WEBHOOK_URL",
    "Where `lewis status` finds the webhook receiver; without it, that of `lewis up` on the same store.",
    "a URL that begins with http:// or https://",
    _URL,
)
WEBHOOK_SECRET = secret(
    "LEWIS_WEBHOOK_SECRET",
    "What the Hub must send with each webhook; without it, webhook-secret in the store, made when missing.",
)
METRICS_KEY = secret(
    "LEWIS_METRICS_KEY", "What Prometheus must send; without it, metrics-key in the store, made when missing."
)

ALL: tuple[Setting[Any], ...] = tuple(each for each in list(vars().values()) if isinstance(each, Setting))
"""Every setting, in the order of this file."""


def check() -> None:
    """Read every setting.

    Raises:
        InputError: naming the first that has a wrong value.
    """
    for each in ALL:
        each.get()


def unknown() -> Iterator[str]:
    """A sentence for each variable of the environment that is named like a setting and is none, such as `LEWIS_HOM`."""
    names = [each.name for each in ALL]
    known = {*names, *(f"{each.name}_FILE" for each in ALL if each.secret)}
    for name in sorted(os.environ):
        if name.startswith("LEWIS_") and name not in known:
            yield f"{name}: there is no such setting{nearest(name, names)}"
