"""The flow `serve`: bring the targets of a recipe to the champion, one after the other."""

from dataclasses import asdict
from typing import Any

from prefect import State, flow
from prefect.runtime import flow_run
from prefect.utilities.annotations import quote
from pydantic import BaseModel

from lewis.errors import InputError
from lewis.serving import hub, service
from lewis_flows import prefect_runs, secret_blocks
from lewis_flows.merge import begin, load, run_name
from lewis_flows.turn import HOOKS, noted, turn
from lewis_flows.walk import submit
from lewis_tasks.serve import serve
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support.failures import result_of, says_why


class ServeReport(BaseModel):
    """The result of a run of the flow `serve`.

    Attributes:
        recipe: its name.
        version: the champion, `models:/<name>/<number>`; None if there is none.
        served: what each target has now, as `lewis.serving.records.Served`.
        changed: the targets that did not have the champion before.
        outdated: whether the version was not the champion any more before all targets had it.
    """

    recipe: str
    version: str | None = None
    served: list[dict[str, Any]] = []
    changed: list[str] = []
    outdated: bool = False


@flow(name=prefect_runs.SERVE, flow_run_name=run_name, **HOOKS)
@says_why
@noted
def serve_flow(recipe: str, again: bool = False) -> ServeReport | State[ServeReport]:
    """Put the champion into service at each target of a recipe, in their order; the first that fails ends the run.

    The targets are the Hub's branch `champion`, if the recipe publishes, and those of the block `serve`.

    The run ends as `Served`; as `Cached` if all targets have the champion; as `Completed` if there is no champion; as
    `Outdated` if the champion moved meanwhile: the target in turn and those after it keep what they have, and a canary
    gives the old server all traffic again. The move has started another run, which waits for the end of this one.

    Args:
        recipe: the name of a recipe in the recipes folder. From the command line, a YAML file's path too.
        again: put it into service even if a target has it already.
    """
    path = begin(recipe)
    secret_blocks.load_for_serving()
    trigger = run_tags.trigger(run_tags.this_run())
    run_tags.tag(recipe=path.stem, trigger="promotion" if trigger == "release" else trigger)
    with turn(path.with_suffix(".serve"), str(flow_run.id)):
        plan = load(path, [])
        targets = hub.targets(plan)
        if not targets:
            raise InputError(
                f"{path.stem}: its recipe has no block `serve` or `publish`; add one that says where to serve"
            )
        champion = service.champion_of(plan)
        if champion is None:
            report, name, line = ServeReport(recipe=path.stem), "Completed", "there is no champion to serve yet"
        else:
            report = ServeReport(recipe=path.stem, version=champion.version.uri)
            for each in targets:
                done = result_of(submit(serve, quote(plan), each.label, quote(champion), again))
                if done is None:
                    report.outdated = True
                    break
                report.served.append(asdict(done[0]))
                report.changed += [each.label] if done[1] else []
            service.tidy(champion.version.name, targets, service.owner_of(plan))
            name = "Outdated" if report.outdated else "Served" if report.changed else "Cached"
            line = f"{report.version} is in service: {', '.join(each['target'] for each in report.served)}"
            if report.outdated:
                line = f"{report.version} is not the champion any more; the next run serves the new one"
    return run_tags.ending(name, line, report)
