"""Create a version of a registered model: once per digest of a merge, and complete or not at all.

The version itself is created last, so whatever is visible in the registry is complete. What a killed process left is
cleared by the next attempt.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import quote

from lewis import store
from lewis.errors import LewisError
from lewis.registry import history, lineage, logged_model, repair, traces, tracking, versions
from lewis.registry.history import LUCK, METRIC, TEAM
from lewis.registry.registration import Registration
from lewis.registry.versions import Version
from lewis.reports.card import FRONT_MATTER, RECIPE
from lewis.store import manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

logger = logging.getLogger(__name__)

MAX_DESCRIPTION = 5000  # characters
_ROW = re.compile(r"^\| (?!---).*\|$", re.MULTILINE)  # a row of a Markdown table, but not the line below its head
_ROOM = "\u2007\u2007\u200b"  # two wide non-breaking spaces, and one without width, since Markdown trims cells
_ARROW = re.compile(" (?=[↑↓])")  # the space before an arrow, where a narrow cell must not be broken
_ABOUT = (
    "Versions that LEWIS merged. The alias `champion` is the version in use, `previous` the one before it, "
    "`challenger` the last one that the gate refused. Each version's page shows its scores and inputs. "
    "`lewis history {name}` prints which version replaced which and why, and `lewis pull {name} -o DIR` writes the "
    "champion into a folder."
)
UNFINISHED = "lewis.unfinished"
"""Tag of a version whose scores are being completed, or were when the process died; its value is what the tag `LUCK`
will be then."""
_OF_RUN = "lewis.prefect."  # prefix of the tags with the id and the URL of the flow run


def register(new: Registration) -> Version:
    """Register a merged checkpoint as a version in MLflow, once per digest of a merge.

    If the files of its version are lost or damaged, it is registered again, and the aliases move to the new version.
    If its version was scored on a part of the documents, and the merge is now scored on all, or on further tasks, the
    version and its run get these scores.

    Raises:
        InputError: if the name or the digest is malformed.
        LewisError: if a file of the checkpoint is damaged, or MLflow or the disk refuses. The run is then FAILED, and
            there is no version.
        TransientError: if the server does not answer.
    """
    name = versions.check(new.name, new.digest)
    try:
        manifest.check(new.folder)
    except manifest.DamagedError as error:
        raise LewisError(f"{new.folder}: expected a whole merged checkpoint: {error}; merge again") from error
    with store.SharedLock(f"registry-{name}"), tracking.client(f"registering {name}") as client:
        found = versions.find(client, name, new.digest)
        if found is not None:
            found = _keep_one(client, found, new)
            _complete(client, found, new)
            _name_inputs(client, found, new)
        else:
            _clear_leftovers(client, name, new)
            found = _keep_one(client, _create(client, name, new), new)
        repair.point_aliases_to(client, found, new.digest)
        return found


def _create(client: "MlflowClient", name: str, new: Registration) -> Version:
    from mlflow.entities import LoggedModelOutput

    experiment = tracking.experiment(client, new.team)
    tags = {"lewis.name": name, "lewis.digest": new.digest}
    about = {"lewis.recipe_digest": store.digest(new.recipe)}
    shown = {"mlflow.source.name": new.source, "mlflow.source.type": "LOCAL"} if new.source else {}
    began = int(1000 * new.began) if new.began else None
    about |= {tag: value for tag, value in new.tags.items() if tag.startswith(_OF_RUN)}
    run = client.create_run(
        experiment, start_time=began, tags=tags | shown | about, run_name=f"{name}-{new.digest[:8]}"
    )
    run_id = run.info.run_id
    try:
        plain = re.sub(r"[.%]", "_", name)  # a LoggedModel takes fewer characters than a registered model
        model = client.create_logged_model(experiment, plain, run_id, tags=tags, model_type="merged-llm")
        facts = {"metrics": _metrics_of_merged(new)}
        logged_model.write(client, model, new.folder, new.card, new.base, facts)
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        _log_run(client, run_id, model.model_id, new)
        if new.beside:
            own = {new.beside.ours: model.model_id}
            traces.log(client, experiment, run_id, new.beside, own | _model_of_champion(client, name))
        _create_registered_model(client, name, new.team)
        version = client.create_model_version(
            name,
            source=f"models:/{model.model_id}",
            run_id=run_id,
            model_id=model.model_id,
            tags=_tags_of(new) | repair.inherited(client, name, new.digest),
            description=description(new.card, new.pictures, run_id),
            await_creation_for=0,
        )
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            _fail(client, experiment, run_id)
        raise
    client.set_terminated(run_id)
    logger.info("registered %s as version %s", name, version.version)
    return Version.of(version, created=True)


def _keep_one(client: "MlflowClient", found: Version, new: Registration) -> Version:
    """Remove duplicates of a version and leftover runs and models, and mark its own run and model as complete.

    MLflow's client repeats a request whose answer is lost, so a version may exist twice. A version may also exist
    although the request for it seemed to fail, so that its run and model were marked as failed.

    Returns:
        The version that is kept: one with an alias, else the newest, as MLflow gives deleted numbers to new versions.
    """
    name, digest = found.name, new.digest
    same = [each for each in versions.of_digest(client, name, digest) if Version.of(each).run_id == found.run_id]
    if len(same) > 1:
        named = {str(number) for number in history.registered_model(client, name).aliases.values()}
        same.sort(key=lambda each: (str(each.version) in named, int(each.version)))
        for each in same[:-1]:
            if str(each.version) not in named:
                logger.warning("version %s of %s is there twice; it is deleted", each.version, name)
                client.delete_model_version(name, str(each.version))
        found = Version.of(same[-1], created=found.created)
    _close_runs(client, name, new, finished=found.run_id)
    own = (same[-1].source or "").removeprefix("models:/")
    for model in client.search_logged_models([tracking.experiment(client, new.team)], _made_by(name, digest)):
        if model.status != "READY" and model.model_id == own:
            client.finalize_logged_model(model.model_id, "READY")
        elif model.status != "READY":
            logged_model.discard(client, model)
    return found


def _complete(client: "MlflowClient", found: Version, new: Registration) -> None:
    """Replace a version's scores on a part of the documents by scores on all, and add the scores of further tasks.

    The tags that mark the scores as partial, or as being completed, are removed last. Nothing is done if the version's
    run was deleted permanently.
    """
    if (run := tracking.run_of(client, found.run_id)) is None:
        return
    version = client.get_model_version(found.name, found.version)
    tags = version.tags
    in_part = tracking.PART in tags
    more = in_part or _has_more(run, new, again=UNFINISHED in tags)
    if tracking.PART in new.tags or not new.documents or not more:
        return
    model = versions.model_of(client, version)
    assert model is not None  # `found` is whole
    luck = tags.get(LUCK, "0")
    part = _part_of_metric(run, tags) if in_part and luck != tags.get(UNFINISHED) else ""
    if part:  # a standard error falls with the root of the number of documents
        scored, _, pool = part.partition(" of ")
        luck = f"{float(luck) * math.sqrt(int(scored) / int(pool)):.6g}"
    client.set_model_version_tag(found.name, found.version, UNFINISHED, luck)
    logged_model.note_metrics(client, model, _metrics_of_merged(new))
    _log_scores(client, found.run_id, model.model_id, new)
    text = description(new.card, new.pictures, found.run_id)
    client.update_model_version(found.name, found.version, description=text)
    if in_part:
        if LUCK in tags:
            client.set_model_version_tag(found.name, found.version, LUCK, luck)
        client.delete_model_version_tag(found.name, found.version, tracking.PART)
    client.delete_model_version_tag(found.name, found.version, UNFINISHED)
    logger.info("%s has the scores of all documents and tasks now", found.uri)


def _part_of_metric(run: "Run", tags: Mapping[str, str]) -> str:
    """Return the part of its documents that the task of a version's metric was scored on; empty if it was on all.

    Of a metric that is not of one task, such as the weighted mean, it is the part that the version's tag has.
    """
    task = tags.get(METRIC, "").partition("/")[0]
    inputs = run.inputs.dataset_inputs if run.inputs else []
    of_task = [each for each in inputs if each.dataset.name == task]
    parts = [{tag.key: tag.value for tag in each.tags}.get(tracking.PART, "") for each in of_task]
    return max(parts, default=tags[tracking.PART])  # once all documents are scored, a second input is there, without it


def _name_inputs(client: "MlflowClient", found: Version, new: Registration) -> None:
    """Tag a version with its inputs under this recipe's references, by which releases are compared with it."""
    known = client.get_model_version(found.name, found.version).tags
    for tag, key in lineage.tags_of(new.lineage).items():
        if known.get(tag) != key:
            client.set_model_version_tag(found.name, found.version, tag, key)


