"""The models of a recipe: pinned to commits (`Source`), then downloaded (`ModelFiles`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from pydantic import model_validator

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.models import hub
from lewis.models.checkpoint import Checkpoint
from lewis.models.listing import COMMIT
from lewis.models.lora import LoraExpert, holds_adapter
from lewis.models.model import Model
from lewis.models.names import short_or_whole
from lewis.models.pin import Pinned, find_folder
from lewis.models.renamed import differ, under_names_of
from lewis.recipe.recipe import Recipe
from lewis.store import kinds, manifest
from lewis.store.reference import Reference
from lewis.threads import ContextPool


@dataclass(frozen=True)
class Source:
    """A pinned model of a recipe: a full model and, for a LoRA expert, the adapters on it.

    Attributes:
        ref: as in the recipe.
        model: the full model.
        adapter: the LoRA adapter, if there is one; of several, the last.
        under: the adapters that are put on the model before `adapter`, in order.
        like: the full model under whose names this one is read, if that is another: the recipe's base.
    """

    ref: str
    model: Pinned
    adapter: Pinned | None = None
    under: tuple[Pinned, ...] = ()
    like: Pinned | None = None

    @property
    def adapters(self) -> tuple[Pinned, ...]:
        """All adapters, in the order that they are put on the model."""
        return (*self.under, *((self.adapter,) if self.adapter else ()))

    @property
    def key(self) -> str:
        """Identity of the content: the commit of the model, and `+` that of each adapter."""
        return "+".join(pinned.commit for pinned in (self.model, *self.adapters))

    @property
    def size(self) -> int:
        """Bytes of the files that a merge reads."""
        return sum(pinned.size for pinned in (self.model, *self.adapters))


class ModelFiles(Reference):
    """A model on disk. Prefect passes it between tasks, and keeps it in its cache of results.

    Attributes:
        ref: as in the recipe.
        key: identity of the content, as `Source.key`.
        folder: of the full model.
        adapter: folder of the LoRA adapter, if there is one; of several, the last.
        under: folders of the adapters that are put on the model before it, in order.
        like: folder of the model under whose names it is read; None: it has these names.
        sizes: file -> bytes. They are compared with the disk whenever a `ModelFiles` is loaded.
    """

    ref: str
    key: str
    folder: Path
    adapter: Path | None = None
    under: tuple[Path, ...] = ()
    like: Path | None = None
    sizes: dict[str, int]

    @model_validator(mode="after")
    def _on_disk(self) -> ModelFiles:
        for folder in self.folders:  # a merged model, to be scored or merged again
            if folder.parent == kinds.MERGED.folder and store.read_manifest(folder) is None:
                raise ValueError(f"{folder} is gone or damaged")
        for name, size in self.sizes.items():
            if not os.path.isfile(name) or os.path.getsize(name) != size:
                raise ValueError(f"{name} is gone or was cut short")
        return self

    @classmethod
    def at(
        cls,
        ref: str,
        key: str,
        folder: Path,
        adapter: Path | None = None,
        under: Sequence[Path] = (),
        like: Path | None = None,
    ) -> ModelFiles:
        """The files of these folders, with the sizes that they have now."""
        folders = [folder, *under, *([adapter] if adapter else [])]
        paths = [p for place in folders for p in sorted(place.glob("*")) if p.is_file()]
        sizes = {str(p): p.stat().st_size for p in paths if p.suffix in (".safetensors", ".gguf", ".json")}
        return cls(ref=ref, key=key, folder=folder, adapter=adapter, under=tuple(under), like=like, sizes=sizes)

    @property
    def folders(self) -> list[Path]:
        """The model's folder, then those of its adapters in the order that they are put on it."""
        return [self.folder, *self.under, *([self.adapter] if self.adapter else [])]

    @property
    def read_as(self) -> str:
        """Identity of what `open` reads: the key, and whose names it is read under if these are another model's."""
        return self.key if self.like is None else self.open().key

    def files(self, label: str) -> ModelFiles:
        """Itself, as a merged model gives the files to score."""
        return self

    def outline(self) -> tuple[Path, dict[str, tuple[int, ...]]]:
        """The folder with its config, and the shape of every tensor."""
        opened = self.open()
        return opened.home, dict(opened.shapes)

    def check(self) -> None:
        """Check the content of a folder in the store that has a manifest: a merged model, to be scored or merged again.

        Raises:
            LewisError: naming the file that is damaged.
        """
        for folder in self.folders:
            if store.holds(folder) and (folder / store.MANIFEST).is_file():
                try:
                    manifest.check(folder)
                except manifest.DamagedError as error:
                    raise LewisError(f"{folder}: {error}; run again, which makes it anew") from error

    def open(self) -> Model:
        """Open the model for reading.

        Raises:
            InputError: as `Checkpoint` and `LoraExpert` do.
        """
        commit, *others = self.key.split("+")
        model: Model = Checkpoint(self.folder, self.key if self.adapter is None else commit)
        for number, folder in enumerate(self.folders[1:], 1):
            model = LoraExpert(model, folder, "+".join([commit, *others[:number]]))
        if self.like is None:
            return model
        base = Checkpoint(self.like, "")
        names = store.digest([version("transformers"), base.shapes])[:16]
        return under_names_of(base, model, f"{self.key} as {names}")


