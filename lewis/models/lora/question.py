"""The question to PEFT: what an adapter changes in its base, and whether PEFT can load it there."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lewis.errors import InputError
from lewis.input_files import read_json
from lewis.models.names import Shapes
from lewis.rehearsal.network import Network
from lewis.rehearsal.question import Question

CONFIG = "adapter_config.json"


class AdapterQuestion(Question):
    """An adapter and its base: both configs, and the names and shapes of both weights.

    PEFT puts the adapter on the base's network, without weights, loads its keys and merges it. A network that
    transformers cannot build is made of the base's tensors, by their names and shapes.

    The answer has:
        changes: a row a change (`put_on.Rows`).
        untied: whether PEFT unties the head, of which the adapter then has a copy that must equal the embedding.
        resized: tensor of the base -> its shape with the adapter, where the adapter has another vocabulary.
        missing: what PEFT expected in the file, in modules that it leaves as they are.
        unexpected: keys of the file that PEFT leaves out.
        warnings: of PEFT.
        network: why transformers cannot build the base's network; empty if it can.
    """

    name: ClassVar[str] = "adapter"
    semantics: ClassVar[int] = 1
    libraries: ClassVar[tuple[str, ...]] = ("peft", "transformers")
    imports: ClassVar[tuple[str, ...]] = (*Network.imports, "peft")

    def sizes(self) -> Sequence[int]:
        """The ranks of the factors, which `r` may have been."""
        return sorted({min(shape) for shape in self.settings["weights"].values() if shape})

    def ask(self) -> dict[str, Any]:
        """Ask PEFT.

        Raises:
            UnfitError: for what PEFT takes and no weights stand for, or which lacks weights.
            Exception: of PEFT.
        """
        from lewis.models.lora.put_on import put_on

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / CONFIG).write_text(self.files[CONFIG])
            (folder / "config.json").write_text(self.settings["config"])
            base, weights = (
                {name: tuple(shape) for name, shape in self.settings[key].items()} for key in ("base", "weights")
            )
            return put_on(folder, base, self.settings["tied"], weights)


def question_of(
    home: Path, base: Shapes, tied: Mapping[str, str], adapter: Path, weights: Shapes, *, item: object = ""
) -> AdapterQuestion:
    """The question about an adapter.

    Args:
        home: folder with the base's config.json.
        base: the shapes of its tensors.
        tied: its tied names, as `Model.tied`.
        adapter: the adapter's folder, whose config `read_settings` reads.
        weights: the shapes of its tensors.
        item: what messages call it; by default its folder.
    """
    settings = {
        "config": (home / "config.json").read_text(encoding="utf-8"),
        "base": {name: list(shape) for name, shape in base.items() if name not in tied},
        "weights": {name: list(shape) for name, shape in weights.items()},
        "tied": dict(tied),
    }
    files = {CONFIG: (adapter / CONFIG).read_text(encoding="utf-8")}
    return AdapterQuestion(str(item or adapter), files, settings)


def read_settings(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
        InputError: if it is missing, no regular file or no JSON object.
    """
    path = folder / CONFIG
    try:
        settings: Any = read_json(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(settings).__name__}")
    return settings
