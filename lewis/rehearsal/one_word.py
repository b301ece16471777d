"""A model of two thousand numbers that answers every prompt with `1`, opened by lm-eval as a real one is."""

from typing import Any

ANSWER, END = "1", "<end>"
LENGTH = 2**20  # tokens of a prompt and its answer: no prompt is too long for it
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def one_word_model() -> Any:
    """Build it: an lm-eval `HFLM`, whose answers and likelihoods come from transformers, as those of `hf` do.

    Each byte of a text is a token. After any token but the answer's the next one is the answer, and after that the
    end, so that a generation takes two forward passes whatever its settings are.
    """
    import torch
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate([END, *letters])}
    tokens = Tokenizer(models.BPE(vocabulary, []))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, model_max_length=LENGTH, chat_template=TEMPLATE, **special
    )
    sizes = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    config = LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=LENGTH, head_dim=2, **sizes, **ends)
    model = LlamaForCausalLM(config).eval()
    answer = vocabulary[ANSWER]
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.tensor([[1.0, 0.0]]).expand(len(vocabulary), 2))
        model.model.embed_tokens.weight[answer] = torch.tensor([0.0, 1.0])
        model.lm_head.weight.zero_()
        model.lm_head.weight[answer, 0] = model.lm_head.weight[0, 1] = 9.0
    lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16, device="cpu")
    return lm
