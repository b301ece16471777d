"""The settings: the environment variables `LEWIS_*`, the values that each may have, and what it does.

    settings.QUOTA.get()  # the value of LEWIS_QUOTA now: an int in bytes, or None

A setting is read at each call, so a service and its tests can change the environment. A variable that is empty, or has
nothing but white space, counts as not set. `lewis settings` prints this table, and deployments/SETTINGS.md has it.
"""

import math
import os
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from lewis.errors import InputError, nearest
from lewis.redact import redacted

T = TypeVar("T")
_EACH = r"(\*|N(-N)?)(/0*[1-9]\d*)?"
_CRON = {  # field -> the least and the greatest number, what may stand in a list and alone; N is a number or a name
    "minute": (0, 59, r"\d{1,4}", _EACH, ""),
    "hour": (0, 23, r"\d{1,4}", _EACH, ""),
    "day": (1, 31, r"\d{1,4}", rf"{_EACH}|(N-)?l", r"\?"),
    "month": (1, 12, r"\d{1,4}|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec", _EACH, ""),
    "weekday": (0, 7, r"\d{1,4}|sun|mon|tue|wed|thu|fri|sat", _EACH, r"\?|l[0-7](,l[0-7])*|N#[1-5](,N#[1-5])*"),
}
_SHORT = {"2": 29, "feb": 29} | dict.fromkeys(("4", "apr", "6", "jun", "9", "sep", "11", "nov"), 30)  # months: days
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Kind(NamedTuple, Generic[T]):
    """The kind of value that a setting may have.

    Attributes:
        expected: the valid values in words, for error messages and the documentation.
        read: makes the value from a text without white space at its ends; raises ValueError, with the reason or without
            a message, if the text is wrong. It is also called with an empty default.
    """

    expected: str
    read: Callable[[str], T]


@dataclass(frozen=True)
class Setting(Generic[T]):
    """A setting, which is read from an environment variable.

    Attributes:
        name: name of the variable.
        kind: the kind of its value.
        default: the text that counts if the variable is not set.
        what: what the setting does, in a sentence.
        secret: whether the value is never printed.
    """

    name: str
    kind: Kind[T]
    default: str
    what: str
    secret: bool = False

    def get(self) -> T:
        """Return the current value of the setting.

        Raises:
            InputError: if the variable has a wrong value; the message says what was expected and what was given.
        """
        given = self.given()
        try:
            return self.kind.read(given or self.default)
        except ValueError as error:
            got = "another value (not shown: it is a secret)" if self.secret else repr(given)
            reason = f": {error}" if str(error) else ""
            fix = "change or unset it"
            raise InputError(f"{self.name}: expected {self.kind.expected}, got {got}{reason}; {fix}") from None

    def given(self) -> str:
        """The text of the variable; empty if it is not set."""
        return os.environ.get(self.name, "").strip()

    def shown(self) -> str:
        """Return the current text for people: for a secret only whether it is set, for a URL without its password."""
        if self.secret:
            return "set" if self.given() else "not set"
        return redacted(self.given() or self.default)


def parse_size(text: str) -> int:
    """Return a size such as `"5GB"` in bytes (decimal units, as in transformers' `max_shard_size`).

    Raises:
        ValueError: without a message, if the text is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", text.strip().upper())
    size = float(match[1]) * _UNITS[(match[2] or "").removeprefix("B")] if match else 0.0
    if not 1 <= size < 1e18:
        raise ValueError
    return int(size)


def size_text(size: float) -> str:
    """Return a number of bytes as text for people: `41.3 KB`, `2.4 MB`, or `1.53 GB`."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} KB"


def _path(text: str) -> Path:
    """Return the absolute path of a text, without resolving links."""
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError as error:  # "~nobody"
        raise ValueError(error) from error


def _store(text: str) -> Path:
    """Return the absolute path of the store, with all links resolved; not `/`, since the store is closed to others."""
    try:
        place = _path(text).resolve()
    except RuntimeError as error:  # links in a circle
        raise ValueError(error) from error
    if place == place.parent:
        raise ValueError("the store needs a folder of its own, since other users may not read it")
    return place


