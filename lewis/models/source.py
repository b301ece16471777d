"""The models of a recipe: pinned to commits (`Source`), then downloaded (`ModelFiles`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary, finalize

from pydantic import model_validator

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.models.broken import COMMIT
from lewis.models.checkpoint import Checkpoint
from lewis.models.files.folder import INDEX, weight_files
from lewis.models.files.safetensors_file import allow_many_open
from lewis.models.hub import repository
from lewis.models.hub.pin import Pinned, check_unchanged, find_folder
from lewis.models.lora.expert import LoraExpert, holds_adapter
from lewis.models.model import Model
from lewis.models.names import short_or_whole
from lewis.models.network.renamed import Matched, Renamed, differ, match, with_tied
from lewis.models.tokenizer import TOKENIZER
from lewis.recipe.block import parts_of
from lewis.recipe.config import MergeConfig
from lewis.store import kinds, manifest
from lewis.store.reference import Reference
from lewis.threads import ContextPool, cores


@dataclass(frozen=True)
class Source:
    """A pinned model of a recipe: a full model and, for a LoRA expert, the adapters on it.

    Attributes:
        ref: as in the recipe.
        model: the full model.
        adapter: the LoRA adapter, if there is one; of several, the last.
        under: the adapters that are put on the model before `adapter`, in order.
        like: the recipe's base or first expert, if this model is read by the tensor names of that one; else None.
    """

    ref: str
    model: Pinned
    adapter: Pinned | None = None
    under: tuple[Pinned, ...] = ()
    like: Pinned | None = None

    @property
    def adapters(self) -> tuple[Pinned, ...]:
        """All adapters, in the order in which they are put on the model."""
        return (*self.under, *((self.adapter,) if self.adapter else ()))

    @property
    def key(self) -> str:
        """Identity of the content: the commit of the model, and `+` that of each adapter."""
        return key_of(pinned.commit for pinned in (self.model, *self.adapters))

    @property
    def size(self) -> int:
        """Bytes of the files that a merge reads."""
        return sum(pinned.size for pinned in (self.model, *self.adapters))


class ModelFiles(Reference):
    """A reference to a model on disk, which Prefect passes between tasks and keeps in its cache of results.

    Attributes:
        ref: as in the recipe.
        key: identity of the content, as `Source.key`.
        folder: of the full model.
        adapter: folder of the LoRA adapter, if there is one; of several, the last.
        under: folders of the adapters that are put on the model before it, in order.
        like: folder of the model by whose tensor names it is read; None if it is read by its own.
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
        for folder in self.folders:  # those of merged models must have every file of their manifest
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
        """Make the reference to the files in these folders, with their present sizes."""
        folders = [folder, *under, *([adapter] if adapter else [])]
        sizes = {str(path): path.stat().st_size for place in folders for path in _files_of(place)}
        return cls(ref=ref, key=key, folder=folder, adapter=adapter, under=tuple(under), like=like, sizes=sizes)

    @property
    def folders(self) -> list[Path]:
        """The model's folder, then those of its adapters in the order in which they are put on it."""
        return [self.folder, *self.under, *([self.adapter] if self.adapter else [])]

    @property
    def tokenizer(self) -> Path:
        """The folder with the model's tokenizer: the last adapter's own, or the full model's."""
        return next((each for each in reversed(self.folders) if (each / TOKENIZER).is_file()), self.folder)

    @property
    def read_as(self) -> str:
        """Identity of what `open` returns: `key` and, if the tensors get another model's names, their digest."""
        return self.key if self.like is None else self.open().key

    def files(self, label: str) -> ModelFiles:
        """Return itself. A merged model has the same method, which returns its files for scoring."""
        return self

    def outline(self) -> tuple[Path, dict[str, tuple[int, ...]]]:
        """Return the folder with the model's config.json, and the shape of every tensor."""
        opened = self.open()
        return opened.home, dict(opened.shapes)

    def check(self) -> None:
        """Check folders in the store against their manifests: those of merged models, to be scored or merged again.

        Raises:
            LewisError: naming the file that is damaged.
        """
        for folder in self.folders:
            if store.holds(folder) and (folder / store.MANIFEST).is_file():
                try:
                    manifest.check(folder)
                except manifest.DamagedError as error:
                    raise LewisError(f"{folder}: {error}; run again to make it") from error

    def check_unchanged(self) -> None:
        """Check that local folders still have the content that they were pinned with, after they were used.

        Raises:
            LewisError: naming one that has changed meanwhile.
        """
        for folder, commit in zip(self.folders, commits_of(self.key), strict=False):
            if commit.startswith("sha256:"):
                check_unchanged(Pinned(self.ref, str(folder), commit, 0))

    def open(self) -> Model:
        """Open the model for reading.

        Files are opened, and their headers parsed, once in a process: each call returns what an earlier one for the
        same files opened, until a file changes on disk, or all `ModelFiles` that opened it and their models are gone.

        Raises:
            InputError: as `Checkpoint` and `LoraExpert` do.
        """
        allow_many_open()
        commits = commits_of(self.key)
        key = self.key if self.adapter is None else commits[0]
        identity: tuple[object, ...] = (key, _state(self.folder))
        model: Model = _once(identity, Checkpoint, self.folder, key)
        for number, folder in enumerate(self.folders[1:], 2):
            key = key_of(commits[:number])
            identity = (*identity, key, _state(folder))
            model = _once(identity, LoraExpert, model, folder, key)
        if self.like is None:
            self._keep(model)
            return model
        like = ("", _state(self.like))
        base: Model = _once(like, Checkpoint, self.like, "")
        identity = (*identity, "as", *like)
        # A `Renamed` model may hold a computed tensor in memory: only the match of names is kept, not that model.
        found = _once(identity, _matched, base, model)
        self._keep(model, base, found)
        if not isinstance(found, Matched):
            return model
        names = store.digest([version("transformers"), base.shapes])[:16]
        return _once((*identity, names), Renamed, model, found, f"{self.key} as {names}")

    def _keep(self, *opened: object) -> None:
        """Keep opened models in memory for as long as this reference exists."""
        if id(self) not in _KEPT:
            finalize(self, _KEPT.pop, id(self), None)
        _KEPT[id(self)] = opened