def parts_of(ref: str, root: Path | None = None) -> tuple[str, ...]:
    """`model+adapter+adapter` as its parts; any other reference by itself.

    Args:
        ref: a reference to a model.
        root: where relative folders start. A folder that exists may have a `+` in its name; without `root` no folder is
            looked for, and every `+` separates two parts.
    """
    adapters = list[str]()
    while "+" in ref and (root is None or not any(map(os.path.exists, (root / ref, Path(ref))))):
        ref, _, adapter = ref.rpartition("+")
        adapters.insert(0, adapter)
    return ref, *adapters


def pin(ref: str, root: Path, base: Source | None = None, first: Source | None = None) -> Source:
    """Pin a model reference to commits: `model`, `model+adapter` (or several), or an adapter of `base`.

    Args:
        ref: as in a recipe.
        root: where relative folders start (the recipe's folder).
        base: of the recipe, which an adapter without a base of its own is for.
        first: the model under whose names this one is read; by default the base.

    Raises:
        InputError: if it does not exist, or is an adapter and there is no base.
        TransientError: if the Hub cannot be asked right now.
    """
    of_names = first or base
    named = of_names.model if of_names else None
    model, *adapters = parts_of(ref, root)
    pinned = hub.resolve(model, root)
    if adapters or not holds_adapter(hub.file_names(pinned)):
        put = [hub.resolve(each, root) for each in adapters]
        like = named if named and named.commit != pinned.commit else None
        return Source(ref, pinned, put[-1] if put else None, tuple(put[:-1]), like)
    if base is None:
        raise InputError(f"{ref}: a LoRA adapter needs its base: set base_model, or write base+adapter")
    if base.adapter is not None:
        raise InputError(f"{ref}: a LoRA adapter on a base that is one itself ({base.ref}); merge the base's first")
    return Source(ref, base.model, pinned)


def pin_at(ref: str, key: str, root: Path, base: Source | None = None) -> Source:
    """Pin a model reference to the content that it had elsewhere, as another machine has pinned it.

    Args:
        ref: as in a recipe.
        key: the `Source.key` of that machine.
        root: where relative folders start (the recipe's folder).
        base: of the recipe, which an adapter without a base of its own is for.

    Raises:
        InputError: if this machine has another content under this reference, such as in a folder of the same name.
        TransientError: if the Hub cannot be asked right now.
    """
    parts = parts_of(ref, root)
    fixed = [
        f"{part.partition('@')[0]}@{commit}" if COMMIT.fullmatch(commit) and not find_folder(part, root) else part
        for part, commit in zip(reversed(parts), reversed(key.split("+")), strict=False)
    ]
    found = replace(pin("+".join(reversed(fixed)), root, base), ref=ref)
    if found.key != key or len(fixed) < len(parts):
        raise InputError(f"{ref}: expected {key}, as where the run began, but on this machine it is {found.key}")
    return found


def pin_all(recipe: Recipe) -> tuple[Source | None, list[Source]]:
    """Pin the base (None if the recipe has none) and the experts, in the recipe's order.

    Experts are pinned in parallel: hashing the files of new folders takes longer than merging them.
    """
    base = pin(recipe.base_model, recipe.root) if recipe.base_model else None
    refs = [entry.model for entry in recipe.experts]
    first = None if base else pin(refs[0], recipe.root)
    with ContextPool(len(os.sched_getaffinity(0))) as pool:
        return base, list(pool.map(lambda ref: pin(ref, recipe.root, base, first), refs))


def download(source: Source) -> ModelFiles:
    """Download and verify a pinned model.

    Raises:
        TransientError: if the transfer broke; trying again can help.
    """
    put = [hub.fetch(each) for each in source.adapters]
    folder, like = hub.fetch(source.model), None
    if source.like and differ(*(_shapes(each) for each in (source.like, source.model))):
        like = hub.folder_of(source.like)
    return ModelFiles.at(source.ref, source.key, folder, put[-1] if put else None, put[:-1], like)


def _shapes(pinned: Pinned) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, (_, shape) in hub.tensor_headers(pinned).items()}


def short_names(refs: Sequence[str]) -> list[str]:
    """What to call experts in tables: the last part of each reference, or all of it where that would be ambiguous."""
    last = [parts_of(ref)[-1].partition("@")[0].rstrip("/").rpartition("/")[2] for ref in refs]
    return short_or_whole(last, refs, taken=("base", "uniform", "lewis", "merged", "champion"))
