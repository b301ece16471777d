"""Targets of the kind `haproxy`: two vLLM servers behind HAProxy, of which one has the champion; the next one is tried.

The new version is loaded into the server that has no traffic. Then it gets a share of the requests, step by step, by
the weights of HAProxy's runtime socket. A step lasts for some minutes, and until it has had enough requests to
be judged; then queries of Prometheus compare the new server with the old one in the same time. If a step fails, the old
one gets all traffic again. Both servers answer all the time, so that no request is refused.
"""

import logging
import re
import socket
import time
from collections.abc import Callable, Mapping

from lewis.errors import LewisError, TransientError
from lewis.recipe.serve import HaproxyTarget, Rule, VllmTarget
from lewis.serving import vllm
from lewis.serving.model import Model
from lewis.serving.records import Served
from lewis.serving.requests_to import send
from lewis.store.kinds import SERVED

logger = logging.getLogger(__name__)
_PAUSE = 5.0  # seconds between two looks at Prometheus
_SECONDS = 10.0  # for one command or query
sleep: Callable[[float], None] = time.sleep


class WorseError(LewisError):
    """The new version was worse than the old one at a step; all traffic is the old one's again."""


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
        WorseError: if it is worse than the old one.
        TransientError, LewisError: if HAProxy or Prometheus does not answer, or there are too few requests; then all
            traffic is the old one's, too.
    """
    new = idle(target, before)
    [old] = set(target.servers) - {new}
    steps = target.steps if before.alias not in ("", model.alias) else ()  # else there is no other to compare with
    try:
        for share in steps:
            weigh(target, {new: share, old: 100 - share})
            _bake(target, new, old, share)
    except BaseException:
        weigh(target, {old: 100, new: 0})
        raise
    weigh(target, {new: 100, old: 0})
    return model.alias


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


def weigh(target: HaproxyTarget, shares: Mapping[str, int]) -> None:
    """Set weights; those that get more first, so that there always is a server."""
    for name, share in sorted(shares.items(), key=lambda each: -each[1]):
        if said := command(target, f"set weight {target.backend}/{name} {share}").strip():
            raise LewisError(f"HAProxy does not set the weight of {target.backend}/{name}: {said[:200]}")
    logger.info("%s: %s", target.label, ", ".join(f"{name} {share} %" for name, share in shares.items()))


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


def _bake(target: HaproxyTarget, new: str, old: str, share: int) -> None:
    """Wait until a step has lasted, and had its requests; then judge it."""
    began, seen = time.monotonic(), 0.0
    while (lasted := time.monotonic() - began) < 60 * target.minutes or seen < target.requests:
        if lasted > 60 * max(target.minutes, target.patience_minutes):
            raise LewisError(
                f"at {share} %, the new version had {seen:.0f} requests in {lasted / 60:.0f} minutes, and "
                f"{target.requests} are needed to judge it; lower `requests`, or raise the share of the step"
            )
        sleep(_PAUSE)
        seen = query(target, target.count, new, time.monotonic() - began) or 0.0
        logger.info("%s: at %d %% for %.0f s; %.0f of %d requests", target.label, share, lasted, seen, target.requests)
    lasted = time.monotonic() - began
    numbers = [_judged(target, rule, new, old, lasted) for rule in target.rules]
    line = "; ".join(text for _, text in numbers)
    logger.info("%s: at %d %%: %s", target.label, share, line)
    if not all(passed for passed, _ in numbers):
        raise WorseError(f"canary at {share} %, {seen:.0f} requests in {lasted:.0f} s: {line}")


def _judged(target: HaproxyTarget, rule: Rule, new: str, old: str, lasted: float) -> tuple[bool, str]:
    ours, theirs = (query(target, rule.query, name, lasted) or 0.0 for name in (new, old))
    passed = ours <= rule.times * theirs + rule.plus
    return passed, f"{rule.name} {ours:.3g} vs {theirs:.3g}, {'pass' if passed else 'FAIL'}"


def query(target: HaproxyTarget, text: str, server: str, seconds: float) -> float | None:
    """The value of a query about a server in the last seconds; None if Prometheus has none.

    Raises:
        TransientError, LewisError: as `send`.
    """
    for name, given in {"server": server, "backend": target.backend, "window": f"{max(1, round(seconds))}s"}.items():
        text = text.replace(f"{{{name}}}", given)
    answer = send("POST", f"{target.prometheus.rstrip('/')}/api/v1/query", form={"query": text}, timeout_s=_SECONDS)
    try:
        found = answer.json()["data"]["result"]
        value = float(found[0]["value"][1]) if found else None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise LewisError(f"Prometheus: no number for {text!r}: {answer.text[:200]}") from error
    return value if value is not None and value == value else None  # NaN: there were no requests


def _server(target: HaproxyTarget, name: str) -> VllmTarget:
    return VllmTarget(
        kind="vllm",
        url=target.servers[name],
        name=target.name,
        alias=target.alias,
        timeout_seconds=target.timeout_seconds,
    )
