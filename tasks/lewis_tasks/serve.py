"""Prefect task that puts the champion into service at one target."""

import logging
from datetime import UTC, datetime

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.recipe.recipe import Recipe
from lewis.recipe.serve import CanaryTarget
from lewis.registry import promotion, versions
from lewis.registry.versions import Champion, Version
from lewis.reports import canary as picture
from lewis.reports.markdown import code, markdown_table
from lewis.serving import hub, records, service
from lewis.serving.canary import WorseError
from lewis.serving.model import OutdatedError
from lewis.serving.records import Served
from lewis.serving.server_gate import Answer, RefusedError
from lewis.store import kinds
from lewis_tasks.support import flow_run, moves
from lewis_tasks.support.assets import artifact_key
from lewis_tasks.support.caching import RETRIES

logger = logging.getLogger(__name__)


# Not cached: the target's record says which version it has. No timeout: the recipe sets those of canary and program.
@task(name="serve", task_run_name="serve {label}", cache_policy=NO_CACHE, **RETRIES)
def serve(recipe: Recipe, label: str, champion: Champion, again: bool) -> tuple[Served, bool] | None:
    """Bring the target `label` of a recipe to the champion; result and errors are those of `service.serve`.

    The result is None if the version is not the champion any more: the target has what it had.

    Artifacts show the picture of a canary, or the answers that differ if the target's server is refused. If a canary
    finds the champion worse than the version before, the previous champion is put back.
    """
    [target] = [each for each in hub.targets(recipe) if each.label == label]
    settings = EvalSettings.of(recipe.evaluate, recipe.root) if recipe.evaluate else None
    began = datetime.now(UTC).isoformat(timespec="seconds")
    done = None
    try:
        done = service.serve(target, champion, settings, owner=service.owner_of(recipe), again=again)
    except RefusedError as error:
        about = f"Answers of {label} that are not those of the model that was scored"
        text = f"# {champion.version.uri} is refused at {label}\n\n{markdown_table([*map(_row, error.differing)])}"
        create_markdown_artifact(text, key=artifact_key(recipe, "served"), description=about)
        raise
    except WorseError as error:
        _roll_back(champion, str(error))
        raise
    except OutdatedError as error:
        logger.warning("%s", error)
    finally:
        if isinstance(target, CanaryTarget):
            _show(recipe, target, champion.version, began)
    flow_run.name_task(f"serve {label} v{champion.version.version}")
    return done


def _show(recipe: Recipe, target: CanaryTarget, version: Version, began: str) -> None:
    """Show the picture of a canary that ran since `began`, as an artifact and in the page of the version's run."""
    try:
        found = records.canary_of(version, target.label)
        if found is None or found.time < began:
            return
        text, key = picture.to_markdown(found, version.uri), artifact_key(recipe, f"canary-{target.label}")
        create_markdown_artifact(text, key=key, description=found.line()[:200])
        page = versions.attached(version, versions.PAGE)
        if page is not None:
            shown = picture.into_page(page, found)
            versions.attach(version, {versions.PAGE: shown})
            for path in kinds.REPORTS.entries():
                if path.read_text(encoding="utf-8", errors="replace") == page:  # update the store's copy, too
                    store.write_text(path, shown, modified=path.stat().st_mtime)  # the order of pages stays
    except (LewisError, OSError) as error:  # a missing picture must not fail the serving
        logger.warning("%s: its canary is not shown: %s", version.uri, error)


def _roll_back(champion: Champion, why: str) -> None:
    """Roll a version back, unless another was promoted meanwhile or there is none before it, which is logged."""
    version = champion.version
    try:
        promotion.rollback(version.name, why, expected=version.version)
        moves.report()
    except InputError as error:
        logger.warning("%s is not rolled back: %s", version.uri, error)


def _row(answer: Answer) -> dict[str, str]:
    by = "" if answer.difference is None else f"{answer.difference:.3g}"
    texts = {"prompt": answer.prompt, "scored": answer.scored, "served": answer.served}
    return {"task": answer.task, **{name: code(text) for name, text in texts.items()}, "nats per token": by}
