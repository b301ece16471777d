"""Put the champion into service at one target."""

import logging

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from lewis.errors import InputError
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.recipe.recipe import Recipe
from lewis.registry import promotion
from lewis.registry.versions import Champion
from lewis.reports.markdown import code, markdown_table
from lewis.serving import hub, service
from lewis.serving.haproxy import WorseError
from lewis.serving.records import Served
from lewis.serving.server_gate import Answer, RefusedError
from lewis_tasks.support import flow_run, moves
from lewis_tasks.support.assets import artifact_key
from lewis_tasks.support.caching import RETRIES

logger = logging.getLogger(__name__)


# Not cached: the target's record says what it has.
@task(name="serve", task_run_name="serve {label}", cache_policy=NO_CACHE, timeout_seconds=24 * 3600, **RETRIES)
def serve(recipe: Recipe, label: str, champion: Champion, again: bool) -> tuple[Served, bool]:
    """As `service.serve`; `label` names one of the recipe's targets. Of a refusal, an artifact has all answers."""
    [target] = [each for each in hub.targets(recipe) if each.label == label]
    settings = EvalSettings.of(recipe.evaluate, recipe.root) if recipe.evaluate else None
    try:
        done = service.serve(target, champion, settings, again=again)
    except RefusedError as error:
        about = f"Answers of {label} that are not those of the model that was scored"
        text = f"# {champion.version.uri} is refused at {label}\n\n{markdown_table([*map(_row, error.differing)])}"
        create_markdown_artifact(text, key=artifact_key(recipe, "served"), description=about)
        raise
    except WorseError as error:
        _roll_back(champion, str(error))
        raise
    flow_run.name_task(f"serve {label} v{champion.version.version}")
    return done


def _roll_back(champion: Champion, why: str) -> None:
    """Put the champion before back, unless another one has become it meanwhile; that there is none is logged."""
    version = champion.version
    try:
        if promotion.is_champion(version.name, version.version):
            promotion.rollback(version.name, why)
            moves.tell()
    except InputError as error:
        logger.warning("%s stays the champion: %s", version.uri, error)


def _row(answer: Answer) -> dict[str, str]:
    by = "" if answer.difference is None else f"{answer.difference:.3g}"
    texts = {"prompt": answer.prompt, "scored": answer.scored, "served": answer.served}
    return {"task": answer.task, **{name: code(text) for name, text in texts.items()}, "nats per token": by}
