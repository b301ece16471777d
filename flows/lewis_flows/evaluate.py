"""Score the models of a merge that goes on elsewhere: a run of this flow waits in a queue or pool of its own.

It is given names and digests, and finds the models itself: parents on the Hub or in their folders, merged models in the
store, the champion in the registry. Its scores go into the store, where the merge takes them.
"""

import re
from typing import Any

from prefect import State, flow
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.utilities.annotations import quote

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.evaluation.step import ScoresEntry
from lewis.merging.step import MergedModel, find_merged
from lewis.models.source import ModelFiles
from lewis.recipe.recipe import Recipe
from lewis.reports.run_report import short
from lewis.steps.graph import CHAMPION, Graph, graph, labels, resolved
from lewis.steps.table import DOWNLOAD, EVALUATE
from lewis_flows import prefect_runs, recipes_folder, secret_blocks
from lewis_flows.runners import choose
from lewis_flows.walk import Futures, finish, known, submit, walk
from lewis_tasks.evaluate import check_tasks
from lewis_tasks.register import find_champion
from lewis_tasks.resolve import resolve_at
from lewis_tasks.support import flow_run as run_tags
from lewis_tasks.support.assets import artifact_prefix
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
    checked = submit(check_tasks, quote(plan))
    finish(checked)
    if checked.result() != tasks:
        raise InputError(
            f"{recipe}: its evaluation is not the same on this worker as where the merge runs; give both the same "
            "folder of recipes, the same version of lm-eval, and the same LEWIS_EVALUATION_SERVER"
        )
    scoring, begun, results = _models(plan, models, base)
    futures = walk(scoring, begun, artifact_prefix(plan), results)
    scores = [futures[node.name] for node in scoring.of(EVALUATE) if node.name in futures]
    finish(*scores)
    entries: list[ScoresEntry] = [each.result() for each in scores]
    run_tags.tag(verdict="scored")
    return Completed(name="Scored", message=", ".join(models), data=[entry.digest for entry in entries])


def _models(plan: Recipe, models: dict[str, str], base: str | None) -> tuple[Graph, Futures, dict[str, Any]]:
    """The nodes that score the models, and what they begin with: every model is on this machine, or pinned.

    Raises:
        LewisError: naming a model that this machine has not.
    """
    sources, begun, results = labels(plan), Futures(), dict[str, Any]()
    pinned_base = submit(resolve_at, quote(plan), plan.base_model, base) if plan.base_model and base else None
    finish(pinned_base)
    if pinned_base:
        begun[resolved(str(plan.base_model))] = pinned_base
    for label, key in models.items():
        source = sources[label]
        if source.startswith("download ") and source != f"download {plan.base_model}":
            ref = source.removeprefix("download ")
            begun[resolved(ref)] = submit(resolve_at, quote(plan), ref, key, known(pinned_base))
    walked = graph(plan)
    on_base = pinned_base and plan.output.kind == "lora"
    downloads = [sources[label] for label in models if sources[label] in walked and label != plan.label]
    downloads = [name for name in downloads if walked[name].step is DOWNLOAD]
    first = walked.towards(*downloads, *([f"download {plan.base_model}"] if on_base else []))
    begun = walk(first, begun, artifact_prefix(plan))
    if "champion" in models and plan.register_as:
        begun[CHAMPION] = submit(find_champion, plan.register_as.model, True)
    finish(*begun.values())
    for label, key in models.items():
        found = _found(sources[label], key, begun)
        if isinstance(found, MergedModel) and on_base:
            found = found.model_copy(update={"base": begun[f"download {plan.base_model}"].result().folder})
        if found is None or found.key != key:
            raise _missing(label, key)
        results[sources[label]] = found
    return Graph(walked[f"evaluate {label}"] for label in models), begun, results


def _found(source: str, key: str, begun: Futures) -> ModelFiles | MergedModel | None:
    """The model that a node, or the search for the champion, gives on this machine; None if it is not here."""
    if source == CHAMPION:
        champion = begun[source].result()
        return champion.files("champion") if champion else None
    if source in begun:
        files: ModelFiles = begun[source].result()
        return files
    return find_merged(key) if _DIGEST.fullmatch(key) else None  # no path of another's choice


def _missing(label: str, key: str) -> LewisError:
    if label == "champion":
        return LewisError(f"champion: expected {short(key)}, but it is another one by now, or its files are gone")
    return LewisError(
        f"{label}: this worker does not have the model {short(key)}; the workers must share the disk of the store "
        f"({store.home()}), or LEWIS_STORE must be the same on all of them, and LEWIS_STORE_MERGED=1"
    )
