"""The models of a recipe: pinned to commits (`Source`), then downloaded (`ModelFiles`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import model_validator

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.models import hub
from lewis.models.checkpoint import Checkpoint
from lewis.models.lora import LoraExpert, is_adapter
from lewis.models.model import Model
from lewis.models.names import short_or_whole
from lewis.models.pin import Pinned
from lewis.recipe.recipe import Recipe
from lewis.store import kinds, manifest
from lewis.store.reference import Reference
from lewis.threads import ContextPool


@dataclass(frozen=True)
class Source:
    """A pinned model of a recipe: a full model and, for a LoRA expert, the adapter on it.

    Attributes:
        ref: as in the recipe.
        model: the full model.
        adapter: the LoRA adapter, if there is one.
    """

    ref: str
    model: Pinned
    adapter: Pinned | None = None

    @property
    def key(self) -> str:
        """Identity of the content: the commit of the model, and `+` that of the adapter."""
        return self.model.commit + (f"+{self.adapter.commit}" if self.adapter else "")

    @property
    def size(self) -> int:
        """Bytes of the files that a merge reads."""
        return self.model.size + (self.adapter.size if self.adapter else 0)


class ModelFiles(Reference):
    """A model on disk. Prefect passes it between tasks, and keeps it in its cache of results.

    Attributes:
        ref: as in the recipe.
        key: identity of the content, as `Source.key`.
        folder: of the full model.
        adapter: folder of the LoRA adapter, if there is one.
        sizes: file -> bytes. They are compared with the disk whenever a `ModelFiles` is loaded.
    """

    ref: str
    key: str
    folder: Path
    adapter: Path | None = None
    sizes: dict[str, int]

    @model_validator(mode="after")
    def _on_disk(self) -> ModelFiles:
        for folder in (self.folder, self.adapter):  # a merged model, to be scored or merged again
            if folder and folder.parent == kinds.MERGED.folder and store.read_manifest(folder) is None:
                raise ValueError(f"{folder} is gone or damaged")
        for name, size in self.sizes.items():
            if not os.path.isfile(name) or os.path.getsize(name) != size:
                raise ValueError(f"{name} is gone or was cut short")
        return self

    @classmethod
    def at(cls, ref: str, key: str, folder: Path, adapter: Path | None = None) -> ModelFiles:
        """The files of these folders, with the sizes that they have now."""
        paths = [p for place in (folder, adapter) if place for p in sorted(place.glob("*")) if p.is_file()]
        sizes = {str(p): p.stat().st_size for p in paths if p.suffix in (".safetensors", ".json")}
        return cls(ref=ref, key=key, folder=folder, adapter=adapter, sizes=sizes)

    def check(self) -> None:
        """Check the content of a folder in the store that has a manifest: a merged model, to be scored or merged again.

        Raises:
            LewisError: naming the file that is damaged.
        """
        for folder in (self.folder, self.adapter):
            if folder and store.holds(folder) and (folder / store.MANIFEST).is_file():
                try:
                    manifest.check(folder)
                except manifest.DamagedError as error:
                    raise LewisError(f"{folder}: {error}; run again, which makes it anew") from error

    def open(self) -> Model:
        """Open the model for reading.

        Raises:
            InputError: as `Checkpoint` and `LoraExpert` do.
        """
        if self.adapter is None:
            return Checkpoint(self.folder, self.key)
        return LoraExpert(Checkpoint(self.folder, self.key.partition("+")[0]), self.adapter, self.key)


def split_adapter(ref: str, root: Path | None = None) -> tuple[str, str | None]:
    """`model+adapter` as its two parts; any other reference, and None.

    Args:
        ref: a reference to a model.
        root: where relative folders start. A folder that exists may have a `+` in its name; without `root` no folder is
            looked for, and the last `+` separates the parts.
    """
    if "+" not in ref or (root is not None and any(map(os.path.exists, (root / ref, Path(ref))))):
        return ref, None
    model, _, adapter = ref.rpartition("+")
    return model, adapter


def pin(ref: str, root: Path, base: Source | None = None) -> Source:
    """Pin a model reference to commits: `model`, `model+adapter`, or an adapter of `base`.

    Args:
        ref: as in a recipe.
        root: where relative folders start (the recipe's folder).
        base: of the recipe, which an adapter without a base of its own is for.

    Raises:
        InputError: if it does not exist, or is an adapter and there is no base.
        TransientError: if the Hub cannot be asked right now.
    """
    model, adapter = split_adapter(ref, root)
    if adapter is not None:
        return Source(ref, hub.resolve(model, root), hub.resolve(adapter, root))
    pinned = hub.resolve(ref, root)
    if not is_adapter(hub.fetch(pinned, weights=False)):
        return Source(ref, pinned)
    if base is None:
        raise InputError(f"{ref}: a LoRA adapter needs its base: set base_model, or write base+adapter")
    if base.adapter is not None:
        raise InputError(f"{ref}: a LoRA adapter on a base that is one itself ({base.ref}); merge the base's first")
    return Source(ref, base.model, pinned)


def pin_all(recipe: Recipe) -> tuple[Source | None, list[Source]]:
    """Pin the base (None if the recipe has none) and the experts, in the recipe's order.

    Experts are pinned in parallel: hashing the files of new folders takes longer than merging them.
    """
    base = pin(recipe.base_model, recipe.root) if recipe.base_model else None
    with ContextPool(len(os.sched_getaffinity(0))) as pool:
        return base, list(pool.map(lambda entry: pin(entry.model, recipe.root, base), recipe.experts))


def download(source: Source) -> ModelFiles:
    """Download and verify a pinned model.

    Raises:
        TransientError: if the transfer broke; trying again can help.
    """
    adapter = hub.fetch(source.adapter) if source.adapter else None
    return ModelFiles.at(source.ref, source.key, hub.fetch(source.model), adapter)


def short_names(refs: Sequence[str]) -> list[str]:
    """What to call experts in tables: the last part of each reference, or all of it where that would be ambiguous."""
    parts = [split_adapter(ref) for ref in refs]
    last = [(adapter or model).partition("@")[0].rstrip("/").rpartition("/")[2] for model, adapter in parts]
    return short_or_whole(last, refs, taken=("base", "uniform", "lewis", "merged", "champion"))
