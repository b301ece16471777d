"""Targets of the kind `haproxy`: two vLLM servers behind HAProxy, one with the champion, one to try the next version.

The new version is loaded into the server that has no traffic. Then a canary moves the requests to it, by weights that
are set by HAProxy's runtime socket. Both servers answer all the time, so that no request is refused.
"""

import re
import time

from lewis.errors import LewisError, TransientError
from lewis.recipe.serve import HaproxyTarget, VllmTarget
from lewis.serving import canary, haproxy_socket, vllm
from lewis.serving.model import Model
from lewis.serving.records import Served
from lewis.store.kinds import SERVED

_UP_IN = 60.0  # seconds that HAProxy's health check of a server may take to pass
_RUNNING = "2"  # srv_op_state in HAProxy's table of servers: up, or without a health check


def offer(target: HaproxyTarget, model: Model, before: Served) -> None:
    """Load the model into the server without traffic, also under the name that clients ask for.

    Raises:
        InputError, TransientError, LewisError: as `vllm.offer`, or if HAProxy does not know the servers.
    """
    server = _server(target, idle(target, before))
    vllm.offer(server, model)
    vllm.put(server, model, before)


def api(target: HaproxyTarget, model: Model, before: Served) -> tuple[str, str]:
    """Return the URL of the API at which the offered model answers, and its name there."""
    return vllm.api(_server(target, idle(target, before)), model)


def put(target: HaproxyTarget, model: Model, before: Served) -> str:
    """Move the traffic to the server that has the new model, by a canary; return the model's alias.

    Raises:
        WorseError, TransientError, LewisError: as `canary.run`, or if HAProxy does not see the new server.
    """
    new = idle(target, before)
    [old] = set(target.servers) - {new}
    _wait_until_up(target, new)

    def has() -> bool:
        return vllm.models(_server(target, new)).get(target.alias or model.name) == str(model.folder)

    return canary.run(target, model, before, new, old, lambda name, share: give(target, name, share), has)


def holds(target: HaproxyTarget, record: Served) -> bool:
    """Whether each server that gets traffic has the version of a record."""
    shares, folder = weights(target), str(SERVED.path(record.alias))
    name, busy = target.alias or record.name, [at for at, share in shares.items() if share]
    return bool(busy) and all(vllm.models(_server(target, at)).get(name) == folder for at in busy)


def idle(target: HaproxyTarget, before: Served) -> str:
    """Return the server for a new version: the one without the version in service, or else with less traffic."""
    name, folder = target.alias or before.name, str(SERVED.path(before.alias)) if before.alias else ""
    shares = weights(target)
    having = [at for at in shares if folder and vllm.models(_server(target, at)).get(name) == folder]
    busy = max(having or shares, key=lambda at: shares[at])
    return next(at for at in target.servers if at != busy)


def weights(target: HaproxyTarget) -> dict[str, int]:
    """Return the weights of both servers in HAProxy: name -> weight."""
    found = {}
    for name in target.servers:
        said = command(target, f"get weight {target.backend}/{name}")
        match = re.match(r"(\d+) \(initial", said)
        if not match:
            raise LewisError(f"HAProxy does not know the server {target.backend}/{name}: {said.strip()[:200]}")
        found[name] = int(match[1])
    return found


def _wait_until_up(target: HaproxyTarget, name: str) -> None:
    """Wait until HAProxy's own health check of a server, if it has one, passes: HAProxy gives requests to no other.

    Raises:
        TransientError: if it does not pass within a minute.
    """
    end = time.monotonic() + _UP_IN
    while True:
        lines = [line.split() for line in command(target, f"show servers state {target.backend}").splitlines()]
        if any(line[3:4] == [name] and line[5:6] == [_RUNNING] for line in lines):
            return
        if time.monotonic() > end:
            raise TransientError(f"HAProxy's health check of {target.backend}/{name} fails, which has the new version")
        canary.sleep(0.5)


def give(target: HaproxyTarget, name: str, share: int) -> None:
    """Set the weight of a server in HAProxy to its share of the traffic, in percent."""
    if said := command(target, f"set weight {target.backend}/{name} {share}").strip():
        raise LewisError(f"HAProxy does not set the weight of {target.backend}/{name}: {said[:200]}")


def command(target: HaproxyTarget, text: str) -> str:
    """Send a command to HAProxy's runtime socket, and return the answer.

    Raises:
        TransientError: if HAProxy does not answer.
    """
    try:
        return haproxy_socket.ask(target.socket, text)
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
