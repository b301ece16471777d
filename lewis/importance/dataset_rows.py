"""Read the rows of a calibration set: texts of the recipe, local files, or a dataset of the Hub."""

import glob
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lewis import store
from lewis.errors import InputError, LewisError, TransientError
from lewis.input_files import check_regular
from lewis.recipe.schema import LOCAL, CalibrationSet
from lewis.store.manifest import remembered_sha256

LOADING = threading.Lock()
"""Held while a set is loaded: `datasets` has global state, such as its progress bars, and inspects transformers, which
must not be half imported then."""


def origin(where: str, spec: CalibrationSet, root: Path) -> list[str]:
    """Identify the data of a set's rows: checksums of its files, or the commit of its dataset; empty for inline texts.

    Raises:
        InputError: if a file or the dataset does not exist.
    """
    if spec.texts is not None:
        return []
    arguments = _arguments(where, spec, root)
    if "revision" in arguments:
        return [arguments["revision"]]
    return [remembered_sha256(Path(path)) for path in arguments["data_files"]]


@contextmanager
def rows_of(where: str, spec: CalibrationSet, root: Path) -> Iterator[Any]:
    """Give all rows of a calibration set, as `datasets` reads them, or its texts; in order.

    The files that `datasets` builds from local files have no checksums: they are removed afterwards, and built again
    each time. A set that was tokenised is found in the store.

    Raises:
        InputError: if the data cannot be read.
        TransientError: if the Hub is busy or unreachable.
    """
    if spec.texts is not None:
        yield list(spec.texts)
        return
    cache = store.beside(store.make_folder(store.home()) / "rows")
    try:
        with LOADING:
            rows = _load_dataset(where, spec, root, cache)
        yield rows
    finally:
        store.discard(cache)


def _load_dataset(where: str, spec: CalibrationSet, root: Path, cache: Path) -> Any:
    arguments = _arguments(where, spec, root)
    import datasets

    datasets.disable_progress_bars()
    repo = (spec.dataset or "").partition("@")[0]
    files: list[str] = arguments.get("data_files", [])
    if repo in LOCAL:
        arguments["cache_dir"] = str(cache)
        arguments["data_files"] = [glob.escape(file) for file in files]  # datasets takes patterns
    try:
        arguments |= _as_written(files[0]) if repo == "csv" else {}
        load = partial(datasets.load_dataset, repo, split=spec.split, **arguments)
        return load() if repo in LOCAL else _from_hub(where, load)
    except TransientError:
        raise
    except Exception as error:  # datasets raises many kinds, also bare ones of its parsers
        reason = " ".join(str(error.__cause__ or error).split())[:400]
        first = Path(next(iter(files), ""))
        kind = first.suffix.removeprefix(".")
        hint = f"; {first.name} looks like `dataset: {kind}`" if repo in LOCAL and kind in {*LOCAL} - {repo} else ""
        raise InputError(
            f"{where}: cannot load {repo!r} (config {spec.config}, split {spec.split}): {reason}{hint}"
        ) from error


def _as_written(file: str) -> dict[str, Any]:
    """Arguments by which `datasets` reads the cells of a CSV as texts: as numbers, 007 would be 7."""
    import datasets
    import pandas as pd

    columns = pd.read_csv(file, nrows=0).columns
    return {"features": datasets.Features(dict.fromkeys(columns, datasets.Value("string"))), "na_filter": False}


def _from_hub(where: str, load: Callable[[], Any]) -> Any:
    """Load a dataset of the Hub, with the same retries as for models.

    Raises:
        TransientError: if the Hub is busy or unreachable.
        Exception: any other error of `datasets`.
    """
    from lewis.models.hub.client import endpoint, repeated, resume_downloads
    from lewis.models.hub.errors import explain, retryable

    resume_downloads()
    try:
        return repeated(where, load)
    except Exception as error:
        if retryable(error):
            raise explain(where, error, endpoint()) from error
        raise


def _arguments(where: str, spec: CalibrationSet, root: Path) -> dict[str, Any]:
    """Arguments of `datasets.load_dataset` for a set: its local files, which must exist, or its dataset's commit."""
    repo, _, revision = (spec.dataset or "").partition("@")
    arguments: dict[str, Any] = {"name": spec.config}
    if spec.data_files:
        files = (spec.data_files,) if isinstance(spec.data_files, str) else spec.data_files
        arguments["data_files"] = [_local_file(where, file, root) for file in files] if repo in LOCAL else list(files)
    if repo not in LOCAL:
        from lewis.models.hub.repository import resolve_dataset

        try:
            arguments["revision"] = resolve_dataset(repo, revision or None)
        except LewisError as error:
            raise type(error)(f"{where}: {error}") from error
    return arguments


def _local_file(where: str, file: str, root: Path) -> str:
    try:
        path = root / Path(file).expanduser()
    except RuntimeError as error:  # "~nobody"
        raise InputError(f"{where}.data_files: {file}: {error}") from error
    check_regular(path)
    if not path.is_file():
        raise InputError(f"{where}.data_files: no such file: {path}; relative paths start at the recipe's folder")
    if not path.stat().st_size:
        raise InputError(f"{where}.data_files: {path} is empty; give it rows")
    return str(path)
