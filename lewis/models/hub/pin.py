"""A model pinned to its exact content. Find, pin and check a local folder."""

from dataclasses import dataclass
from pathlib import Path

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.input_files import check_regular
from lewis.models.files.folder import check_weights, needed
from lewis.store.manifest import remembered_sha256

FORMS = "expected 'org/name', 'org/name@revision' or a local folder (or a GGUF file)"


@dataclass(frozen=True)
class Pinned:
    """A model whose exact content is known.

    Attributes:
        ref: as the recipe wrote it.
        source: `org/name`, or the absolute path of a local folder.
        commit: 40 hex digits of a Hub commit, or `sha256:` and 64 hex digits of a folder's content.
        size: bytes of its weights, configs and tokenizer.
    """

    ref: str
    source: str
    commit: str
    size: int

    @property
    def is_local(self) -> bool:
        """Whether it is a local folder, not a Hub repo."""
        return self.commit.startswith("sha256:")


def find_folder(ref: str, root: Path) -> Path | None:
    """Return the folder or GGUF file that a reference stands for; None if it stands for a Hub repo.

    Args:
        ref: as in a recipe.
        root: where a relative folder is looked for first (the recipe's folder); then comes the working directory.

    Raises:
        InputError: if it can only mean a folder, and there is none.
    """
    if not ref.strip():
        raise InputError(f"empty model reference; {FORMS}")
    try:
        path = Path(ref).expanduser()
        places = list(dict.fromkeys(place.absolute() / path for place in (root, Path.cwd())))
        for place in places:
            if place.is_dir() or (place.suffix == ".gguf" and place.is_file()):
                return place.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: "~nobody"
        raise InputError(f"{ref}: cannot look it up as a folder: {error}; {FORMS}") from error
    if ref.startswith((".", "/", "~")):
        raise InputError(f"{ref}: no such folder; looked at {' and '.join(map(str, places))}; {FORMS}")
    return None


def pin_folder(ref: str, folder: Path) -> Pinned:
    """Pin a local folder to the checksums of its files.

    Raises:
        InputError: if it cannot be read, holds no safetensors weights, or something that is no regular file.
    """
    try:
        found = (*folder.iterdir(), *folder.glob("additional_chat_templates/*"))
        paths = [path for path in found if not path.is_dir()]
        for path in paths:
            check_regular(path)  # transformers, which is given the folder, would wait for a FIFO
        names = [path.relative_to(folder).as_posix() for path in paths]
        check_weights(ref, names)
        files = [(name, (folder / name).stat().st_size, remembered_sha256(folder / name)) for name in needed(names)]
    except OSError as error:
        raise InputError(f"{ref}: cannot read {error.filename or folder}: {error.strerror}") from error
    return Pinned(ref, str(folder), f"sha256:{store.digest(files)}", sum(size for _, size, _ in files))


def check_unchanged(pinned: Pinned) -> Path:
    """Check that a pinned local model is unchanged, and return its folder.

    Raises:
        LewisError: if its content is no longer what was pinned.
    """
    folder = Path(pinned.source)
    try:
        now = pin_folder(pinned.ref, folder).commit
    except InputError as error:
        raise LewisError(f"{pinned.ref}: {folder} changed while running ({error}); run again") from error
    if now != pinned.commit:
        raise LewisError(f"{pinned.ref}: {folder} changed while running: was {pinned.commit}, is {now}; run again")
    return folder
