"""A tokenizer and a model small enough to build in a test: nothing is downloaded."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hfsparse_eval.run.prompter import Prompter
from hfsparse_eval.tasks import haystack as text
from tests import tiny

CHAT = (
    "{{ bos_token }}{% for m in messages %}<|user|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>"]


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE that puts a BOS first, as Llama's does, and has a chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([text.NOISE, *text.prose()[:400]], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", core.token_to_id("<|bos|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|bos|>", eos_token="<|end|>", chat_template=CHAT
    )


@pytest.fixture(scope="session")
def model(tokenizer):
    ends = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    return tiny.llama(window=2048, vocab_size=len(tokenizer), **ends)


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory):
    """The model and its tokenizer, saved as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session", params=["auto", "never"])
def prompter(request, tokenizer):
    return Prompter(tokenizer, request.param)
