"""The questions to transformers: what does a config mean, which network is built of it, and do the weights fit that?

The model's class loads a state of tensors without values, by `from_pretrained` itself, so that renamed, joined and tied
weights are found as they will be found later.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lewis.rehearsal.question import DoubtError, Question, UnfitError

CONFIG, GENERATION, HEADER = "config.json", "generation_config.json", "header"
_RUN = 1_000_000_000  # of networks with at most so many parameters, logits are computed, which takes a second
_TABLES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
)
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool", "U8": "uint8"},
    **{"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


class Network(Question):
    """Does the class of a config load these tensors?

    Its files: config.json, generation_config.json if there is one, and the header: tensor -> dtype and shape. Its
    settings: `runs`, whether the network will be run on text, so that it needs a class that generates; `lent`, the
    tensors of the header that are another model's and that this one may lack. The answer has `class`, the name of the
    class, or None if transformers has none here; then `why` says what is lacking.
    """

    name, semantics, libraries = "network", 1, ("transformers", "torch")
    imports = ("torch", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")

    @classmethod
    def of(
        cls,
        item: str,
        folder: Path,
        config: Mapping[str, Any],
        header: Mapping[str, Any],
        *,
        lent: Mapping[str, Any] | None = None,
        runs: bool = False,
    ) -> "Network":
        """The question about a config, with the generation_config.json of a folder if that has one.

        Args:
            item: what messages call the model.
            folder: of the model.
            config: parsed.
            header: tensor -> its dtype, as safetensors names it, and its shape.
            lent: as `header`, of tensors that the network may have, and that it gets from another model.
            runs: whether the network will be run on text.
        """
        lent = {name: each for name, each in (lent or {}).items() if name not in header}
        header = {**header, **lent}
        files = {CONFIG: json.dumps(config), HEADER: json.dumps({name: list(each) for name, each in header.items()})}
        with suppress(OSError, UnicodeDecodeError):
            files[GENERATION] = (folder / GENERATION).read_text(encoding="utf-8")
        return cls(item, files, {"runs": runs, "lent": sorted(lent)})

    def takes(self, answer: Mapping[str, Any]) -> bool:
        return answer["class"] is not None

    def sizes(self) -> Sequence[int]:
        header = json.loads(self.files[HEADER])
        numbers = {int(part) + 1 for name in header for part in name.split(".") if part.isdigit()}
        return sorted({size for _, shape in header.values() for size in shape} | numbers)

    def ask(self) -> dict[str, Any]:
        """Build the network, load the tensors into it without values, and compute logits with values of our own.

        Raises:
            DoubtError: if no logits, or none that are finite, come of four tokens.
            UnfitError: if weights are missing, of another shape, or in a layer that the network does not have.
            Exception: whatever transformers raises for the config.
        """
        from transformers import GenerationConfig, __version__

        config = read_config(self.files[CONFIG])
        if config is None:
            kind = json.loads(self.files[CONFIG]).get("model_type")
            return _no_class(f"model_type: expected one that transformers {__version__} knows, got {kind!r}")
        if GENERATION in self.files:
            with tempfile.TemporaryDirectory() as folder, suppress(OSError):  # then one is made of the model's config
                (Path(folder) / GENERATION).write_text(self.files[GENERATION], encoding="utf-8")
                GenerationConfig.from_pretrained(folder, local_files_only=True)
        try:
            return self._loaded(config)
        except ImportError as error:  # a package of this architecture is not installed
            return _no_class(" ".join(str(error).split()))

    def _loaded(self, config: Any) -> dict[str, Any]:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        runs = self.settings["runs"]
        classes = loading_classes(config, runs=runs)[: 1 if runs else None]
        for block in (config, config.get_text_config()):  # the weights are read without their quantisation
            with suppress(AttributeError):
                del block.quantization_config
        problems = []
        for own in classes:
            try:
                return self._loaded_by(own, config)
            except UnfitError as error:
                problems.append(error)
        if problems:
            raise problems[0]
        return _no_class(f"model_type: transformers has no class for {type(config).__name__}")

    def _loaded_by(self, own: Any, config: Any) -> dict[str, Any]:
        import torch

        text = config.get_text_config()
        taken = text if own.config_class is type(text) else config  # perhaps the language model alone
        header = json.loads(self.files[HEADER])
        state = {
            name: torch.empty(shape, dtype=getattr(torch, _DTYPES.get(dtype, "float32")), device="meta")
            for name, (dtype, shape) in header.items()
        }
        options = {"use_kernels": False, "output_loading_info": True, "ignore_mismatched_sizes": True}
        _, found = own.from_pretrained(None, config=taken, state_dict=state, device_map="meta", **options)
        found["unexpected_keys"] = set(found["unexpected_keys"]) - set(self.settings["lent"])
        for problem in _problems(own.__name__, found):
            raise UnfitError(problem)
        answer = {"class": own.__name__}
        if own in _registered(config) and sum(math.prod(shape) for _, shape in header.values()) <= _RUN:
            try:
                _run(own, taken, {name: shape for name, (_, shape) in header.items()}, options)
            except Exception as error:
                raise DoubtError(answer, error) from error
        return answer


def _run(own: Any, config: Any, shapes: Mapping[str, Sequence[int]], options: Mapping[str, Any]) -> None:
    """Compute logits of four tokens. Each row of a weight is the same one in memory, so that weights take none.

    Raises:
        UnfitError: if the logits are not finite.
    """
    import torch

    rows = {name: torch.linspace(0.01, 0.03, shape[-1] if shape else 1) for name, shape in shapes.items()}
    state = {name: row.expand(*shapes[name]) if shapes[name] else row[0] for name, row in rows.items()}
    network, _ = own.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32, **options)
    if hasattr(network, "set_experts_implementation"):
        network.set_experts_implementation("eager")  # the others take no such weights
    tokens = torch.tensor([[1, 2, 3, 2]]) % network.get_input_embeddings().weight.shape[0]
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if network.config.is_encoder_decoder else {})
    with torch.no_grad():
        logits = network(**inputs).logits
    if not bool(torch.isfinite(logits).all()):
        raise UnfitError("its network gives logits that are not finite")


class Completed(Question):
    """Which values has a config with the defaults of its class? Its only file is config.json.

    The answer has `config`, or None if transformers does not know its `model_type`.
    """

    name, semantics, libraries, imports = "config", 1, ("transformers",), Network.imports

    def ask(self) -> dict[str, Any]:
        config = read_config(self.files[CONFIG])
        return {"config": None if config is None else json.loads(config.to_json_string(use_diff=False))}

    def takes(self, answer: Mapping[str, Any]) -> bool:
        return answer["config"] is not None


def read_config(text: str) -> Any | None:
    """The config of transformers that a config.json stands for; None if its `model_type` is not known."""
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = json.loads(text).get("model_type", "")
    if isinstance(kind, str) and kind not in CONFIG_MAPPING:
        return None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG).write_text(text, encoding="utf-8")
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _no_class(why: str) -> dict[str, Any]:
    return {"class": None, "why": why}


def _problems(own: str, found: Mapping[str, Any]) -> Iterator[str]:
    """Describe how the weights differ from the network; those outside of numbered layers may be superfluous."""
    for name, stored, wanted in sorted(found["mismatched_keys"]):
        yield f"{name!r} has shape {list(stored)}, but in the network of this config it has {list(wanted)}"
    if missing := sorted(found["missing_keys"]):
        yield f"{own} has {_counted(missing)} that the weights lack"
    if extra := sorted(name for name in found["unexpected_keys"] if any(part.isdigit() for part in name.split("."))):
        yield f"the weights have {_counted(extra)} that the network of this config lacks"


def _counted(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")


def loading_classes(config: Any, *, runs: bool) -> list[Any]:
    """The class that a config of transformers names in `architectures`, or else those that are registered for it.

    Args:
        config: of transformers.
        runs: whether the class must generate text; else the plain model will do.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    texts = list(_registered(config))
    for name in config.architectures if isinstance(config.architectures, list) else ():
        named = getattr(transformers, str(name), None)
        fits = getattr(named, "config_class", None) in (type(config), type(config.get_text_config()))
        if named is not None and fits and (not runs or named in texts or named.can_generate()):
            return [named]
    plain = getattr(modeling_auto, "MODEL_MAPPING", {}).get(type(config), None)
    others = () if runs or plain is None else plain if isinstance(plain, tuple | list) else (plain,)
    return list(dict.fromkeys((*texts, *others)))


def _registered(config: Any) -> Iterator[Any]:
    """The classes that transformers has for a config and that generate text, the preferred one first."""
    from transformers.models.auto import modeling_auto

    for table in reversed(_TABLES) if config.is_encoder_decoder else _TABLES:
        found = getattr(modeling_auto, table, {}).get(type(config), ())
        yield from found if isinstance(found, tuple | list) else [found]
