"""A model with several adapters as a folder that transformers can load: lm-eval takes one adapter at most."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lewis import store
from lewis.models.config import write_config
from lewis.models.dtypes import size_of
from lewis.models.files import copy_tokenizer
from lewis.models.source import ModelFiles
from lewis.models.tokenizer import tokenizer_folder
from lewis.models.writer import CheckpointWriter

_SHARD = 5 * 10**9  # bytes


@contextmanager
def loadable(files: ModelFiles) -> Iterator[tuple[Path, Path | None]]:
    """The folder of a full model, and that of an adapter on it: the model's own, unless it has several adapters.

    With several, a full model is written to the store for as long as the context lasts.

    Raises:
        InputError: if there is no space for it.
    """
    if not files.under:
        yield files.folder, files.adapter
        return
    model = files.open()
    layout = {
        name: ("F32" if model.computes(name) else model.raw(name)[0], info.shape)
        for name, info in model.tensors.items()
    }
    store.check_space(store.home(), sum(size_of(dtype, shape) for dtype, shape in layout.values()) + 10**7)
    with tempfile.TemporaryDirectory(dir=store.make_folder(store.home())) as place:
        folder = Path(place)
        with CheckpointWriter(folder, layout, _SHARD) as writer:
            for name in writer.names:
                writer.write(name, model.read(name))
                writer.finish(name)
        write_config(model.config, model.home, folder, None)
        copy_tokenizer(tokenizer_folder(model), folder)
        yield folder, None
