"""One trial of a search: allocate, merge into memory, score, and remove the merged model."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lewis import memory, store
from lewis.errors import InputError, LewisError
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.step import ModelScores, find_scores, score
from lewis.merging.step import MergeInput, find_merged, prepare_merge
from lewis.models.source import ModelFiles
from lewis.progress import Report, silent
from lewis.steps.graph import Graph
from lewis.steps.run import run

logger = logging.getLogger(__name__)
MEMORY = Path("/dev/shm")  # a file system in memory, whose files lm-eval maps without a copy
SHARE = 0.5  # largest share of the free memory for a merged model


def score_trial(
    graph: Graph,
    label: str,
    known: Mapping[str, Any],
    settings: EvalSettings,
    *,
    device: str = "cpu",
    report: Report = silent,
) -> ModelScores:
    """Return the scores of a trial's merged model, from the store if the same merge has been scored before.

    Args:
        graph: of the recipe with a trial's values.
        label: name of the merged model in tables.
        known: node -> result, of the downloads at least; the other nodes that the merge needs are found or run.
        settings: tasks and documents.
        device: of the forward passes.
        report: called with (kind of requests, done, total) while lm-eval works.

    Raises:
        InputError, LewisError: if the values are not valid together, or the merge or lm-eval fails.
    """
    node = graph["merge experts"]
    results = run(graph, *node.needs, known=known, device=device)
    given: MergeInput = node.given(results)
    prepared = prepare_merge(given)
    found = find_scores(label, prepared.digest, settings, device)
    if found is not None:
        return found
    with store.lock(f"trial-{prepared.digest}"), ExitStack() as stack:
        folder = stack.enter_context(_folder(prepared.digest, prepared.size))
        if not folder.exists() and folder.is_relative_to(MEMORY):
            try:
                prepared.run(folder, unchanged=given.check_unchanged)
            except LewisError as error:
                if not isinstance(error.__cause__, OSError):
                    raise
                logger.info("the merged model is written to the disk: another process took the memory (%s)", error)
                stack.close()
                folder = stack.enter_context(_folder(prepared.digest, prepared.size, in_memory=False))
        if not folder.exists():
            prepared.run(folder, unchanged=given.check_unchanged)
        adapter = folder if given.base and prepared.as_adapter else None
        where = given.base.folder if given.base and adapter else folder
        files = ModelFiles.at(label, prepared.digest, where, adapter)
        return score(files, settings, device=device, progress=report)


@contextmanager
def _folder(digest: str, size: int, *, in_memory: bool = True) -> Iterator[Path]:
    """The path of a merged model: in the store, or else a new one, in memory if it fits, removed at the end."""
    known = find_merged(digest)
    if known is not None:
        yield known.folder
        return
    fits = in_memory and os.access(MEMORY, os.W_OK)
    fits = fits and size < SHARE * min(shutil.disk_usage(MEMORY).free, memory.available_bytes())
    if not fits:
        logger.info("the merged model, %.1f GB, is written to the disk: it does not fit in memory", size / 1e9)
    scratch = _in_memory(digest) if fits else None
    if scratch is None:
        scratch = _scratch(store.make_folder(store.home() / "trials"), digest)
        store.restrict(scratch)
    try:
        yield scratch / "model"
    finally:
        store.discard(scratch)


def _scratch(parent: Path, digest: str) -> Path:
    """Make a scratch folder for a merge, and remove those of killed trials next to it."""
    store.sweep(parent)
    scratch = store.beside(parent / digest[:12])
    scratch.mkdir()
    return scratch


def _in_memory(digest: str) -> Path | None:
    """Make a scratch folder for a merge in memory, in this user's own folder there.

    None, with a warning, if another user could have put models there, or if it is read-only or has no inode left.
    """
    try:
        return _scratch(store.private_folder(MEMORY / f"lewis-{os.getuid()}"), digest)
    except (InputError, OSError) as error:
        logger.warning("%s; until then trials are written to the disk", error)
        return None
