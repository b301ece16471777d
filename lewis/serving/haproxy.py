"""Targets of the kind `haproxy`: two vLLM servers behind HAProxy, of which one has the champion; the next one is tried.

The new version is loaded into the server that has no traffic. Then it gets the requests by a canary, with the weights
of HAProxy's runtime socket. Both servers answer all the time, so that no request is refused.
"""

import re
import socket

from lewis.errors import LewisError, TransientError
from lewis.recipe.serve import HaproxyTarget, VllmTarget
from lewis.serving import canary, vllm
from lewis.serving.model import Model
from lewis.serving.records import Served
from lewis.store.kinds import SERVED

_SECONDS = 10.0  # for one command


def offer(target: HaproxyTarget, model: Model, before: Served) -> None:
    """Load the model into the server without traffic, also under the name that clients ask for.

    Raises:
        InputError, TransientError, LewisError: as `vllm.offer`, or if HAProxy does not know the servers.
    """
    server = _server(target, idle(target, before))
    vllm.offer(server, model)
    vllm.put(server, model, before)


def api(target: HaproxyTarget, model: Model, before: Served) -> tuple[str, str]:
    """Where the model answers once it is offered, and under which name."""
    return vllm.api(_server(target, idle(target, before)), model)


def put(target: HaproxyTarget, model: Model, before: Served) -> str:
    """Move the traffic to the server that has the model.

    Raises:
        WorseError, TransientError, LewisError: as `canary.run`.
    """
    new = idle(target, before)
    [old] = set(target.servers) - {new}
    return canary.run(target, model, before, new, old, lambda name, share: give(target, name, share))


def holds(target: HaproxyTarget, record: Served) -> bool:
    """Whether the server that has all traffic has the version."""
    shares, folder = weights(target), str(SERVED.path(record.alias))
    name = target.alias or record.name
    return any(share and vllm.models(_server(target, at)).get(name) == folder for at, share in shares.items())


def idle(target: HaproxyTarget, before: Served) -> str:
    """The server that may be given a new version: not the one with the version before, or else with the traffic."""
    name, folder = target.alias or before.name, str(SERVED.path(before.alias)) if before.alias else ""
    shares = weights(target)
    having = [at for at in shares if folder and vllm.models(_server(target, at)).get(name) == folder]
    busy = max(having or shares, key=lambda at: shares[at])
    return next(at for at in target.servers if at != busy)


def weights(target: HaproxyTarget) -> dict[str, int]:
    """Server -> its weight."""
    found = {}
    for name in target.servers:
        said = command(target, f"get weight {target.backend}/{name}")
        match = re.match(r"(\d+) \(initial", said)
        if not match:
            raise LewisError(f"HAProxy does not know the server {target.backend}/{name}: {said.strip()[:200]}")
        found[name] = int(match[1])
    return found


def give(target: HaproxyTarget, name: str, share: int) -> None:
    """Set the weight of a server."""
    if said := command(target, f"set weight {target.backend}/{name} {share}").strip():
        raise LewisError(f"HAProxy does not set the weight of {target.backend}/{name}: {said[:200]}")


def command(target: HaproxyTarget, text: str) -> str:
    """What HAProxy's runtime socket answers to a command.

    Raises:
        TransientError: if it does not answer.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SECONDS)
            connection.connect(target.socket)
            connection.sendall(f"{text}\n".encode())
            return b"".join(iter(lambda: connection.recv(4096), b"")).decode(errors="replace")
    except OSError as error:
        raise TransientError(f"HAProxy does not answer at {target.socket}: {error.strerror or error}") from error


def _server(target: HaproxyTarget, name: str) -> VllmTarget:
    return VllmTarget(
        kind="vllm",
        url=target.servers[name],
        name=target.name,
        alias=target.alias,
        timeout_seconds=target.timeout_seconds,
    )
