"""Approval on a run's own page: a run whose version passed the gate, and needs a person's approval, waits suspended.

It occupies no worker while it waits. Prefect's page shows the verdict and a form; the answer lets the run go on, which
then moves the champion, or refuses the version. Whether that still may be done is checked then, as for `lewis approve`.
"""

import logging
from typing import Any
from uuid import UUID

from prefect import State
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import NotPausedError, Pause
from prefect.flow_runs import resume_flow_run, suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field

from lewis.errors import LewisError, TransientError
from lewis.registry import releases
from lewis.registry.releases import Held
from lewis_flows import prefect_runs
from lewis_flows.walk import submit
from lewis_tasks.register import settle_answer
from lewis_tasks.support import events
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support.failures import result_of

logger = logging.getLogger(__name__)
APPROVED = "Approved"  # the state of a run whose version a person has approved


class Approval(RunInput):
    """The form in which a person approves or refuses a version."""

    approve: bool = Field(True, description="Whether the version becomes the champion; if not, it is refused for good.")
    why: str = Field("", description="The reason, for the history.")


def asked(run: FlowRun) -> str:
    """Return the version, `models:/<name>/<number>`, that a run asked about when it was suspended; empty for none."""
    return next(iter(run_tags.tagged(run, "awaits")), "")


def answered(run: FlowRun) -> str:
    """Return the version that a run asked about, if it was resumed with an answer; empty after a *Retry*."""
    return asked(run) if run.empirical_policy.pause_keys else ""  # which the server empties when a run begins again


def is_open(deployment: UUID, version: str) -> bool:
    """Whether a run of a deployment waits for an answer about a version, `models:/<name>/<number>`."""
    with get_client(sync_client=True) as client:
        return any(asked(run) == version for run in _suspended(client, deployment))


def ask(run: FlowRun, version: str, verdict: str = "") -> State[Any]:
    """Suspend the run until a person has answered, and do what the answer says. In a resumed run, return immediately.

    Args:
        version: `models:/<name>/<number>`, which waits for approval.
        verdict: for the person, Markdown.

    Returns:
        The state `Approved` or `Refused`.

    Raises:
        InputError: if the version can no longer be approved or refused.
    """
    if not answered(run):
        assert run.deployment_id is not None  # no other run is suspended
        with get_client(sync_client=True) as client:  # the questions of others were replaced by this run's
            lapse(client, run.deployment_id, f"nobody answered; a later run asks about {version}")
        run_tags.tag(verdict="awaitingapproval", awaits=version)
    text = f"**{version}** passed its gate and waits for a person.\n\n{verdict}"
    name, number = version.removeprefix("models:/").rsplit("/", 1)
    form = Approval.with_initial_data(description=text)
    try:
        answer = suspend_flow_run(wait_for_input=form, key=f"approval-{number}")
    except Pause:
        _end_heartbeats(run)
        raise
    why = answer.why or "on the run's page"
    result_of(submit(settle_answer, name, number, answer.approve, why))
    state, line = (APPROVED, "is the champion") if answer.approve else ("Refused", "is refused")
    return run_tags.ending(state, f"{version} {line}: {why}", None)


def _end_heartbeats(run: FlowRun) -> None:
    """Send an event of the run, so that no heartbeat is its last one: else `lewis-dead-runs` would end it as Crashed.

    Its heartbeats go on until its process ends, so one may come after its state has changed to Suspended.
    """
    try:
        events.post("prefect.flow-run.asks", {"id": f"prefect.flow-run.{run.id}", "name": run.name}, {}, tags=run.tags)
    except LewisError as error:
        logger.info("the run's last heartbeat is not followed by an event: %s", error)


def go_on(run: FlowRun) -> None:
    """Start another run with the parameters of one whose version was approved; it begins when that one has ended."""
    assert run.deployment_id is not None
    with get_client(sync_client=True) as client:
        client.create_flow_run_from_deployment(
            run.deployment_id, parameters=run.parameters, tags=[run_tags.ANSWERED], idempotency_key=f"after-{run.id}"
        )


def settle(version: str = "", why: str = "") -> None:
    """Resume or end the suspended runs that need no answer any more.

    If the version that a run asks about is the champion by now, or was refused, the run is resumed with that answer. If
    it can no longer be approved, since its time is up or another champion was made, the run ends as `Lapsed`.

    Args:
        version: `models:/<name>/<number>`, which a person has just made the champion, or refused; empty for none.
        why: the reason that was given for it.

    Raises:
        TransientError: MLflow does not answer.
        httpx.HTTPError: Prefect's server does not answer, or refuses.
    """
    models = dict[str, list[Held]]()
    with get_client(sync_client=True) as client:
        for run in prefect_runs.of_flows(client, (prefect_runs.MERGE,), ("PAUSED",)):
            if not (about := asked(run)):
                continue
            name, _, number = about.removeprefix("models:/").rpartition("/")
            try:
                if name not in models:
                    models[name] = releases.merged(name)
            except TransientError:
                raise
            except LewisError as error:  # what is wrong with one model does not stop the others
                logger.info("%s waits on: %s", run.name, error)
                continue
            held = next((each for each in models[name] if each.version == number), None)
            is_champion = held is not None and "champion" in held.aliases
            if held and held in releases.approvable(models[name]):
                continue
            if held and (is_champion or held.verdict == "failed"):
                reason = why if about == version else f"decided elsewhere; see `lewis history {name}`"
                try:
                    resume_flow_run(run.id, run_input={"approve": is_champion, "why": reason})
                except NotPausedError:  # somebody answered just now
                    continue
                except RuntimeError:  # its process died after it was suspended, before it had saved the form
                    _lapse(client, run, f"{about} is {'the champion' if is_champion else 'refused'}: {reason}")
            else:
                _lapse(client, run, f"{about} can no longer be approved; see `lewis history {name}`")


def lapse(client: SyncPrefectClient, deployment: UUID, why: str) -> None:
    """End the suspended runs of a deployment, whose question is outdated, or is to be answered elsewhere."""
    for run in _suspended(client, deployment):
        _lapse(client, run, why)


def _suspended(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    return prefect_runs.of_flows(client, (prefect_runs.MERGE,), ("PAUSED",), deployment_id={"any_": [deployment]})


def _lapse(client: SyncPrefectClient, run: FlowRun, why: str) -> None:
    prefect_runs.end(client, run, Completed(name="Lapsed", message=why), "lapsed")
