"""A tokenizer of the tiny models' hundred tokens: one word each."""

from functools import cache

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.patcher.families import VOCAB


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.WordLevel({f"w{n}": n for n in range(VOCAB)}, unk_token="w2"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="w0", bos_token="w1", unk_token="w2", padding_side="left"
    )