def _has_more(run: "Run", new: Registration, *, again: bool) -> bool:
    """Whether a merge has scores that its run lacks, on the same documents for the tasks that the run has.

    Args:
        again: whether the same scores as the run's are enough, because the run's may be incomplete.
    """
    inputs = run.inputs.dataset_inputs if run.inputs else []
    known = {(each.dataset.name, each.dataset.digest) for each in inputs}
    tasks = {task for task, _ in known}
    ours = {tracking.key(name) for name in new.metrics if name.startswith("merged/")}
    theirs = {name for name in run.data.metrics if name.startswith("merged/")}
    more = bool(ours - theirs) or (again and ours >= theirs)
    return more and all(each in known or each[0] not in tasks for each in new.documents.values())


def _metrics_of_merged(new: Registration) -> dict[str, float]:
    return {k.removeprefix("merged/"): v for k, v in new.metrics.items() if k.startswith("merged/")}


def _model_of_champion(client: "MlflowClient", name: str) -> dict[str, str]:
    """Return the champion's label in tables -> the id of its logged model; empty without an intact champion."""
    version = versions.lookup(client, name, alias="champion")
    model = versions.model_of(client, version) if version else None
    return {"champion": model.model_id} if model else {}


def _log_run(client: "MlflowClient", run_id: str, model_id: str, new: Registration) -> None:
    tracking.log_numbers(client, run_id, model_id, new.params, {})
    texts = {"recipe.yaml": new.recipe, "lineage.json": json.dumps(dict(new.lineage), indent=2)}
    files = {name: text.encode() for name, text in texts.items()}
    tracking.log_files(client, run_id, files, checked=True)
    _log_scores(client, run_id, model_id, new)