def _cron(text: str) -> str:
    """Check the five fields of a cron expression, and return it; empty for `off`."""
    if text == "off":
        return ""
    fields = text.split()
    if len(fields) != len(_CRON):
        raise ValueError
    for field, (what, (least, most, name, each, alone)) in zip(fields, _CRON.items(), strict=True):
        form = rf"({each})(,({each}))*|{alone}".replace("N", f"({name})")
        numbers = [int(number) for number in re.findall(r"\d+", re.sub(r"[/#]\d+", "", field))]
        if not re.fullmatch(form, field, re.IGNORECASE) or not all(least <= number <= most for number in numbers):
            raise ValueError(f"{field!r} is no {what}, {least} to {most}")
    _, _, day, month, weekday = fields
    if weekday in ("*", "?") and re.fullmatch(r"[\d,-]+", day) and re.fullmatch(r"[\w,]+", month):
        longest = max(_SHORT.get(each.lower().lstrip("0"), 31) for each in month.split(","))
        if min(map(int, re.findall(r"\d+", day))) > longest:
            raise ValueError(f"day {day!r} of month {month!r} never comes")
    return text


def _whole(text: str, least: int = 1, most: float = math.inf) -> int:
    if not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
        raise ValueError
    return int(text)


def _server(text: str) -> str:
    """Check the URL of a server, or the command that starts one, and return it."""
    if text.startswith(("http://", "https://")):
        return text
    words = _words(text)
    if text and not all(any(place in word for word in words) for place in ("{model}", "{port}")):
        raise ValueError
    return text


def _serving(text: str) -> list[str]:
    """Check a command that serves a model, and return its words; empty for an empty text."""
    words = _words(text)
    if words and (Path(words[0]).name not in ("vllm", "transformers") or words[1:2] != ["serve"]):
        raise ValueError
    return words


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(f"it cannot be read as a command: {error}") from error


def _matching(expected: str, pattern: str) -> Kind[str]:
    """Return the kind of a text that must match a pattern unless it is empty."""

    def read(text: str) -> str:
        if text and not re.fullmatch(pattern, text):
            raise ValueError
        return text

    return Kind(expected, read)


def _one_of(*values: str) -> Kind[str]:
    return _matching(" or ".join(values) if len(values) == 2 else ", ".join(values), "|".join(values))


def _optional(expected: str, read: Callable[[str], T]) -> Kind[T | None]:
    return Kind(expected, lambda text: read(text) if text else None)


_SWITCH = Kind("0 or 1", lambda text: _one_of("0", "1").read(text) == "1")
_COUNT = "a whole number from 1 up"
_URL = _matching("a URL that begins with http:// or https://", r"https?://[^\s/]\S*")
_BUCKET = _matching(  # a place in it, too: without one, fsspec opens a folder of the working folder
    "a URL that fsspec opens, such as s3://bucket/prefix, or an absolute path",
    r"/+[^/].*|(?!(?:file|local)://[^/~])[^\s/]+:///*[^/].*",
)
ONE_LINE = _matching("one line", r"[^\x00-\x1f\x7f]+")
_HEADER = _matching("one line of letters of ISO 8859-1", r"[\x20-\x7e\xa0-\xff]+")
_EXAMPLE = "`vllm serve {model} --host 127.0.0.1 --port {port}`"

# fmt: off
HOME = Setting("LEWIS_HOME", Kind("a folder", _store), "~/.cache/lewis",
    "The store: the folder of everything that LEWIS writes.")
STORE = Setting("LEWIS_STORE", Kind(_BUCKET.expected, lambda text: _BUCKET.read(text).rstrip("/")), "",
    "Where machines without a shared disk keep the entries of their stores for each other; without it, nowhere.")
STORE_MERGED = Setting("LEWIS_STORE_MERGED", _SWITCH, "0",
    "Whether merged models are kept in LEWIS_STORE too.")
QUOTA = Setting("LEWIS_QUOTA", _optional("a size such as 5GB or 500MB", parse_size), "",
    "How much the store may have on disk; without it, as much as there is.")
RECIPES = Setting("LEWIS_RECIPES", _optional("a folder", _path), "",
    "The folder of the recipes that the service keeps up to date; without it, deployments/recipes in a checkout, else "
    "recipes in the store.")
NIGHTLY = Setting("LEWIS_NIGHTLY", Kind("five fields of cron, such as 0 3 * * *, or off", _cron), "0 3 * * *",
    "When each recipe is merged at night, in this machine's time zone, from its first deployment on; off is never.")
POLL_SECONDS = Setting("LEWIS_POLL_SECONDS", Kind("a whole number, 0 or more", lambda text: _whole(text, 0)), "45",
    "How often the service asks the Hub, and looks into local folders, for models that have moved; 0 is never.")
MERGE_DEVICE = Setting("LEWIS_MERGE_DEVICE", _one_of("cpu", "cuda"), "cpu",
    "Where merges compute; cuda is a GPU.")
