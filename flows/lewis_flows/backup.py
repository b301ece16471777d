"""Back up, and restore, what cannot be made again: MLflow's and Prefect's data, recipes, secrets, the outbox.

    DIR/lewis.json  DIR/store/mlflow/mlflow.db  DIR/store/mlflow/artifacts/...  DIR/store/prefect/prefect.db
    DIR/store/prefect-api-key ...  DIR/store/outbox/...  DIR/recipes/...
    DIR/prefect/prefect.db  if Prefect's database is outside of the store

`lewis.json` has the size and SHA-256 of every file. A copy appears whole or not at all.
"""

import os
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from filelock import Timeout

from lewis import settings, store
from lewis.errors import InputError, LewisError
from lewis.redact import redacted
from lewis.store import kinds, manifest, secrets
from lewis.store.folders import leads_out
from lewis.store.verification import problem_of_database
from lewis_flows import recipes_folder
from lewis_flows.service import note
from lewis_flows.service.servers import mlflow_database, prefect_database

_DATABASES = ("mlflow/*.db", "prefect/prefect.db")
_FOLDERS = ("mlflow/artifacts", *(kind.name for kind in kinds.TABLE.values() if kind.backed_up))
_NEVER_NONE = {  # files of which a copy has some if the earlier one had some -> what may be wrong
    re.compile(r"recipes/[^/]+\.ya?ml"): "set LEWIS_RECIPES as `lewis up` has it.",
    re.compile(r"store/mlflow/artifacts/.+"): "is the disk of mlflow/artifacts mounted?",
}
_JOURNALS = ("-journal", "-wal")  # of SQLite, next to a database whose process died


class Copied(NamedTuple):
    """What `backup` copied, or `restore` put back.

    Attributes:
        folder: of the copy.
        files: how many.
        bytes: of all of them.
        elsewhere: parts that are on servers of your own and are not in this copy: part -> the server's address.
        missing: parts that have no database yet: part -> where it was looked for.
    """

    folder: Path
    files: int
    bytes: int
    elsewhere: dict[str, str]
    missing: dict[str, str]


def backup(folder: Path) -> Copied:
    """Copy the data that cannot be made again to a folder, also while the service runs.

    Each database is copied as of one moment, and MLflow's files after that. In the copy, no slot of Prefect's limits is
    taken.

    Raises:
        InputError: if the folder is in the store or holds anything but an earlier copy of this store, if that copy has
            a database, or recipes or model files, and there are none by now, if LEWIS_RECIPES names no folder, or if
            `lewis up` has a database elsewhere than the environment says.
        LewisError: if a database cannot be read or is damaged, or the folder cannot be written.
    """
    folder = folder.absolute()
    if store.holds(folder):
        raise InputError(f"{folder}: expected a folder outside of the store, which is copied; choose another one")
    known = note.read()
    places = {"mlflow": mlflow_database(), "prefect": prefect_database()}
    served = known.get(note.database_of("mlflow"))
    if served and os.environ.get("MLFLOW_TRACKING_URI") == known.get("mlflow"):  # `lewis env` names the server
        places["mlflow"] = Path(served) if os.path.isabs(served) else served
    _check_as_served(places, known)
    about = {store.COPIED: str(store.home()), "made": datetime.now(UTC).isoformat()}
    try:
        with store.publish(folder, about) as scratch:
            scratch.chmod(0o700)  # there are secrets in it
            copied = _copy_databases(places, scratch)
            _copy_store(scratch / "store")
            if settings.RECIPES.given() or recipes_folder.location().is_dir():
                # A link that leads nowhere is no recipe: an editor's mark of an open file is one.
                shutil.copytree(recipes_folder.folder(), scratch / "recipes", ignore_dangling_symlinks=True)
            _check_complete(folder, scratch)
    except (OSError, sqlite3.Error, shutil.Error) as error:
        raise LewisError(f"{folder}: the copy could not be made: {error}") from error
    files = (store.read_manifest(folder) or {})["files"]
    if (api := os.environ.get("PREFECT_API_URL")) and api != known.get("prefect"):
        places["prefect"] = redacted(api)
    left = {part: place for part, place in places.items() if place not in copied}
    missing = {part: str(place) for part, place in left.items() if isinstance(place, Path) and not place.exists()}
    elsewhere = {part: str(place) for part, place in left.items() if part not in missing}
    return Copied(folder, len(files), sum(each["size"] for each in files.values()), elsewhere, missing)


def restore(folder: Path) -> Copied:
    """Put the files of a copy back where they are missing; can be repeated after the process was killed.

    Raises:
        InputError: if it is no copy or damaged, is of a store at another place, `lewis up` or another process uses the
            store, or a file is there already with another content.
        LewisError: if the disk fails.
    """
    if not folder.exists():
        with suppress(OSError):  # the disk may be read-only
            store.sweep(folder.absolute().parent)  # a `backup` that was killed may have set it aside
    try:
        found = manifest.check(folder, again=True)
    except manifest.DamagedError as error:
        raise InputError(f"{folder}: expected a whole copy that `lewis backup` made: {error}") from error
    home = found.get(store.COPIED)
    if home != str(store.home()):
        raise InputError(
            f"{folder}: expected a copy of the store {store.home()}, got {f'one of {home}' if home else 'another'}; "
            "MLflow's database names files by their whole path, so set LEWIS_HOME to the folder that was copied"
        )
    try:
        with store.lock("up").acquire(timeout=0):
            _check_unused()
            wanted = list(_targets(folder, found["files"]))
            for name, target in wanted:
                if target.exists() and store.file_sha256(target) != found["files"][name]["sha256"]:
                    raise InputError(f"{target}: it is there already; move the store or the recipes away first")
                for left in (Path(f"{target}{end}") for end in _JOURNALS if f"{name}{end}" not in found["files"]):
                    if name.endswith(".db") and left.exists() and not target.exists():
                        raise InputError(f"{left}: SQLite would write it into the database of the copy; move it away")
            for name, target in wanted:
                _put(folder / name, target)
    except Timeout:
        raise InputError(f"`lewis up` runs on {store.home()}; stop it first") from None
    except OSError as error:
        raise LewisError(f"{error.filename or folder}: the copy could not be put back: {error}") from error
    return Copied(folder, len(wanted), sum(each["size"] for each in found["files"].values()), {}, {})


