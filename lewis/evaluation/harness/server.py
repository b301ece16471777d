"""A server that answers for one model with the protocol of OpenAI: started here, or one that runs already.

`LEWIS_EVALUATION_SERVER` is a setting of the worker and not of the recipe, since it says what is run on that machine:
a command with `{model}` and `{port}` in it, and maybe `{gpus}`, or the URL of a server. A server that is started here
ends with this process, also if that is killed.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import IO, Any

from lewis import guard, settings
from lewis.errors import InputError, LewisError
from lewis.redact import redacted
from lewis.walls.isolation import way_to_the_hub, without_secrets

PATIENCE = 1800.0  # seconds until a server that was started must answer
_GRACE = 15.0  # seconds to end after SIGTERM, before it is killed
_SHOWN = 4000  # bytes at the end of its output that an error message shows
_EXAMPLE = "`vllm serve {model} --host 127.0.0.1 --port {port}`"


@dataclass(frozen=True)
class Served:
    """A running server that has the model.

    Attributes:
        url: of its API, without a slash at the end, such as http://127.0.0.1:8000/v1.
        environment: variables that its clients need.
        problem: gives words for the message of a failed evaluation, if the server has ended: that, and how.
    """

    url: str
    environment: Mapping[str, str]
    problem: Callable[[], str] = str


def setting() -> str:
    """The worker's setting, a command or a URL; empty if it is not set."""
    return settings.EVALUATION_SERVER.get()


def is_url() -> bool:
    """Whether the server is one that runs already, so that it takes no device of this machine."""
    return setting().startswith(("http://", "https://"))


def key() -> dict[str, str]:
    """The variable with the API key of the server; empty if it is not set."""
    return {name: os.environ[name] for name in ("OPENAI_API_KEY",) if os.environ.get(name)}


def check() -> None:
    """Check that the setting is a URL, or a command whose program this machine has.

    Raises:
        InputError: saying what the setting must be.
    """
    if not is_url():
        _command("", 0, 1)


@contextmanager
def serving(
    model: str, environment: Mapping[str, str], patience_s: float = PATIENCE, tick: Callable[[], None] = lambda: None
) -> Iterator[Served]:
    """Start a server of this model, or find the one that runs, for as long as the context lasts.

    Args:
        model: folder of the checkpoint, which is also the name that it must be served under.
        environment: variables of the server, in addition to those of an evaluation: what shows it its GPUs.
        patience_s: how long it may take to load the model.
        tick: called now and then while it loads; what it raises ends the wait.

    Raises:
        InputError: if the setting is wrong, or the server does not have this model.
        LewisError: if the server ends or does not answer in time.
    """
    if is_url():
        url = setting().rstrip("/")
        _check_model(url, model, _models(url, direct=False))
        yield Served(url, way_to_the_hub(os.environ))  # with proxies, as the server may be elsewhere
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "").count(",") + 1
    command, url = _command(model, port, gpus), f"http://127.0.0.1:{port}/v1"
    direct = ",".join(filter(None, ["127.0.0.1", os.environ.get("NO_PROXY") or os.environ.get("no_proxy")]))
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            guard.guarded(command, _GRACE),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=without_secrets(os.environ) | dict(environment),
            start_new_session=True,
        )
        try:
            _check_model(url, model, _wait(process, output, url, patience_s, tick))
            yield Served(url, {"NO_PROXY": direct, "no_proxy": direct}, lambda: _problem(process, output))
        finally:
            _end(process)


def _command(model: str, port: int, gpus: int) -> list[str]:
    given = setting()
    if not given:
        raise InputError(
            "LEWIS_EVALUATION_SERVER: not set; evaluate.backend openai asks a server: set it to "
            f"{settings.EVALUATION_SERVER.kind.expected}, such as http://127.0.0.1:8000/v1"
        )
    words = shlex.split(given)
    program = shutil.which(words[0])
    if program is None:
        raise InputError(
            f"LEWIS_EVALUATION_SERVER: there is no program {words[0]!r} on this machine; install it, or give its path"
        )
    for place, value in {"{model}": model, "{port}": str(port), "{gpus}": str(gpus)}.items():
        words = [word.replace(place, value) for word in words]
    return [os.path.abspath(program), *words[1:]]


def _wait(
    process: subprocess.Popen[bytes], output: IO[bytes], url: str, patience_s: float, tick: Callable[[], None]
) -> list[str]:
    """Wait until a server answers, and return the names of its models."""
    deadline = time.monotonic() + patience_s
    while True:
        with suppress(OSError, LewisError):  # it still loads
            return _models(url, direct=True)
        if process.poll() is not None:
            raise LewisError(f"the evaluation server does not start{_problem(process, output)}")
        if time.monotonic() > deadline:
            raise LewisError(
                f"the evaluation server did not answer within {patience_s:g} s{_tail(output)}\nraise "
                "evaluate.timeout_minutes, or look at the command in LEWIS_EVALUATION_SERVER"
            )
        tick()
        time.sleep(0.1)


def _models(url: str, *, direct: bool) -> list[str]:
    """The names of the models that a server has."""
    handlers = [urllib.request.ProxyHandler({})] if direct else []
    secret = key().get("OPENAI_API_KEY")
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {secret}"} if secret else {})
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=30) as answer:
            found: Any = json.loads(answer.read(1 << 20))
        return [str(each["id"]) for each in found["data"]]
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:  # HTTPException: its answer is no HTTP
        why = f"{type(error).__name__}: {error}"
        raise LewisError(f"LEWIS_EVALUATION_SERVER: {redacted(url)}/models does not list models: {why}") from error


def _check_model(url: str, model: str, names: list[str]) -> None:
    """Check that the server has this model: some servers answer with whatever model they have, for any name."""
    if model not in names:
        raise InputError(
            f"LEWIS_EVALUATION_SERVER: the server at {redacted(url)} has not the model {model}, but "
            f"{', '.join(names) or 'none'}; it must serve the model under the name of its folder"
        )


def _problem(process: subprocess.Popen[bytes], output: IO[bytes]) -> str:
    code = process.poll()
    return "" if code is None else f"\nthe evaluation server ended with exit code {code}{_tail(output)}"


def _tail(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    shown = os.pread(output.fileno(), _SHOWN, max(0, size - _SHOWN)).decode(errors="replace").strip()
    return f"\nThe end of its output:\n{redacted(shown) or '(none)'}"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)  # the guard kills what does not end in time
        with suppress(subprocess.TimeoutExpired):
            process.wait(2 * _GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
