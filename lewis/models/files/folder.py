"""Which files of a model folder count: weights, configs and tokenizer."""

import os
import shutil
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path

from lewis import store
from lewis.errors import InputError
from lewis.input_files import check_regular, read_json
from lewis.models.names import unwrapped

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
GGUF_TABLE = "gguf.json"  # in a folder that `gguf.as_folder` made: the table of the GGUF file's tensors
GGUF_LINK = "model.gguf"  # in such a folder: a link to the GGUF file
_DONATED = (  # tokenizer, chat template and generation_config
    *("generation_config.json", "*.jinja", "chat_template.json", "tokenizer*", "*.model", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "tekken.json", "*.tiktoken", "normalizer.json"),
    (_TEMPLATES := "additional_chat_templates/*.jinja"),  # those that are used by their names
)
_PROCESSORS = "*processor_config.json"  # how images, sound and video become a model's input
_NEEDED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def needed(names: Iterable[str]) -> list[str]:
    """The files that a merge reads, sorted: weights, configs and tokenizer. Of subfolders, only chat templates count.

    GGUF files count where there are no safetensors.
    """
    names = [n for n in names if ("/" not in n or fnmatch(n, _TEMPLATES)) and n != store.MANIFEST]
    found = [n for n in names if any(fnmatch(n, p) for p in _NEEDED)]
    if not any(".safetensors" in n for n in found):
        found += [n for n in names if n.endswith(".gguf")]
    # Mistral's repos hold the same weights a second time, as consolidated*.safetensors.
    copies = [n for n in found if fnmatch(n, "consolidated*.safetensors")]
    has_others = any(n.endswith(".safetensors") and n not in copies for n in found)
    return sorted(n for n in found if not (has_others and n in copies))


def check_weights(ref: str, names: Iterable[str]) -> None:
    """Check that a model has safetensors weights, or an index that says which are missing.

    Raises:
        InputError: if it has neither.
    """
    names = sorted(names)
    if any(name.endswith((".safetensors", ".safetensors.index.json", ".gguf")) for name in needed(names)):
        return
    _refuse_pickled(ref, names)
    raise InputError(f"{ref}: no *.safetensors in it; expected a model or a LoRA adapter in the Hugging Face layout")


def _refuse_pickled(ref: str, names: Iterable[str]) -> None:
    """Raise InputError if one of the files of a model without safetensors weights is pickled."""
    pickled = next((name for name in sorted(names) if name.endswith(_PICKLED)), None)
    if pickled:
        raise InputError(
            f"{ref}: only pickled weights ({pickled}), which can run code when loaded: expected *.safetensors; "
            "convert them with save_pretrained, or at https://huggingface.co/spaces/safetensors/convert"
        )


def weight_files(folder: Path, listed: Collection[str] = ()) -> dict[str, set[str] | None]:
    """Find the safetensors files of a model folder, and check its index.

    Args:
        folder: of the model.
        listed: names of further files of the model, which are not downloaded yet.

    Returns:
        File name -> the tensors that the index places in it, by their `names.unwrapped` names; None: all that the file
        holds. Empty for a folder that was made for a GGUF file.

    Raises:
        InputError: if there are none, or only pickled ones, or if the index names a file that is missing or in another
            folder, or one tensor in two files.
    """
    if is_of_gguf(folder):
        return {}
    check_regular(folder / SINGLE)
    if SINGLE in listed or (folder / SINGLE).is_file():
        return {SINGLE: None}
    index = folder / INDEX
    check_regular(index)
    if not index.is_file():
        _refuse_pickled(str(folder), [path.name for path in folder.glob("*")])
        raise InputError(f"{folder}: no weights; expected {SINGLE} or {INDEX}")
    try:
        weight_map = {str(name): str(file) for name, file in read_json(index)["weight_map"].items()}
    except OSError as error:
        raise InputError(f"{index}: cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, InputError) as error:
        reason = error if isinstance(error, InputError) else repr(error)
        raise InputError(f"{index}: expected JSON with a weight_map from tensor to file: {reason}") from error
    placed: dict[str, set[str]] = {file: set() for file in weight_map.values()}
    for file in placed:
        if Path(file).name != file or file in ("", ".", ".."):
            raise InputError(f"{index}: {file!r} is not a plain file name; an index must not lead out of its folder")
        check_regular(folder / file)
        if file not in listed and not os.path.isfile(folder / file):  # also False for a name that is too long
            raise InputError(f"{folder}: the shard {file} is missing, which {INDEX} names; download it again")
    places: dict[str, str] = {}
    for name, file in weight_map.items():
        placed[file].add(called := unwrapped(name))
        if places.setdefault(called, file) != file:
            raise InputError(f"{index}: two of its tensors are {called!r}, one with a wrapper's prefix; keep one")
    return {**placed}


def is_of_gguf(folder: Path) -> bool:
    """Whether `gguf.as_folder` made a folder for a GGUF file."""
    return (folder / GGUF_TABLE).is_file()


def copy_tokenizer(donor: Path, folder: Path) -> None:
    """Copy tokenizer, chat template and generation_config of `donor`, byte by byte."""
    for path in tokenizer_files(donor):
        target = folder / path.relative_to(donor)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def tokenizer_files(donor: Path) -> list[Path]:
    """The files of `donor` that `copy_tokenizer` copies, sorted."""
    return sorted({path for pattern in _DONATED for path in donor.glob(pattern) if path.is_file()})


def copy_processors(base: Path, folder: Path) -> None:
    """Copy the configs of the processors of images, sound and video of `base`, byte by byte."""
    for path in processor_files(base):
        shutil.copyfile(path, folder / path.name)


def processor_files(base: Path) -> list[Path]:
    """The files of `base` that `copy_processors` copies, sorted."""
    return sorted(path for path in base.glob(_PROCESSORS) if path.is_file())