def _log_scores(client: "MlflowClient", run_id: str, model_id: str, new: Registration) -> None:
    """Log all of a run that depends on scores (inputs, metrics, tables, card, pictures), in place of earlier ones."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

    tracking.log_datasets(client, run_id, new.datasets)
    tracking.log_numbers(client, run_id, model_id, {}, new.metrics, new.documents)
    # not `log_table`, which adds rows to a table that is there
    tables = {f"{name}.json": _table(rows) for name, rows in new.tables.items()}
    files = {"card.md": new.card.encode(), **new.pictures, **tables}
    tracking.log_files(client, run_id, files, checked=True)
    client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([{"path": name, "type": "table"} for name in tables]))


def _table(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Return rows as JSON in the form in which MLflow keeps a table, so that its pages show it as one."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return json.dumps({"columns": columns, "data": [[row.get(each) for each in columns] for row in rows]}).encode()


def description(text: str, pictures: Iterable[str], run_id: str) -> str:
    """Adapt a model card to MLflow's pages: without front matter, which they show as text, and with working pictures.

    MLflow's tables have no room between columns: each cell gets some. A link to the recipe's file follows the recipe,
    the code block that ends a card. What is too long is cut after a whole line: first the recipe, then the rest.

    Args:
        text: the card.
        pictures: names of the files that it shows.
        run_id: of the MLflow run that has them.
    """
    text, _, recipe = FRONT_MATTER.sub("", text).partition(RECIPE)
    for picture in pictures:
        text = text.replace(f"]({picture})", f"](get-artifact?path={quote(picture)}&run_uuid={run_id})")
    text = _ROW.sub(lambda row: _ARROW.sub("\u00a0", row[0]).replace(" |", f"{_ROOM} |"), text)
    link = f"\n\nThe recipe: [recipe.yaml](get-artifact?path=recipe.yaml&run_uuid={run_id})" if recipe else ""
    if (room := MAX_DESCRIPTION - len(text) - len(link)) < 0:
        link = f"\n\n... (cut, all of it is in card.md){link}"
        return text[: MAX_DESCRIPTION - len(link)].rpartition("\n")[0] + link
    return text + _shown(recipe.rstrip(), room) + link


def _shown(recipe: str, room: int) -> str:
    """Return the recipe's part of a card, a code block, cut to `room` characters; empty if no line of it has room."""
    if len(whole := f"{RECIPE}{recipe}" if recipe else "") <= room:
        return whole
    fence = recipe[: len(recipe) - len(recipe.lstrip("`"))]
    end = f"\n{fence}\n\n... (cut, all of it is in recipe.yaml)"
    cut = whole[: max(0, room - len(end))].rpartition("\n")[0]
    return cut + end if f"{fence}yaml\n" in cut else ""


def _tags_of(new: Registration) -> dict[str, str]:
    """The tags of a new version, by which people filter; the rest is in its run, and in `logged_model.FACTS`."""
    own = {"lewis.recipe": new.source.removesuffix(".yaml")} if new.source else {}
    own |= {TEAM: new.team} if new.team else {}
    own |= {tag: value for tag, value in new.tags.items() if not tag.startswith(_OF_RUN)}
    return {"lewis.digest": new.digest, **own, **lineage.tags_of(new.lineage)}


def _create_registered_model(client: "MlflowClient", name: str, team: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags={TEAM: team} if team else None, description=_ABOUT.format(name=name))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _clear_leftovers(client: "MlflowClient", name: str, new: Registration) -> None:
    """Clear what earlier attempts left: half-made runs of killed processes, and versions whose files are damaged."""
    digest = new.digest
    for version in versions.of_digest(client, name, digest):
        logger.warning("version %s of %s: files are lost or damaged; registering it again", version.version, name)
        repair.give_up(client, version, digest)
    _close_runs(client, name, new, finished=None)
    for model in client.search_logged_models([tracking.experiment(client, new.team)], _made_by(name, digest)):
        if model.status == "FAILED":
            logged_model.discard(client, model)


def _close_runs(client: "MlflowClient", name: str, new: Registration, finished: str | None) -> None:
    """End the runs whose process died: `finished`, which created a version, as FINISHED; all others as FAILED."""
    experiment = tracking.experiment(client, new.team)
    for run in client.search_runs([experiment], f"{_made_by(name, new.digest)} and attributes.status != 'FINISHED'"):
        if run.info.run_id == finished:
            client.set_terminated(run.info.run_id)
        elif run.info.status == "RUNNING":
            _fail(client, experiment, run.info.run_id)


def _fail(client: "MlflowClient", experiment: str, run_id: str) -> None:
    for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        client.finalize_logged_model(model.model_id, "FAILED")
    client.set_terminated(run_id, "FAILED")


def _made_by(name: str, digest: str) -> str:
    return f"tags.`lewis.name` = '{name}' and tags.`lewis.digest` = '{digest}'"
