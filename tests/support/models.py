"""Tiny checkpoints of real classes, with a real tokenizer, made in a fraction of a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

from lewis.merging.run import Merge
from lewis.merging.settings import Expert
from lewis.merging.step import prepare
from lewis.models.checkpoint import Checkpoint
from lewis.models.lora.expert import LoraExpert
from lewis.recipe.recipe import Recipe

WORDS = [f"w{i}" for i in range(60)]


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> None:
    """A word-level tokenizer with <pad>, <eos> and <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    model = models.WordLevel({word: i for i, word in enumerate([*special, *words])}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    wrapped.save_pretrained(folder)


def write_llama(
    folder: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    hidden: int = 16,
    tied: bool = True,
    max_shard_size: str = "5GB",
) -> Path:
    """A random Llama with 64 embeddings and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer(folder)
    return folder


def write_expert(base: Path, folder: Path, *, seed: int, scale: float = 0.02) -> Path:
    """The base with noise on every weight, in one file."""

    def move(name: str, tensor: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 1000 + len(name) + tensor.numel())
        noise = torch.randn(tensor.shape, generator=generator)
        return (tensor.float() + scale * noise).to(tensor.dtype)

    return rewrite(base, folder, move)


def rewrite(model: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Path:
    """A copy of a single-file model with each tensor changed; None leaves one out."""
    folder.mkdir(parents=True)
    for path in model.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_bytes(path.read_bytes())
    tensors = {name: change(name, tensor) for name, tensor in load_file(model / "model.safetensors").items()}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file in place."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """The least that is a checkpoint: these tensors in one file, and a config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shard(model: Path, folder: Path, parts: int = 3) -> Path:
    """A copy of a single-file model in `parts` files with an index."""
    folder.mkdir(parents=True)
    for path in model.glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    weight_map = {}
    for i in range(parts):
        file, names = f"model-{i + 1:05d}-of-{parts:05d}.safetensors", list(tensors)[i::parts]
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_lora(
    base: Path, folder: Path, *, seed: int = 0, targets: Any = ("q_proj", "up_proj"), **settings: Any
) -> Path:
    """A random PEFT LoRA adapter of `base`, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    targets = targets if isinstance(targets, str) else list(targets)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"} | settings)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name or parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return folder


def materialise(base: Path, adapter: Path, folder: Path) -> Path:
    """The adapter merged into its base by PEFT, in fp32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def parse(data: dict[str, Any], root: Path = Path("/"), **arguments: Any) -> Recipe:
    """A recipe from plain data."""
    return Recipe.parse(yaml.safe_dump(data, sort_keys=False), root=root, **arguments)


def open_merge(
    method: str,
    base: Path | None,
    experts: list[Path],
    *,
    parameters: dict[str, Any] | None = None,
    own: list[dict[str, Any]] | None = None,
    densities: list[dict[str, float] | None] | None = None,
    **keys: Any,
) -> Merge:
    """A checked merge of folders, each keyed by its path; an adapter's folder is opened on the base.

    Args:
        parameters: of the whole merge.
        own: of each expert.
        densities: of each expert, as LEWIS would allocate them.
        keys: more top-level keys of the recipe.
    """
    own, densities = own or [{}] * len(experts), densities or [None] * len(experts)
    models = [{"model": str(path), "parameters": each} for path, each in zip(experts, own, strict=True)]
    data = {"merge_method": method, "models": models, "parameters": parameters or {}, **keys}
    opened_base = None if base is None else Checkpoint(base, str(base))
    recipe = parse(data if base is None else {**data, "base_model": str(base)})
    opened = []
    given = dict(zip(map(str, experts), densities, strict=True))
    for entry in recipe.experts:  # of a linear merge, the base too
        path, each = Path(entry.model), given.get(entry.model)
        if (path / "adapter_config.json").exists():
            assert opened_base is not None
            opened.append(Expert(entry.model, LoraExpert(opened_base, path, str(path)), each))
        else:
            opened.append(Expert(entry.model, Checkpoint(path, str(path)), each))
    return prepare(recipe, opened_base, opened)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor: -0.0 and 0.0 differ, as `torch.equal` does not see."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
