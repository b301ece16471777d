"""Choose for each backend which of lm-eval's model classes is used, with which arguments, on which devices."""

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lewis.errors import InputError
from lewis.evaluation.harness import server
from lewis.models.chat_template import template_in
from lewis.models.tokenizer import read_vocabulary
from lewis.recipe.schema import Backend


@dataclass(frozen=True)
class HarnessModel:
    """How the child of the harness opens the model.

    Attributes:
        model: lm-eval's name of the model class.
        arguments: of that class.
        device: as torch names it; None where the class takes none.
        network: whether the child needs this machine's network, if only for its own processes to reach each other.
        environment: variables of the child, in addition to those that every child has.
        problem: gives words to add to the message if the evaluation fails.
    """

    model: str
    arguments: dict[str, Any]
    device: str | None
    network: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    problem: Callable[[], str] = str


def identity(backend: Backend, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a backend that go into the digest of the scores; empty for `hf` without arguments."""
    if backend == "hf" and not model_args:
        return {}
    found: dict[str, Any] = {"backend": backend, "model_args": dict(model_args)}
    return {**found, "server": server.setting()} if backend == "openai" else found


def check(backend: Backend) -> None:
    """Check that a backend can be used on this machine.

    Raises:
        InputError: saying what is not installed or not set.
    """
    if backend in ("vllm", "sglang") and importlib.util.find_spec(backend) is None:
        raise InputError(
            f"evaluate.backend: {backend} is not installed on this machine; install it next to LEWIS, or use openai "
            "with a server in an environment of its own"
        )
    if backend == "openai":
        if importlib.util.find_spec("tenacity") is None:
            raise InputError("evaluate.backend: openai needs an extra; run: pip install 'lewis-merge[openai]'")
        server.check()


@contextmanager
def harness_model(
    backend: Backend,
    model_args: Mapping[str, Any],
    model: Path,
    adapter: Path | None,
    device: str,
    *,
    code: bool = False,
    patience_s: float = server.PATIENCE,
    tick: Callable[[], None] = lambda: None,
) -> Iterator[HarnessModel]:
    """A context with the model class, arguments and device that lm-eval scores the model by.

    If the backend needs a server, it runs for as long as the context.

    Args:
        backend: of the recipe.
        model_args: of the recipe.
        model: folder of the checkpoint.
        adapter: folder of a LoRA adapter on it; only for `hf`.
        device: as torch names it; several are separated by commas.
        code: whether code of the recipe runs in the child, so that it gets no key of a server.
        patience_s: how long a server may take to load the model.
        tick: called now and then while it loads.

    Raises:
        InputError: as `check`.
        LewisError: as `server.serving`.
    """
    check(backend)
    assert adapter is None or backend == "hf"
    path, names = str(model.resolve()), device.split(",")
    if backend == "hf":
        yield _transformers(path, adapter and adapter.resolve(), names, model_args)
    elif backend == "openai":
        with server.serving(path, visible(names), patience_s, tick) as served:
            yield _client(path, served, model_args, code)
    else:
        split, tokenizer = ("tensor_parallel_size", "tokenizer") if backend == "vllm" else ("tp_size", "tokenizer_path")
        arguments = {
            "pretrained": path,
            tokenizer: path,
            "dtype": "auto",
            "trust_remote_code": False,
            "load_format": "safetensors",
            split: len(names),
            **model_args,
        }
        # The processes of these backends reach each other through the network of this machine.
        yield HarnessModel(backend, arguments, None if backend == "vllm" else "cuda", True, visible(names))


def visible(names: list[str]) -> dict[str, str]:
    """The environment variable that shows only these devices, numbered as in this process; empty for the CPU."""
    numbers = [int(number) for _, colon, number in (name.partition(":") for name in names) if colon]
    ours = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    shown = [ours[number] if number < len(ours) else str(number) for number in numbers]
    return {"CUDA_VISIBLE_DEVICES": ",".join(shown)} if shown else {}


def _transformers(path: str, adapter: Path | None, names: list[str], model_args: Mapping[str, Any]) -> HarnessModel:
    several = len(names) > 1
    arguments = {
        "pretrained": path,
        "tokenizer": path,
        "dtype": "float32" if names == ["cpu"] else "auto",
        "trust_remote_code": False,
        "use_safetensors": True,
        **({"parallelize": True} if several else {}),
        **model_args,
    }
    if adapter is not None:
        arguments |= {"peft": str(adapter), "tokenizer": str(tokenizer_of(Path(path), adapter))}
    return HarnessModel("hf", arguments, "cuda" if several else names[0], environment=visible(names) if several else {})


def tokenizer_of(model: Path, adapter: Path | None) -> Path:
    """The folder whose tokenizer is used: an adapter's, if it has other tokens or a chat template of its own.

    For other tokens, lm-eval resizes the embeddings.
    """
    if adapter is None or (own := read_vocabulary(adapter)) is None:
        return model
    changes = own != read_vocabulary(model) or template_in(adapter) not in (None, template_in(model))
    return adapter if changes else model


def _client(path: str, served: server.Served, model_args: Mapping[str, Any], code: bool) -> HarnessModel:
    arguments = {name: value for name, value in model_args.items() if name != "chat"}
    environment = served.environment if code else {**served.environment, **server.key()}
    if model_args.get("chat"):
        common = {"model": path, "base_url": f"{served.url}/chat/completions"}
        return HarnessModel("local-chat-completions", common | arguments, None, True, environment, served.problem)
    common = {"model": path, "base_url": f"{served.url}/completions", "tokenizer": path}
    fixed = {"tokenizer_backend": "huggingface", "tokenized_requests": True, "trust_remote_code": False}
    return HarnessModel("local-completions", {**common, **fixed, **arguments}, None, True, environment, served.problem)
