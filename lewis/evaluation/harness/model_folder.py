"""Provide a model as a folder that lm-eval can load on any machine: with at most one adapter, and not quantised."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from lewis import store
from lewis.errors import InputError
from lewis.evaluation.harness.lm_eval import EvalSettings
from lewis.evaluation.statistics.scored import MERGED
from lewis.input_files import read_json
from lewis.models.chat_template import template_in
from lewis.models.config import own_code, write_config
from lewis.models.dtypes import size_of, torch_dtype
from lewis.models.files.folder import copy_processors, copy_tokenizer, tokenizer_files
from lewis.models.files.writer import CheckpointWriter
from lewis.models.lora.expert import LoraExpert
from lewis.models.model import Model
from lewis.models.quantised.find import is_quantised
from lewis.models.source import ModelFiles
from lewis.models.tokenizer import tokenizer_folder

_SHARD = 5 * 10**9  # bytes
_NO_TOKENIZER = {"generation_config.json", "chat_template.json", "special_tokens_map.json", "added_tokens.json"}
_TEKKEN = "tekken.json"  # a tokenizer of Mistral's, which formats chats without a template


@contextmanager
def loadable(files: ModelFiles, *, whole: bool = False) -> Iterator[tuple[Path, Path | None]]:
    """The folder of a full model, and the folder of an adapter on it or None.

    They are the model's own folders, unless transformers may not load these: if there are several adapters, if an
    adapter saves an embedding whole that is tied to the head (PEFT and transformers do not agree on it), or if the
    model is quantised (which may need other packages or a GPU). Then a full model is written to the store for as long
    as the context lasts: computed weights in fp32, or in their dtype before quantisation if there is no adapter.

    Args:
        files: of the model.
        whole: write a full model also for one adapter: servers take only some adapters, of some ranks.

    Raises:
        InputError: if there is no space for the full model.
    """
    quantised = is_quantised(files.folder)
    if not (files.under or quantised or (files.adapter and whole) or _unties(files)):
        yield files.folder, files.adapter
        return
    model = files.model_copy(update={"like": None}).open()  # under its own tensor names, which transformers expects
    as_before = quantised and not files.adapter
    layout = {name: (_dtype(model, name, as_before), info.shape) for name, info in model.tensors.items()}
    store.check_space(store.home(), sum(size_of(dtype, shape) for dtype, shape in layout.values()) + 10**7)
    folder = store.beside(store.make_folder(store.home()) / "scored")  # the next run removes what a killed one left
    folder.mkdir(mode=0o700)
    try:
        with CheckpointWriter(folder, layout, _SHARD) as writer:
            for name in writer.names:
                writer.write(name, model.read(name).to(torch_dtype(layout[name][0])))
                writer.finish(name)
        write_config(model.config, model.home, folder, None)
        copy_processors(model.home, folder)  # without which servers start no model of images or sound
        copy_tokenizer(tokenizer_folder(model), folder)
        yield folder, None
    finally:
        store.discard(folder)


def check_tokenizer(ref: str, folders: Collection[Path], settings: EvalSettings) -> None:
    """Check that a model that is to be scored has a tokenizer and, if chats are asked for, a chat template.

    Args:
        ref: names the model in the error.
        folders: where its tokenizer can be: its own folder, and those of adapters on it.
        settings: of the evaluation. If it runs code of the model, which may bring the tokenizer, that is looked for.

    Raises:
        InputError: saying what is missing, and what to do.
    """
    if settings.model_args.get("trust_remote_code"):
        for folder in folders:
            check_code(ref, folder)
        return
    names = {path.name for folder in folders for path in tokenizer_files(folder) if not fnmatch(path.name, "*.jinja")}
    if not names - _NO_TOKENIZER:
        raise InputError(
            f"{ref}: expected a tokenizer, without which it cannot be scored, but its folder has no tokenizer files; "
            "copy those of its base (tokenizer.json, tokenizer_config.json) into the folder"
        )
    of_server = settings.model_args.get("chat")  # which may have a template for models without one
    if not settings.apply_chat_template or of_server or _TEKKEN in names or any(map(template_in, folders)):
        return
    fix = "set `chat_template` in the recipe" if ref == MERGED else "put a chat_template.jinja into its folder"
    raise InputError(
        f"{ref}: expected a chat template, since evaluate.apply_chat_template is true, but its tokenizer has none, or "
        f"none that is the default; {fix}, or leave apply_chat_template out: it holds for all models that are scored"
    )


def check_code(ref: str, folder: Path, *, copied: bool = True) -> None:
    """Check that the code that a model's configs name (`auto_map`) is in its folder, for `trust_remote_code`.

    Args:
        ref: names the model in the error.
        folder: with the configs.
        copied: False if the model will have these configs in another folder: a merge copies no code.

    Raises:
        InputError: naming the files.
    """
    named = set[str]()
    for name in ("config.json", "tokenizer_config.json"):
        with suppress(OSError, InputError):
            named |= set(own_code(read_json(folder / name)))
    if missing := sorted(name for name in named if not (copied and (folder / name).is_file())):
        raise InputError(
            f"{ref}: evaluate.model_args.trust_remote_code runs the code that its config names (auto_map), so expected "
            f"{', '.join(missing)} in its folder: LEWIS downloads no code from the Hub, and copies none into a merged "
            "model; leave trust_remote_code out if transformers knows the architecture, or leave the evaluate block out"
        )


def _unties(files: ModelFiles) -> bool:
    """Whether a model has an adapter that saves an embedding whole, and PEFT unties that from the head."""
    opened = files.model_copy(update={"like": None}).open() if files.adapter else None
    return isinstance(opened, LoraExpert) and opened.unties


def _dtype(model: Model, name: str, as_before: bool) -> str:
    if not model.computes(name):
        return model.raw(name)[0]
    return model.tensors[name].dtype if as_before else "F32"
