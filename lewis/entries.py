"""References to what the store and the disk hold: small, frozen, printable, checked against the disk when loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from lewis import store
from lewis.allocation.aim import aim
from lewis.allocation.densities import Allocation
from lewis.evaluation.lm_eval import Evaluated, Score
from lewis.importance import measured as measurements
from lewis.lazy_torch import torch
from lewis.merge.run import Scales
from lewis.models.checkpoint import Checkpoint
from lewis.models.lora import LoraExpert, Model
from lewis.models.pin import Pinned


class _Entry(BaseModel):
    """A small reference to something on disk. One whose files are gone or cut short cannot be made or loaded."""

    model_config = ConfigDict(frozen=True)


class ModelFiles(_Entry):
    """A model on disk: a folder, and an adapter's folder if it is a LoRA expert.

    Attributes:
        ref: as the recipe names it.
        key: identity of the content: commits or content digests.
        sizes: file -> bytes, checked whenever a reference is loaded.
    """

    ref: str
    key: str
    folder: Path
    adapter: Path | None = None
    sizes: dict[str, int]

    @model_validator(mode="after")
    def _on_disk(self) -> ModelFiles:
        if self.folder.parent == store.home() / "merged":  # a merged model, to be scored or merged again
            store.mark_used(self.folder / store.MANIFEST)
        for name, size in self.sizes.items():
            if not os.path.isfile(name) or os.path.getsize(name) != size:
                raise ValueError(f"{name} is gone or was cut short")
        return self

    @classmethod
    def at(cls, ref: str, key: str, folder: Path, adapter: Path | None = None) -> ModelFiles:
        """Refer to folders as they are now."""
        paths = [p for place in (folder, adapter) if place for p in sorted(place.glob("*")) if p.is_file()]
        sizes = {str(p): p.stat().st_size for p in paths if p.suffix in (".safetensors", ".json")}
        return cls(ref=ref, key=key, folder=folder, adapter=adapter, sizes=sizes)

    def open(self) -> Model:
        """Open it for reading.

        Raises:
            InputError: as `Checkpoint` and `LoraExpert`.
        """
        if self.adapter is None:
            return Checkpoint(self.folder, self.key)
        return LoraExpert(Checkpoint(self.folder, self.key.partition("+")[0]), self.adapter, self.key)


class CalibrationEntry(_Entry):
    """A calibration set in the store."""

    name: str
    digest: str
    tokens: int
    path: Path

    @model_validator(mode="after")
    def _on_disk(self) -> CalibrationEntry:
        store.mark_used(self.path)
        if not self.path.is_file():
            raise ValueError(f"{self.path} is gone")
        return self


class _JsonEntry(_Entry):
    """A JSON file of the store, which is whole if it holds something under `holds`."""

    holds: ClassVar[str]
    digest: str
    path: Path

    @model_validator(mode="after")
    def _on_disk(self) -> Self:
        self.content(self.holds)
        return self

    def content(self, key: str) -> Any:
        """What the file holds under `key`; ValueError if that is gone or damaged."""
        found = store.entry(self.path, key)
        if found is None:
            raise ValueError(f"{self.path} is gone or damaged")
        return found


class ImportanceEntry(_JsonEntry):
    """Norms and second moments of one model on one calibration set, in the store."""

    holds: ClassVar[str] = measurements.NORMS
    ref: str
    calibration: str

    @model_validator(mode="after")
    def _with_moments(self) -> Self:
        if not measurements.is_whole(self.path):
            raise ValueError(f"{self.path} is gone or damaged")
        return self

    @property
    def norms(self) -> dict[str, float]:
        """Tensor name -> I(l,c); read from the disk at each call."""
        return dict(self.content(self.holds))

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        """Tensor name -> s, the mean of x_j^2; read from the disk at each call."""
        return measurements.read_moments(self.path)


class AllocationEntry(_JsonEntry):
    """Densities of all experts in the store, and those of the uniform baseline with the same means.

    Attributes:
        measured: expert -> the measurement whose activations its task vector is pruned by; empty if by magnitude.
        base: the base's measurements, if the merged delta is held back by them (`lewis.aim`).
    """

    holds: ClassVar[str] = "experts"
    means: dict[str, float]
    measured: dict[str, ImportanceEntry] = {}
    base: tuple[ImportanceEntry, ...] = ()

    def experts(self, which: str = "experts") -> dict[str, Allocation]:
        """Expert -> allocation; `which` is `experts` or `uniform`. Read from the disk at each call."""
        return {ref: Allocation(**fields) for ref, fields in self.content(which).items()}

    def scales(self) -> dict[str, Scales]:
        """Expert -> sqrt(s) of every covered tensor; empty if pruned by magnitude. Read from the disk at each call."""
        return {ref: {name: s.sqrt() for name, s in entry.moments.items()} for ref, entry in self.measured.items()}

    def held_back(self, omega: float) -> Scales:
        """Tensor name -> what its merged delta is multiplied with; s is the mean over the base's calibration sets."""
        sets = [entry.moments for entry in self.base]
        names = [name for name in (sets[0] if sets else ()) if all(name in moments for moments in sets)]
        return {name: aim(torch.stack([s[name] for s in sets]).mean(dim=0).sqrt(), omega) for name in names}


class MergedModel(_Entry):
    """A merged checkpoint in the store."""

    digest: str
    folder: Path

    @model_validator(mode="after")
    def _on_disk(self) -> MergedModel:
        if (store.read_manifest(self.folder) or {}).get("digest") != self.digest:
            raise ValueError(f"{self.folder} is gone, damaged or cut short")
        return self

    @property
    def key(self) -> str:
        """Identity of the content, as that of `ModelFiles`."""
        return self.digest

    def files(self, ref: str) -> ModelFiles:
        """As a model to score."""
        return ModelFiles.at(ref, self.digest, self.folder)


class ScoresEntry(_JsonEntry):
    """What lm-eval said of one model, in the store."""

    holds: ClassVar[str] = "results"
    ref: str

    @property
    def evaluated(self) -> Evaluated:
        """Scores and samples; read from the disk at each call."""
        self.content(self.holds)
        return Evaluated.of(self.ref, store.read_json(self.path) or {})

    @property
    def scores(self) -> list[Score]:
        """One per task and metric; read from the disk at each call."""
        return self.evaluated.scores


@dataclass(frozen=True)
class Source:
    """A model of the recipe, pinned: a full model, and an adapter on it if it is a LoRA expert."""

    ref: str
    model: Pinned
    adapter: Pinned | None = None

    @property
    def key(self) -> str:
        """Identity of the content."""
        return self.model.commit + (f"+{self.adapter.commit}" if self.adapter else "")

    @property
    def size(self) -> int:
        """Bytes to download, or on disk."""
        return self.model.size + (self.adapter.size if self.adapter else 0)
