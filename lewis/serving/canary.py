"""A canary: the new version gets a share of the requests, step by step, and each step compares it with the old version.

A step lasts for some minutes, and until the new version has had enough requests to be judged. Then queries of
Prometheus compare the new server with the old one in the same time. If a step fails, the old one gets all traffic
again; also if another version becomes the champion meanwhile. How a share is set is up to the kind of the target.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from lewis.errors import LewisError, TransientError
from lewis.recipe.serve import CanaryTarget, Rule
from lewis.reports.canary import Measured, Step
from lewis.serving.model import Model
from lewis.serving.records import Served
from lewis.serving.requests_to import json_of, send

logger = logging.getLogger(__name__)
_PAUSE = 5.0  # seconds between two looks at Prometheus
_SECONDS = 10.0  # for one query
sleep: Callable[[float], None] = time.sleep


class WorseError(LewisError):
    """The new version was worse than the old one at a step; all traffic is the old one's again."""


def run(
    target: CanaryTarget,
    model: Model,
    before: Served,
    new: str,
    old: str,
    give: Callable[[str, int], None],
    has: Callable[[], bool],
) -> str:
    """Move the traffic to a version that a server has loaded; return the name that it is served under.

    Args:
        target: which steps there are, how long each lasts, and the rules.
        model: the version, whose `steps` are filled in; if it is `at_once`, all traffic moves without steps.
        before: what the target has; without a version, or with this one, all traffic moves without steps.
        new: name of the server that has the version, as the queries name it.
        old: name of the server that has the traffic.
        give: called with a server's name and its new share of the requests in percent.
        has: returns whether the new server still runs with the version. Prometheus alone does not show that: it has no
            numbers of a server that has ended, and those would count as 0.

    Raises:
        WorseError: if the new version is worse than the old one. Then the old one gets all traffic again.
        OutdatedError: if the new version is not the champion any more. Then the old one gets all traffic again, too.
        TransientError, LewisError: if the router, the new server or Prometheus does not answer, or there are too few
            requests. Then the old one gets all traffic again, too.
    """
    steps = target.steps if before.alias not in ("", model.alias) and not model.at_once else ()
    try:
        for share in steps:
            _shift(target, {new: share, old: 100 - share}, give)
            model.steps.append(_bake(target, model, new, old, share, has))
            _judge(model.steps[-1])
            model.check_champion()
    except BaseException:
        _shift(target, {old: 100, new: 0}, give)
        raise
    _shift(target, {new: 100, old: 0}, give)
    return model.alias


def _shift(target: CanaryTarget, shares: Mapping[str, int], give: Callable[[str, int], None]) -> None:
    """Set the shares of traffic, the largest first, so that some server always has traffic."""
    for name, share in sorted(shares.items(), key=lambda each: -each[1]):
        give(name, share)
    logger.info("%s: %s", target.label, ", ".join(f"{name} {share} %" for name, share in shares.items()))


def _bake(target: CanaryTarget, model: Model, new: str, old: str, share: int, has: Callable[[], bool]) -> Step:
    """Wait until a step has lasted long enough and has had enough requests; then apply the rules."""
    began, seen = time.monotonic(), 0.0
    while (lasted := time.monotonic() - began) < 60 * target.minutes or seen < target.requests:
        if lasted > 60 * max(target.minutes, target.patience_minutes):
            model.steps.append(Step(share, seen, lasted))
            raise LewisError(
                f"at {share} %, the new version had {seen:.0f} requests in {lasted / 60:.0f} minutes, and "
                f"{target.requests} are needed to judge it; lower `requests`, or raise the share of the step"
            )
        sleep(_PAUSE)
        if not has():
            raise TransientError(f"{new} was given {share} % and has lost the new version; see that it stays up")
        with suppress(TransientError):  # MLflow may restart in the hours of a step
            model.check_champion()
        seen = query(target, target.count, new, time.monotonic() - began) or 0.0
        logger.info("%s: at %d %% for %.0f s; %.0f of %d requests", target.label, share, lasted, seen, target.requests)
    lasted = time.monotonic() - began
    return Step(share, seen, lasted, tuple(_measured(target, rule, new, old, lasted) for rule in target.rules))


def _measured(target: CanaryTarget, rule: Rule, new: str, old: str, lasted: float) -> Measured:
    found = [query(target, rule.query, name, lasted) for name in (new, old)]
    if found == [None, None]:
        logger.warning(
            "%s: Prometheus has no number of either version for %r; both count as 0", target.label, rule.name
        )
    ours, theirs = (value or 0.0 for value in found)
    return Measured(rule.name, ours, theirs, rule.times * theirs + rule.plus)


def _judge(step: Step) -> None:
    line = "; ".join(each.line() for each in step.rules)
    logger.info("at %d %%: %s", step.share, line)
    if not step.passed:
        raise WorseError(f"canary at {step.share} %, {step.requests:.0f} requests in {step.seconds:.0f} s: {line}")


def query(target: CanaryTarget, text: str, server: str, seconds: float) -> float | None:
    """Return the value of a Prometheus query about a server over the last `seconds`; None if there is none.

    Raises:
        TransientError, LewisError: as `send`, or if the query gives more than one number.
    """
    places = {"server": server, "window": f"{max(1, round(seconds))}s", **target.places}
    for name, given in places.items():
        text = text.replace(f"{{{name}}}", given)
    answer = send("POST", f"{target.prometheus.rstrip('/')}/api/v1/query", form={"query": text}, timeout_s=_SECONDS)
    try:
        found = json_of(answer)["data"]["result"]
        value = float(found[0]["value"][1]) if found else None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise LewisError(f"Prometheus: no number for {text!r}: {answer.text[:200]}") from error
    if len(found) > 1:
        raise LewisError(f"Prometheus: expected one number for {text!r}, got {len(found)}; put `sum(...)` around it")
    return value if value is not None and value == value else None  # NaN: there were no requests
