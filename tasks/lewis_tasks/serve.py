"""Put the champion into service at one target."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from lewis.recipe.recipe import Recipe
from lewis.registry.versions import Champion
from lewis.serving import service
from lewis.serving.records import Served
from lewis_tasks.support import flow_run
from lewis_tasks.support.caching import RETRIES


# Not cached: the target's record says what it has.
@task(name="serve", task_run_name="serve {label}", cache_policy=NO_CACHE, timeout_seconds=24 * 3600, **RETRIES)
def serve(recipe: Recipe, label: str, champion: Champion, again: bool) -> tuple[Served, bool]:
    """As `service.serve`; `label` names one of the recipe's targets."""
    [target] = [each for each in recipe.serve if each.label == label]
    done = service.serve(target, champion, again=again)
    flow_run.name_task(f"serve {label} v{champion.version.version}")
    return done
