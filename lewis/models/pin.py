"""A model pinned to its exact content, which of its files count, and pinning a local folder."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lewis import store
from lewis.errors import InputError, LewisError
from lewis.store.checksums import remembered_sha256

FORMS = "expected 'org/name', 'org/name@revision' or a local folder"

Headers = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> safetensors dtype ("BF16"), shape

_NEEDED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Pinned:
    """A model whose content can no longer move.

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
        return self.commit.startswith("sha256:")


def needed(names: Iterable[str]) -> list[str]:
    """The files a merge reads, sorted: weights, configs and tokenizer, of the top level only."""
    found = [n for n in names if "/" not in n and n != store.MANIFEST and any(fnmatch(n, p) for p in _NEEDED)]
    # Mistral's repos hold the same weights once more as consolidated*.safetensors.
    copies = [n for n in found if fnmatch(n, "consolidated*.safetensors")]
    has_others = any(n.endswith(".safetensors") and n not in copies for n in found)
    return sorted(n for n in found if not (has_others and n in copies))


def check_weights(ref: str, names: Iterable[str]) -> None:
    """Raise InputError unless a model has safetensors weights, or an index that tells what is missing."""
    names = sorted(names)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in needed(names)):
        return
    refuse_pickled(ref, names)
    raise InputError(f"{ref}: no *.safetensors in it; expected a model or a LoRA adapter in the Hugging Face layout")


def refuse_pickled(ref: str, names: Iterable[str]) -> None:
    """Raise InputError if there are pickled weights among the files of a model that has no others."""
    pickled = next((name for name in sorted(names) if name.endswith(_PICKLED)), None)
    if pickled:
        raise InputError(
            f"{ref}: only pickled weights ({pickled}), which can run code when loaded: expected *.safetensors; "
            "convert them with save_pretrained, or at https://huggingface.co/spaces/safetensors/convert"
        )


def find_folder(ref: str, root: Path) -> Path | None:
    """The folder that a reference means, or None if it means a Hub repo.

    Raises:
        InputError: it can only mean a folder, and there is none.
    """
    if not ref.strip():
        raise InputError(f"empty model reference; {FORMS}")
    try:
        path = Path(ref).expanduser()
        places = list(dict.fromkeys(place.absolute() / path for place in (root, Path.cwd())))
        for place in places:
            if place.is_dir():
                return place.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: "~nobody"
        raise InputError(f"{ref}: cannot look it up as a folder: {error}; {FORMS}") from error
    if ref.startswith((".", "/", "~")):
        raise InputError(f"{ref}: no such folder; looked at {' and '.join(map(str, places))}; {FORMS}")
    return None


def pin_folder(ref: str, folder: Path) -> Pinned:
    """Pin a local folder to the checksums of its files.

    Raises:
        InputError: it cannot be read, or holds no safetensors weights.
    """
    try:
        names = [path.name for path in folder.iterdir() if not path.is_dir()]
        check_weights(ref, names)
        files = [(name, (folder / name).stat().st_size, remembered_sha256(folder / name)) for name in needed(names)]
    except OSError as error:
        raise InputError(f"{ref}: cannot read {error.filename or folder}: {error.strerror}") from error
    return Pinned(ref, str(folder), f"sha256:{store.digest(files)}", sum(size for _, size, _ in files))


def check_unchanged(pinned: Pinned) -> Path:
    """The folder of a pinned local model; LewisError if its content is no longer what was pinned."""
    folder = Path(pinned.source)
    try:
        now = pin_folder(pinned.ref, folder).commit
    except InputError as error:
        raise LewisError(f"{pinned.ref}: {folder} changed while running ({error}); run again") from error
    if now != pinned.commit:
        raise LewisError(f"{pinned.ref}: {folder} changed while running: was {pinned.commit}, is {now}; run again")
    return folder


def file_headers(path: Path) -> Headers:
    """Name, dtype and shape of each tensor in a safetensors file; InputError if it is damaged."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (tensor.get_dtype(), tuple(tensor.get_shape())) for key, tensor in slices.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}); copy or download it again") from error
