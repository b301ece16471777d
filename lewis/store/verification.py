"""Check everything in the store again, without the remembered checksums.

Nothing is moved: the next run that needs a damaged entry sets it aside and makes it again.
"""

import sqlite3
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from lewis.input_files import check_regular
from lewis.store import kinds, manifest
from lewis.store.folders import home
from lewis.store.kinds import Kind

DATABASE = "database"
PUT_BACK = "stop `lewis up`, and put back a backup's"
"""What to do about a damaged database."""


@dataclass(frozen=True)
class Damage:
    """An entry, database or registered version whose files are not as they were written.

    Attributes:
        kind: the name of the entry's kind, `DATABASE`, or `version` for a version of a registered model.
        entry: the path of the entry or database, or `models:/name/version`.
        why: the damaged file, and what is wrong with it.
    """

    kind: str
    entry: str
    why: str


@dataclass(frozen=True)
class Verified:
    """The result of a check of everything in the store.

    Attributes:
        checked: how many entries and versions were checked.
        damaged: what is damaged.
        unchecked: how many versions are of a run whose own files (scores, verdict, recipe) have no checksums.
    """

    checked: int
    damaged: list[Damage]
    unchecked: int = 0

    @property
    def left_out(self) -> str:
        """The end of a sentence that names what was not checked; empty if everything was checked."""
        if not self.unchecked:
            return ""
        return (
            f"; not checked: scores, verdict and recipe of {self.unchecked} earlier versions, which have no checksums"
        )

    def to_text(self) -> str:
        """Say how many entries and versions are damaged, which is the first, and what to do."""
        if not self.damaged:
            return f"{self.checked} entries and versions, none is damaged{self.left_out}"
        first = self.damaged[0]
        return (
            f"{len(self.damaged)} of {self.checked} entries and versions are damaged; the first: {first.entry}: "
            f"{first.why}; run their recipes (`lewis run`) to make them again"
        )


def verify() -> Verified:
    """Read and check every entry of the store that has checksums, and SQLite's databases in it, as far as SQLite can.

    Entries that a step is working on are left out.
    """
    count, damaged = 0, []
    for path in (path for folder in kinds.FOREIGN for path in sorted((home() / folder).glob("*.db"))):
        count += 1
        if problem := problem_of_database(path):
            damaged.append(Damage(DATABASE, str(path), f"{problem}; {PUT_BACK}"))
    for kind in kinds.TABLE.values():
        for path in kind.entries() if kind.check else ():
            why = _problem(kind, path)
            count += why is not None
            if why:
                damaged.append(Damage(kind.name, str(path), why))
    return Verified(count, damaged)


def problem_of_database(path: Path) -> str:
    """Say what is wrong with the pages of an SQLite database; empty if nothing. SQLite has no checksums of values."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as database:
            found = str(database.execute("pragma integrity_check(1)").fetchone()[0])
    except sqlite3.Error as error:
        return str(error)
    return "" if found == "ok" else " ".join(found.split())


def _problem(kind: Kind, path: Path) -> str | None:
    """What is wrong with an entry; empty if nothing is, None if it was not checked."""
    head = kind.head_of(path)
    if kind.manifest and not head.is_file():  # LEWIS did not write it
        return None
    try:
        with kind.lock(path.stem).acquire(timeout=0) if kind.locks else nullcontext():
            check_regular(head)
            manifest.check_files(head.parent, kind.parts(path, head.read_bytes()), again=True)
    except Timeout:
        return None
    except (OSError, ValueError) as error:
        return (str(error) or "it cannot be read") if path.exists() else None
    return ""
