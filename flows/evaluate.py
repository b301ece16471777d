"""Score the models of a merge that goes on elsewhere: a run of this flow waits in a queue or pool of its own.

It is given names and digests, and finds the models itself: parents on the Hub or in their folders, merged models in the
store, the champion in the registry. Its scores go into the store, where the merge takes them.
"""

import re
from typing import Any

from prefect import State, flow
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.utilities.annotations import quote

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.evaluation.step import ScoresEntry, eval_settings
from lewis.merging.step import find_merged
from lewis.models.source import ModelFiles, Source, short_names
from lewis.recipe.recipe import Recipe
from lewis.reports.run_report import short
from lewis_flows import prefect_runs, recipes_folder, secret_blocks
from lewis_flows.runners import choose
from lewis_flows.submit import finish, known, submit
from lewis_tasks.download import download
from lewis_tasks.evaluate import check_tasks, evaluate
from lewis_tasks.register import find_champion
from lewis_tasks.resolve import resolve_at
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support.failures import says_why

_DIGEST = re.compile("[0-9a-f]{64}")


def _run_name() -> str:
    return f"evaluate {flow_run.parameters['recipe']}"


@flow(name=prefect_runs.EVALUATE, flow_run_name=_run_name, task_runner=choose.task_runner(), **run_tags.HOOKS)
@says_why
def evaluate_flow(
    recipe: str, models: dict[str, str], tasks: str, base: str | None = None, overrides: list[str] | None = None
) -> list[str] | State[list[str]]:
    """Score models of a recipe; gives the digests of their scores in the store.

    Args:
        recipe: the name of a recipe in the recipes folder.
        models: label -> key of the content, as the merge has pinned or made it.
        tasks: the digest of the evaluation tasks where the merge runs. Here it must be the same.
        base: key of the recipe's base, if it has one.
        overrides: as of the flow `merge`.
    """
    choose.check()
    path = recipes_folder.find(recipe, paths=False)
    secret_blocks.load_for_run(path.stem)
    run_tags.tag(recipe=path.stem, trigger="merge")
    plan = recipes_folder.load_for_deployment(path, overrides or [])
    if plan.evaluate is None:
        raise InputError(f"{recipe}: expected a recipe with an `evaluate` block, which this one has not here")
    settings = eval_settings(plan)
    checked = submit(check_tasks, quote(plan), settings, plan.root)
    finish(checked)
    if checked.result() != tasks:
        raise InputError(
            f"{recipe}: its evaluation is not the same on this worker as where the merge runs; give both the same "
            "folder of recipes, the same version of lm-eval, and the same LEWIS_EVALUATION_SERVER"
        )
    files = _files(plan, models, base)
    scores = [submit(evaluate, quote(files[label]), label, settings, plan.root, tasks) for label in models]
    finish(*scores)
    entries: list[ScoresEntry] = [each.result() for each in scores]
    run_tags.tag(verdict="scored")
    return Completed(name="Scored", message=", ".join(models), data=[entry.digest for entry in entries])


def _files(plan: Recipe, models: dict[str, str], base: str | None) -> dict[str, ModelFiles]:
    """Label -> the model on this machine."""
    refs = references(plan)
    pinned_base = submit(resolve_at, quote(plan), plan.base_model, base) if plan.base_model and base else None
    finish(pinned_base)
    on = submit(download, known(pinned_base)) if pinned_base and plan.output.kind == "lora" else None
    pinned = dict[str, PrefectFuture[Source]]()
    for label, key in models.items():
        if label == "base" and pinned_base:
            pinned[label] = pinned_base
        elif ref := refs.get(label):
            pinned[label] = submit(resolve_at, quote(plan), ref, key, known(pinned_base))
    finish(*pinned.values())
    fetched: dict[str, PrefectFuture[Any]] = {
        label: submit(download, known(source)) for label, source in pinned.items()
    }
    if "champion" in models and plan.register_as:
        fetched["champion"] = submit(find_champion, plan.register_as.model, True)
    finish(on, *fetched.values())
    found = {label: future.result() for label, future in fetched.items()}
    if "champion" in found:
        found["champion"] = found["champion"] and found["champion"].files("champion")
    for label in models.keys() - found.keys():
        merged = find_merged(models[label]) if _DIGEST.fullmatch(models[label]) else None  # no path of another's choice
        if merged and on:
            merged = merged.model_copy(update={"base": on.result().folder})
        found[label] = merged and merged.files(label)
    for label, key in models.items():
        if found[label] and found[label].key == key:
            continue
        if label == "champion":
            raise LewisError(f"champion: expected {short(key)}, but it is another one by now, or its files are gone")
        raise LewisError(
            f"{label}: this worker does not have the model {short(key)}; the workers must share the disk of the store "
            f"({store.home()}), or LEWIS_STORE must be the same on all of them, and LEWIS_STORE_MERGED=1"
        )
    return found


def references(plan: Recipe) -> dict[str, str]:
    """Label -> reference of the parents of a recipe, as its tables name them."""
    labels = short_names([entry.model for entry in plan.experts], plan.root)
    experts = dict(zip(labels, (entry.model for entry in plan.experts), strict=True))
    return {**({"base": plan.base_model} if plan.base_model else {}), **experts}
