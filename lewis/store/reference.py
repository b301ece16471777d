"""References to entries of the store: small, frozen, printable, checked against the disk when loaded."""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from lewis.errors import LewisError
from lewis.store import entries


class Reference(BaseModel):
    """A small reference to something on disk. One whose files are gone or cut short cannot be made or loaded."""

    model_config = ConfigDict(frozen=True)


class JsonReference(Reference):
    """A JSON file of the store, which is whole if it holds something under `holds`."""

    holds: ClassVar[str]
    digest: str
    path: Path

    @model_validator(mode="after")
    def _on_disk(self) -> Self:
        if entries.entry(self.path, self.holds) is None:
            raise ValueError(f"{self.path} is gone or damaged")
        return self

    def content(self, key: str) -> Any:
        """What the file holds under `key`.

        Raises:
            LewisError: if that is gone or damaged.
        """
        found = entries.entry(self.path, key)
        if found is None:
            raise LewisError(f"{self.path} is gone or damaged; run again to make it")
        return found