def _copy_databases(places: dict[str, Path | str], target: Path) -> set[Path]:
    """Copy the store's and Prefect's databases, before the files that they name; return those that were copied."""
    found = {path for pattern in _DATABASES for path in store.home().glob(pattern)}
    found |= {place for place in places.values() if isinstance(place, Path) and place.is_file()}
    copied = {path for path in found if store.holds(path) or path == places["prefect"]}
    for path in sorted(copied):
        inside = Path("store") / path.relative_to(store.home()) if store.holds(path) else Path("prefect") / path.name
        _copy_database(path, target / inside)
    return copied


def _copy_store(target: Path) -> None:
    for name in _FOLDERS:
        if (store.home() / name).is_dir():
            shutil.copytree(store.home() / name, target / name, ignore=shutil.ignore_patterns(".*.partial"))
    for path in secrets.files():
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def _copy_database(path: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as there, closing(sqlite3.connect(target)) as copy:
        there.backup(copy)
        _free_slots(copy)
    if why := problem_of_database(target):
        raise sqlite3.DatabaseError(f"{path} is damaged: {why}; stop `lewis up`, and put back an earlier copy's")
    for end in ("-wal", "-shm"):  # the check leaves them; SQLite removes them when somebody has read the copy
        Path(f"{target}{end}").unlink(missing_ok=True)
    target.chmod(0o600)


def _free_slots(copy: sqlite3.Connection) -> None:
    """Free the slots of Prefect's limits in a copy: the server would free one by the file of its lease, not copied."""
    if copy.execute("select 1 from sqlite_master where name = 'concurrency_limit_v2'").fetchone():
        with copy:
            copy.execute("update concurrency_limit_v2 set active_slots = 0")


def _check_complete(earlier: Path, made: Path) -> None:
    """Raise InputError if a new copy lacks a database of the earlier one, or has none of its recipes or model files."""
    known = (store.read_json(earlier / store.MANIFEST) or {}).get("files") or {}
    names = {str(path.relative_to(made)) for path in made.rglob("*") if path.is_file()}
    lost = [(name, "is its disk mounted?") for name in known if name.endswith(".db") and name not in names]
    for part, fix in _NEVER_NONE.items():
        before = next(filter(part.fullmatch, known), None)
        if before and not any(map(part.fullmatch, names)):
            lost.append((f"{before} and the like", fix))
    for name, fix in lost:
        raise InputError(
            f"{earlier}: the copy that is there has {name}, and the store {store.home()}, with the recipes in "
            f"{recipes_folder.location()}, has none any more: {fix} To copy it as it is, choose another folder"
        )


def _check_as_served(places: dict[str, Path | str], known: dict[str, Any]) -> None:
    """Raise InputError if `lewis up` runs and has a database elsewhere than this environment says."""
    for part, place in places.items():
        served = known.get(note.database_of(part))
        if served and os.path.realpath(served) != os.path.realpath(place):
            raise InputError(
                f"{part}: `lewis up` has its database in {served}, and by this environment it is {place}: set "
                "LEWIS_HOME, PREFECT_HOME and the URLs of databases as `lewis up` has them"
            )


def _prefect_folder() -> Path:
    """Return the folder to which Prefect's database is put back if it was outside of the store."""
    place = prefect_database()
    return place.parent if isinstance(place, Path) else store.home() / "prefect"


def _check_unused() -> None:
    """Raise InputError if another process has a file of the store or of Prefect open, even a deleted one."""
    places = tuple(f"{place.resolve()}/" for place in (store.home(), _prefect_folder()))
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # it has ended, or is of another user
            if os.readlink(link).startswith(places) and link.parts[2] != str(os.getpid()):
                raise InputError(f"process {link.parts[2]} uses {os.readlink(link)}; stop it first")


def _targets(folder: Path, files: dict[str, object]) -> Iterator[tuple[str, Path]]:
    """Each file of a copy and the path that it goes back to; MLflow's database last, after the files that it names."""
    places = {"store": store.home(), "recipes": recipes_folder.location(), "prefect": _prefect_folder()}
    for name in sorted(files, key=lambda name: (name.endswith(".db"), name)):
        top, _, rest = name.partition("/")
        if not rest or leads_out(rest) or top not in places:
            raise InputError(f"{folder}: {name!r} is no file of a copy that `lewis backup` makes")
        yield name, places[top] / rest


def _put(source: Path, target: Path) -> None:
    if target.exists():
        return
    inside = store.holds(target)
    store.make_folder(target.parent) if inside else target.parent.mkdir(parents=True, exist_ok=True)
    # Secrets lie directly in the store, next to the folders of all else.
    with store.written_beside(target, private=target.parent == store.home()) as beside:
        shutil.copy2(source, beside)
