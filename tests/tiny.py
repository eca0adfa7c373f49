"""A tokenizer and a model made on the spot: real classes, no download, milliseconds."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens: it spells anything, and a token is seldom a word."""
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator([Path(__file__).read_text()] * 4, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    if chat:
        wrapped.chat_template = TEMPLATE
    return wrapped


def llama(window: int = 512, **config) -> LlamaForCausalLM:
    """Two layers of 4 q heads and 2 kv heads, the same random weights every time."""
    torch.manual_seed(0)
    shape = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    sizes = dict(
        vocab_size=400, hidden_size=64, intermediate_size=64, bos_token_id=0, eos_token_id=1
    )
    return LlamaForCausalLM(
        LlamaConfig(**{**shape, **sizes, "max_position_embeddings": window, **config})
    ).eval()


def save(folder: Path, chat: bool = True, **config) -> Path:
    """A whole model folder, as `from_pretrained` reads it."""
    llama(**config).save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return folder
