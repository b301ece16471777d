"""The branch `champion` of the Hub repo that a recipe publishes to: `org/name@champion` is the version in use.

It is a target of `serve` like others, and comes first. With `publish`, each move of the champion, also back to an
earlier version, is a commit of that version's files on the branch. The branch is never deleted, so that the name can
always be loaded, and weights that the repo has are not uploaded again.
"""

from typing import Literal

from lewis.recipe.recipe import Recipe
from lewis.recipe.schema import Publish
from lewis.recipe.serve import Target
from lewis.registry import publishing, tracking
from lewis.reports import card
from lewis.serving import local
from lewis.serving.model import Model
from lewis.serving.records import Served

BRANCH = "champion"


class HubTarget(Target):
    """The branch `champion`, where the recipe publishes.

    Attributes:
        publish: the recipe's block.
    """

    kind: Literal["hub"] = "hub"
    publish: Publish


def targets(recipe: Recipe) -> list[Target]:
    """All targets of a recipe, in order: the Hub's branch, the block `serve`, this machine under `lewis up --serve`."""
    here = local.targets(recipe.register_as.model) if recipe.register_as else []
    return [*([HubTarget(publish=recipe.publish)] if recipe.publish else []), *recipe.serve, *here]


def has(recipe: Recipe, record: Served) -> bool:
    """Whether a recipe still has the target of a record; that of another recipe of its `register.group` counts too."""
    return record.recipe not in ("", recipe.name) or record.target in {each.label for each in targets(recipe)}


def put(target: HubTarget, model: Model, before: Served) -> str:
    """Commit the model's files to the branch; return the name of the branch with the commit.

    Raises:
        InputError, TransientError, LewisError: as `publishing.publish`.
    """
    title = f"{model.name} version {model.version}, merge {model.digest[:8]}"
    block = target.publish
    made = publishing.publish(model.folder, block.repo, block.private, title, BRANCH, _card(model))
    return f"{made.repo}@{BRANCH} ({made.commit[:8]})"


def _card(model: Model) -> dict[str, bytes]:
    """The version's model card and, if it has one, its picture of the densities, which MLflow keeps; by file name."""
    with tracking.client(f"reading the card of {model.uri}") as client:
        run = client.get_model_version(model.name, model.version).run_id or ""
        kept = {each.path for each in client.list_artifacts(run)}
        names = {card.NAME: "card.md", **({card.HEAT_MAP: card.HEAT_MAP} if card.HEAT_MAP in kept else {})}
        return {name: tracking.file_of(client, run, artifact) for name, artifact in names.items()}
