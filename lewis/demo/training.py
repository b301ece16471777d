"""Make, train and save the models of the demo family: a plain PyTorch loop on the CPU, always with the same bytes."""

import string
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


def new_tokenizer(words: Iterable[str]) -> "PreTrainedTokenizerFast":
    """A tokenizer with one token for each of `words`, and one for each other character of the prompts and answers."""
    words = list(words)
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = ["<pad>", "<eos>", "<unk>", *words, "\n", *" +=", *string.digits, *string.ascii_lowercase]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*words, r"[\s\S]"])), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: "PreTrainedTokenizerFast") -> "LlamaForCausalLM":
    """A Llama with 0.6 million fp32 weights, always with the same initial values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def make_batches(
    rows: Iterator[dict[str, str]], tokenizer: "PreTrainedTokenizerFast", size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Turn rows of `prompt` and `answer` into batches: token ids and labels, int64, shape (size, tokens).

    Labels are -100 except on the answer and its end token. Padding is on the right, where causal attention ignores it.
    """
    while True:
        chosen = [next(rows) for _ in range(size)]
        prompts = tokenizer([row["prompt"] for row in chosen])["input_ids"]
        answers = tokenizer([row["answer"] + tokenizer.eos_token for row in chosen])["input_ids"]
        pairs = list(zip(prompts, answers, strict=True))
        ids = [torch.tensor(prompt + answer) for prompt, answer in pairs]
        labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in pairs]
        yield pad_sequence(ids, True, tokenizer.pad_token_id), pad_sequence(labels, True, -100)


def train(
    model: "LlamaForCausalLM", optimizers: list[Optimizer], batches: Iterator[tuple[Tensor, Tensor]], steps: int
) -> Iterator[int]:
    """Train a model in place, with a short warm-up and a linear decay of the rate; yield the number of steps done."""
    schedules = [LambdaLR(o, lambda step: min(1.0, (step + 1) / 20) * (1 - step / steps)) for o in optimizers]
    for step in range(steps):
        ids, labels = next(batches)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        yield step + 1


def pretraining_optimizers(model: "LlamaForCausalLM") -> list[Optimizer]:
    """Muon for the layers' matrices, with which addition takes fewer steps, and AdamW for the rest."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    slow = torch.backends.cpu.get_cpu_capability() == "AVX2"
    muon = (_MuonInFp32 if slow else Muon)(matrices, lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, _adam((weight for weight in model.parameters() if id(weight) not in chosen), 3e-3)]


class _MuonInFp32(Muon):
    """Muon with its bf16 products computed in fp32 and rounded: without AVX-512, bf16 kernels are ten times slower."""

    def step(self, closure: Any = None) -> Any:
        with _ProductsInFp32():
            return super().step(closure)


class _ProductsInFp32(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.matmul, Tensor.__matmul__, torch.addmm) and args[0].dtype == torch.bfloat16:
            return func(*(arg.float() for arg in args), **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def finetuning_optimizers(model: "LlamaForCausalLM") -> list[Optimizer]:
    """AdamW for all weights."""
    return [_adam(model.parameters(), 1e-3)]


def _adam(weights: Iterable[torch.nn.Parameter], rate: float) -> Optimizer:
    return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)


def save(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write a model as a Hugging Face folder. `save_pretrained`, which shows a progress bar, writes no weights here."""
    folder.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
