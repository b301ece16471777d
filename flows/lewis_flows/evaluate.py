"""The flow `evaluate`: score the models of a merge that runs elsewhere, in a work queue or work pool of its own.

It is given names and digests, and finds the models itself: parents on the Hub or in their folders, merged models in the
store, the champion in the registry. Its scores go into the store, where the merge finds them.
"""

import re
from typing import Any

from prefect import State, flow
from prefect.runtime import deployment, flow_run
from prefect.utilities.annotations import quote

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.evaluation.step import ScoresEntry
from lewis.merging.step import MergedModel, find_merged
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.reports.run_report import short
from lewis.steps.graph import CHAMPION, LOOK, MARK, evaluations, labels, resolved, short_refs
from lewis.steps.table import DOWNLOAD, EVALUATE
from lewis_flows import prefect_runs, recipes_folder, secret_blocks
from lewis_flows.evaluate_elsewhere import run_name
from lewis_flows.runners import choose
from lewis_flows.walk import Futures, Walk, finish, known, submit
from lewis_tasks.evaluate import check_tasks
from lewis_tasks.models import resolve_at
from lewis_tasks.register import find_champion, find_mark
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support import patience
from lewis_tasks.support.failures import says_why

_DIGEST = re.compile("[0-9a-f]{64}")


def _run_name() -> str:
    return run_name(flow_run.parameters["recipe"], flow_run.parameters.get("task"))


@flow(name=prefect_runs.EVALUATE, flow_run_name=_run_name, task_runner=choose.task_runner(), **run_tags.HOOKS)
@says_why
def evaluate_flow(
    recipe: str,
    models: dict[str, str],
    tasks: str,
    base: str | None = None,
    overrides: list[str] | None = None,
    look: int | None = None,
    task: str | None = None,
) -> list[str] | State[list[str]]:
    """Score models of a recipe for a merge that waits elsewhere; return the digests of the scores in the store.

    Args:
        recipe: the name of a recipe in the recipes folder.
        models: label -> key of the content, as the merge has pinned or made it.
        tasks: the digest of the evaluation tasks where the merge runs. Here it must be the same.
        base: key of the recipe's base, if it has one.
        overrides: as of the flow `merge`.
        look: how many documents of each task are scored; None: all.
        task: the one task of the recipe to score; None: all of its tasks.
    """
    choose.check()
    if deployment.id is not None:  # a worker started this process for this run alone
        patience.begin()
    path = recipes_folder.find(recipe, paths=False)
    secret_blocks.load_for_run(path.stem)
    run_tags.tag(recipe=path.stem, trigger="merge")
    plan = recipes_folder.load_for_deployment(path, overrides or [])
    if plan.evaluate is None:
        raise InputError(f"{recipe}: expected a recipe with an `evaluate` block, which this one has not here")
    checked = submit(check_tasks, quote(plan))
    finish(checked)
    names = evaluations(plan)
    unknown = [label for label in models if label not in names]
    if unknown or checked.result() != tasks:
        more = f": expected a recipe that scores {unknown[0]!r}, which this one does not here" if unknown else ""
        raise InputError(
            f"{recipe}: its evaluation is not the same on this worker as where the merge runs{more}; if it was edited "
            "meanwhile, run it again; else give both the same folder of recipes, the same version of lm-eval, and the "
            "same LEWIS_EVALUATION_SERVER"
        )
    walk, results = _models(plan, models, base)
    listed = list(dict.fromkeys(plan.evaluate.tasks))  # in the order of where the merge runs
    places = range(len(listed)) if task is None else [listed.index(task)]
    walk.go((walk.graph[names[label][place]] for label in models for place in places), {**results, LOOK: look})
    scores = walk.of(EVALUATE)
    finish(*scores)
    entries: list[ScoresEntry] = [each.result() for each in scores]
    return run_tags.ending("Scored", ", ".join(models), [entry.digest for entry in entries])


def _models(plan: Recipe, models: dict[str, str], base: str | None) -> tuple[Walk, dict[str, Any]]:
    """Bring the models to this machine, or raise LewisError; return a walk to score them, and node -> model files."""
    begun, of_base, names = Futures(), f"{DOWNLOAD.name} {plan.base_model}", short_refs(plan)
    pinned_base = None
    if plan.base_model and base:
        pinned_base = submit(resolve_at, quote(plan), plan.base_model, names[plan.base_model], base)
        begun[resolved(plan.base_model)] = pinned_base
    finish(pinned_base)
    walk = Walk(plan, begun)
    sources = {label: node for label, node in labels(plan).items() if label in models}
    wanted = [name for name in sources.values() if name in walk.graph and walk.graph[name].step is DOWNLOAD]
    for label, name in sources.items():
        if name in wanted and name != of_base:
            ref = name.removeprefix(f"{DOWNLOAD.name} ")
            about = ref, names[ref], models[label], known(pinned_base)
            walk.futures[resolved(ref)] = submit(resolve_at, quote(plan), *about)
    on_base = bool(pinned_base) and plan.output.kind == "lora"
    walk.go(walk.graph.towards(*wanted, *([of_base] if on_base else [])))
    if CHAMPION in sources.values() and plan.register_as:
        walk.futures[CHAMPION] = submit(find_champion, plan.register_as.model, True)
    if MARK in sources.values() and plan.register_as:
        walk.futures[MARK] = submit(find_mark, plan.register_as.model)
    finish(*walk.futures.values())
    results = dict[str, Any]()
    for label, name in sources.items():
        found = _found(name, models[label], walk.futures)
        if isinstance(found, MergedModel) and on_base:
            found = found.model_copy(update={"base": walk.futures[of_base].result().folder})
        if found is None or found.key != models[label]:
            key = short(models[label])
            if label in ("champion", "mark"):
                raise LewisError(f"{label}: expected {key}, but it is another one by now, or its files are gone")
            raise LewisError(
                f"{label}: this worker does not have the model {key}; the workers must share the disk of the store "
                f"({store.home()}), or LEWIS_STORE must be the same on all of them, and LEWIS_STORE_MERGED=1"
            )
        results[name] = found
    return walk, results


def _found(source: str, key: str, begun: Futures) -> ModelFiles | MergedModel | None:
    """Return the model that a node, or the task for champion or mark, has on this machine; None if it is not here."""
    if source in (CHAMPION, MARK):
        version = begun[source].result()
        return version.files("champion" if source == CHAMPION else "mark") if version else None
    if source in begun:
        files: ModelFiles = begun[source].result()
        return files
    return find_merged(key) if _DIGEST.fullmatch(key) else None  # so that a parameter cannot name any path