DEVICE_SLOTS = Setting("LEWIS_DEVICE_SLOTS", _optional(_COUNT, _whole), "",
    "How many tasks of this machine may compute at once; without it, as many as it has GPUs, or one.")
TASK_RUNNER = Setting("LEWIS_TASK_RUNNER", _one_of("thread", "process", "dask", "ray"), "thread",
    "Where the tasks of a run are executed: in threads, processes, or on a cluster.")
MAX_WORKERS = Setting("LEWIS_MAX_WORKERS", _optional(_COUNT, _whole), "",
    "How many threads, or processes, execute the tasks of a run; without it, 8 threads, or one process more than "
    "LEWIS_DEVICE_SLOTS.")
DASK_ADDRESS = Setting("LEWIS_DASK_ADDRESS", _matching("an address such as tcp://host:8786", r"\S+"), "",
    "The scheduler of the Dask cluster; without it, a run starts a cluster on its machine.")
RAY_ADDRESS = Setting("LEWIS_RAY_ADDRESS", _matching("an address such as host:6379, or auto", r"\S+"), "",
    "The Ray cluster, auto is the one of this machine; without it, a run starts one.")
EVALUATION_SERVER = Setting("LEWIS_EVALUATION_SERVER",
    Kind(f"a command with {{model}} in it, and {{port}}, such as {_EXAMPLE}, or the URL of a server", _server), "",
    "What answers for `evaluate.backend: openai`: the command that starts a server, or the URL of one that runs.")
JUDGE = Setting("LEWIS_JUDGE", _URL, "",
    "The server with the protocol of OpenAI that `register.gate.judge` asks, such as http://127.0.0.1:8000/v1.")
JUDGE_KEY = Setting("LEWIS_JUDGE_KEY", _HEADER, "",
    "The key of that server.", secret=True)
CODE_NEEDS_NAMESPACES = Setting("LEWIS_CODE_NEEDS_NAMESPACES", _SWITCH, "0",
    "Whether code that a recipe brings (`allow_code_execution`) is refused where Linux allows no namespaces; with 0 it "
    "runs there too, and can read the secrets of the worker.")
EVALUATE_QUEUE = Setting("LEWIS_EVALUATE_QUEUE",
    _matching("the name of a work queue, such as gpu", r"[^/%&<>\s]+"), "",
    "The work queue whose workers score models; without it, models are scored where they are merged.")
EVALUATE_POOL = Setting("LEWIS_EVALUATE_POOL",
    _matching("the name of a work pool, such as evaluate", r"[^/%&<>\s]+"), "lewis",
    "The work pool that has the queue for evaluations.")
MLFLOW_AUTH = Setting("LEWIS_MLFLOW_AUTH", _SWITCH, "1",
    "Whether the MLflow server of `lewis up` asks for a password.")
MLFLOW_UI = Setting("LEWIS_MLFLOW_UI", _URL, "",
    "The address of MLflow's pages in links; without it, MLFLOW_TRACKING_URI.")
LOG_FORMAT = Setting("LEWIS_LOG_FORMAT", _one_of("text", "json"), "text",
    "How logs are written: as text, or an object of JSON a line.")
SERVER_WAIT = Setting("LEWIS_SERVER_WAIT_SECONDS",
    Kind("a whole number of seconds", lambda text: _whole(text, 0)), "300",
    "How long a run waits for a server of Prefect or MLflow that does not answer.")
WORKER_LIMIT = Setting("LEWIS_WORKER_LIMIT", Kind(_COUNT, _whole), "4",
    "How many runs the worker of `lewis up` has at once.")
NOTIFY = Setting("LEWIS_NOTIFY",
    _matching("the type and name of a notification block, such as slack-webhook/ops", r"[^/\s]+/[^/]+"), "",
    "The block of the Prefect server that sends notifications.")
NOTIFY_URL = Setting("LEWIS_NOTIFY_URL", _URL, "",
    "Where notifications are sent without such a block: it gets a POST of `subject` and `body` as JSON.", secret=True)
WEBHOOK_HOST = Setting("LEWIS_WEBHOOK_HOST", _matching("a host, such as 0.0.0.0", r"\S+"), "127.0.0.1",
    "The address that the webhook receiver listens on; that of `lewis up` listens on 127.0.0.1 alone.")
WEBHOOK_PORT = Setting("LEWIS_WEBHOOK_PORT", Kind("a port, 0 to 65535", lambda text: _whole(text, 0, 65535)), "4300",
    "The port that the webhook receiver listens on; 0, which `lewis up` does not take, is a free one.")
