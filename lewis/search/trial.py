"""One trial of a search: allocate, merge into memory, score, and remove the merged model."""

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lewis import memory, pipeline, store
from lewis.errors import InputError
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.step import ScoresEntry
from lewis.models.source import ModelFiles
from lewis.progress import Report, silent
from lewis.recipe.recipe import Recipe

logger = logging.getLogger(__name__)
MEMORY = Path("/dev/shm")  # a file system in memory, whose files lm-eval maps without a copy
SHARE = 0.5  # largest share of the free memory for a merged model


def score_trial(
    recipe: Recipe,
    base: ModelFiles | None,
    experts: Sequence[ModelFiles],
    settings: EvalSettings,
    *,
    device: str = "cpu",
    progress: Report = silent,
) -> ScoresEntry:
    """Scores of the model that a recipe gives; found in the store if the same merge has been scored before.

    Args:
        recipe: with a trial's values.
        base, experts: as in `lewis.merging.step.merge`; their importance is measured if the store does not have it.
        settings: tasks and documents.
        device: of the forward passes.
        progress: called with the kind of requests that is running, how many are done, and how many there are.

    Raises:
        InputError, LewisError: if the values are not valid together, or the merge or lm-eval fails.
    """
    allocated = None
    if recipe.allocator and base:
        allocated = pipeline.guide(recipe, base, experts, device=device)[1]
    prepared = pipeline.prepare_merge(recipe, base, experts, allocated)
    found = pipeline.find_scores(recipe.label, prepared.digest, settings, device)
    if found is not None:
        return found
    with store.lock(f"trial-{prepared.digest}"), _folder(prepared.digest, prepared.size) as folder:
        if not folder.exists():
            prepared.run(folder)
        adapter = folder if base and prepared.as_adapter else None
        files = ModelFiles.at(recipe.label, prepared.digest, base.folder if base and adapter else folder, adapter)
        return pipeline.score(files, settings, device=device, progress=progress)


@contextmanager
def _folder(digest: str, size: int) -> Iterator[Path]:
    """The merged model in the store if it has it; else a path for one, in memory if it fits, removed afterwards."""
    known = pipeline.find_merged(digest)
    if known is not None:
        yield known.folder
        return
    fits = os.access(MEMORY, os.W_OK) and size < SHARE * min(shutil.disk_usage(MEMORY).free, memory.available_bytes())
    if not fits:
        logger.info("the merged model, %.1f GB, is written to the disk: it does not fit in memory", size / 1e9)
    parent = (_own_memory() if fits else None) or store.make_folder(store.home() / "trials")
    store.sweep(parent)  # left by killed trials
    scratch = store.beside(parent / digest[:12])
    scratch.mkdir()
    try:
        yield scratch / "model"
    finally:
        store.discard(scratch)


def _own_memory() -> Path | None:
    """The folder of this user in memory; None, which is told, if somebody else could have put models there."""
    try:
        return store.private_folder(MEMORY / f"lewis-{os.getuid()}")
    except InputError as error:
        logger.warning("%s; until then trials are written to the disk", error)
        return None