_T = TypeVar("_T")
_OPENED: WeakValueDictionary[tuple[object, ...], Any] = WeakValueDictionary()  # identity -> open model or match
_KEPT: dict[int, tuple[object, ...]] = {}  # id of a `ModelFiles` -> the models that it keeps open


def _once(identity: tuple[object, ...], make: Callable[..., _T], *arguments: Any) -> _T:
    """Return the object that this process made for an identity, if it is still in use; else make it."""
    found: _T | None = _OPENED.get(identity)
    if found is None:  # two threads may both come here: the second then takes what the first has made
        made = make(*arguments)
        found = _OPENED.setdefault(identity, made)
    return found


def _matched(base: Model, model: Model) -> Matched | Model:
    """Return how a model is read under the base's tensor names; the model itself if nothing is renamed."""
    return match(base.home, with_tied(base), with_tied(model)) or model


def _state(folder: Path) -> tuple[object, ...]:
    """Return a folder's path, and name, inode, size and modification time of each of its weight files and configs."""
    stats = [(path.name, path.stat()) for path in _files_of(folder)]
    return str(folder), *((name, each.st_ino, each.st_size, each.st_mtime_ns) for name, each in stats)


def _files_of(folder: Path) -> list[Path]:
    paths = (path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".gguf", ".json"))
    return [path for path in paths if path.is_file()]


def commits_of(key: str) -> tuple[str, ...]:
    """Split a `Source.key` into commits: the model's, then that of each adapter on it.

    Args:
        key: of a `Source` or `ModelFiles`; the digest of a merge, which is no commit, is the only item returned.
    """
    return tuple(key.split("+"))


def key_of(commits: Iterable[str]) -> str:
    """Join the commits of a model and of the adapters on it, in order, to the key that `commits_of` splits."""
    return "+".join(commits)