WEBHOOK_URL = Setting("LEWIS_WEBHOOK_URL", _URL, "",
    "Where `lewis status` finds the webhook receiver; without it, that of `lewis up` on the same store.")
WEBHOOK_SECRET = Setting("LEWIS_WEBHOOK_SECRET", ONE_LINE, "",
    "What the Hub must send with each webhook; without it, webhook-secret in the store, made when missing.",
    secret=True)
METRICS_KEY = Setting("LEWIS_METRICS_KEY", ONE_LINE, "",
    "What Prometheus must send; without it, metrics-key in the store, made when missing.", secret=True)
SERVE_PROGRAMS = Setting("LEWIS_SERVE_PROGRAMS", _optional("a folder", _path), "",
    "The folder of the programs that targets of the kind `command` may run; without it, they run none.")
SERVE_SECRET = Setting("LEWIS_SERVE_SECRET", ONE_LINE, "",
    "What signs the webhooks of `serve`; without it, serve-secret in the store, made when missing.", secret=True)
SERVE_KEY = Setting("LEWIS_SERVE_KEY", ONE_LINE, "",
    "What the servers of `serve` ask for: sent as `Authorization: Bearer`; without it, nothing is sent.", secret=True)
UP_SERVE_PORT = Setting("LEWIS_UP_SERVE_PORT",
    Kind("a port, 1 to 65535", lambda text: _whole(text, 1, 65535)), "4400",
    "The port on which `lewis up --serve` answers clients.")
UP_SERVE_COMMAND = Setting("LEWIS_UP_SERVE_COMMAND",
    Kind("`vllm serve` or `transformers serve`, with options of yours", _serving), "",
    "What `lewis up --serve` starts a server with, such as `/opt/vllm/bin/vllm serve --gpu-memory-utilization 0.45`; "
    "without it, vllm if there is such a program, else transformers.")
UP_SERVE_SERVERS = Setting("LEWIS_UP_SERVE_SERVERS",
    Kind("1 or 2", lambda text: int(_one_of("1", "2").read(text))), "2",
    "How many servers `lewis up --serve` may have while the champion moves; 1 ends the old one first: requests fail "
    "until the new one is up.")
UP_SERVE_KEY = Setting("LEWIS_UP_SERVE_KEY", _matching("letters, digits, - and _", r"[\w-]+"), "",
    "What `lewis up --serve` asks clients for; without it, champion-key in the store, made when missing.",
    secret=True)
# fmt: on

ALL: tuple[Setting[Any], ...] = tuple(each for each in list(vars().values()) if isinstance(each, Setting))
"""Every setting, in the order of this file."""

IN_FILES = (
    *("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_DATABASE_PASSWORD"),
    *("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PGPASSWORD", "MLFLOW_BACKEND_STORE_URI", "MLFLOW_AUTH_ADMIN_PASSWORD"),
    *("MLFLOW_FLASK_SERVER_SECRET_KEY", "MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    *("HF_TOKEN", *(each.name for each in ALL if each.secret)),
)
"""The variables, also of other programs, whose values may be in a file that the variable `NAME_FILE` names."""


FOLDERS = (HOME, RECIPES, SERVE_PROGRAMS)
"""The settings that name a folder of this machine."""


def make_absolute() -> None:
    """Make relative paths of folders in the environment absolute: the processes that inherit it work in other folders.

    A value that is no path is left as it is.
    """
    for each in FOLDERS:
        if given := each.given():
            with suppress(ValueError, OSError):
                os.environ[each.name] = str(_path(given))


def check_absolute() -> None:
    """Check that no folder has a relative path, where the working folder is one that the user does not know.

    Raises:
        InputError: naming the first that has.
    """
    for each in FOLDERS:
        if (given := each.given()) and not given.startswith(("/", "~")):
            raise InputError(
                f"{each.name}: expected an absolute path, got {given!r}, which would be a folder in {Path.cwd()}; set "
                "it to the whole path where the worker or the program is started"
            )


def check() -> None:
    """Check the value of every setting.

    Raises:
        InputError: if one is wrong; the message names the first.
    """
    for each in ALL:
        each.get()


def unknown() -> Iterator[str]:
    """Yield a sentence for each environment variable that is named like a setting but is none, such as `LEWIS_HOM`."""
    names = [each.name for each in ALL]
    known = {*names, *(f"{each.name}_FILE" for each in ALL if each.secret)}
    for name in sorted(os.environ):
        if name.startswith("LEWIS_") and name not in known:
            yield f"{name}: there is no such setting{nearest(name, names)}"
