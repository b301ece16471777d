"""Tiny checkpoints of real classes, with a real tokenizer, made in a fraction of a second."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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