def pin(ref: str, root: Path, base: Source | None = None, first: Source | None = None) -> Source:
    """Pin a model reference to commits: `model`, `model+adapter` (or several), or an adapter of `base`.

    Args:
        ref: as in a recipe.
        root: where relative folders start (the recipe's folder).
        base: the recipe's base; an adapter that is given without a base is put on it.
        first: the model by whose tensor names this one is read; by default the base.

    Raises:
        InputError: if it does not exist, or is an adapter and there is no base.
        TransientError: if the Hub cannot be asked right now.
    """
    of_names = first or base
    named = of_names.model if of_names else None
    model, *adapters = parts_of(ref, root)
    if "" in (model, *adapters):
        raise InputError(f"{ref}: expected model+adapter, got a '+' with nothing before or after it")
    pinned = repository.resolve(model, root)
    if adapters or not holds_adapter(repository.file_names(pinned)):
        put = [repository.resolve(each, root) for each in adapters]
        like = named if named and named.commit != pinned.commit else None
        return Source(ref, pinned, put[-1] if put else None, tuple(put[:-1]), like)
    if base is None:
        raise InputError(f"{ref}: a LoRA adapter needs its base: set base_model, or write base+adapter")
    if base.adapter is not None:
        raise InputError(f"{ref}: a LoRA adapter on a base that is one itself ({base.ref}); merge the base's first")
    return Source(ref, base.model, pinned)


def pin_at(ref: str, key: str, root: Path, base: Source | None = None, first: Source | None = None) -> Source:
    """Pin a model reference to the content that it had when the run began, perhaps on another machine.

    Args:
        ref: as in a recipe.
        key: the `Source.key` that it had.
        root: where relative folders start (the recipe's folder).
        base: the recipe's base; an adapter that is given without a base is put on it.
        first: as for `pin`.

    Raises:
        InputError: if this machine has another content under this reference, such as in a folder of the same name.
        TransientError: if the Hub cannot be asked right now.
    """
    parts = parts_of(ref, root)
    fixed = [
        f"{part.partition('@')[0]}@{commit}" if COMMIT.fullmatch(commit) and not find_folder(part, root) else part
        for part, commit in zip(reversed(parts), reversed(commits_of(key)), strict=False)
    ]
    found = replace(pin("+".join(reversed(fixed)), root, base, first), ref=ref)
    if found.key != key or len(fixed) < len(parts):
        raise InputError(f"{ref}: expected {key}, as where the run began, but on this machine it is {found.key}")
    return found


def pin_all(config: MergeConfig) -> tuple[Source | None, list[Source]]:
    """Pin the base (None if there is none) and the experts, in their order.

    Experts are pinned in parallel: hashing the files of new folders takes longer than merging them.
    """
    base = pin(config.base_model, config.root) if config.base_model else None
    refs = [entry.model for entry in config.experts]
    first = None if base else pin(refs[0], config.root)
    with ContextPool(cores()) as pool:
        return base, list(pool.map(lambda ref: pin(ref, config.root, base, first), refs))


def download(source: Source) -> ModelFiles:
    """Download and verify a pinned model.

    Raises:
        TransientError: if the transfer broke; trying again can help.
        BrokenModelError: if the Hub has other bytes than it lists, or an index of files that are not there.
    """
    put = [repository.fetch(each) for each in source.adapters]
    folder, like = repository.fetch(source.model), None
    with repository.blaming(source.model, INDEX):
        weight_files(folder)
    if source.like and differ(*map(repository.tensor_shapes, (source.like, source.model))):
        like = repository.folder_of(source.like)
    return ModelFiles.at(source.ref, source.key, folder, put[-1] if put else None, put[:-1], like)


def short_name(ref: str, root: Path) -> str:
    """The last part of a reference without its owner, folder and revision: `math` of `org/base+org/math@main`."""
    return parts_of(ref, root)[-1].partition("@")[0].rstrip("/").rpartition("/")[2]


def short_names(refs: Sequence[str], root: Path) -> list[str]:
    """What to call experts in tables: their `short_name`, or the whole reference where that would be ambiguous."""
    roles = ("base", "uniform", "merged", "champion", "mark")  # the names of the other rows
    names = short_or_whole([short_name(ref, root) for ref in refs], refs, taken=roles)
    return [f"./{name}" if name in roles else name for name in names]
