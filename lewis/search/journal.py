"""The journal of a search: Optuna's, each line with a checksum, so that no damaged trial is believed."""

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lewis import store
from lewis.store import sealed_json

if TYPE_CHECKING:
    from optuna.storages import JournalStorage


def open_journal(path: Path) -> "JournalStorage":
    """The storage of a search, kept in the file `path`.

    A damaged file is set aside, and the search begins anew: it asks for the same values again, whose scores the store
    has.
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

    class Journal(BaseJournalBackend):
        """Optuna's file, with checksums."""

        def __init__(self) -> None:
            self._file = JournalFileBackend(str(path))

        def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
            for line in self._file.read_logs(log_number_from):
                yield sealed_json.unsealed(line)

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            self._file.append_logs([sealed_json.sealed(line) for line in logs])

    store.make_folder(path.parent)
    try:
        sealed_json.check_lines(path.read_bytes())
    except FileNotFoundError:
        pass
    except sealed_json.DamagedError as error:
        store.set_aside([path], str(error))
    storage = JournalStorage(Journal())
    store.restrict(path)
    return storage
