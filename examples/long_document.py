"""Ask several questions of a long document that is read once.

    hfsparse profile MODEL -o plan.yaml
    python examples/long_document.py MODEL plan.yaml LICENSE "When was this license published?"

Prints an answer a question, and what share of a dense model's work and memory this took: the
document's part is spent once, whatever you ask.
"""

import argparse
import copy
import inspect
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfsparse

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder or hub name")
parser.add_argument("plan", help="made for this model")
parser.add_argument("document", type=Path, help="a text file")
parser.add_argument("questions", nargs="+")
parser.add_argument("--max-new-tokens", type=int, default=48)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
# The argument that takes a cache has a new name from transformers 5.24 on.
renamed = "cache" in inspect.signature(model.forward).parameters
CACHE = "cache" if renamed else "past_key_values"

# The chat template round the document and each question; documents come first, so that all
# prompts begin with the same tokens.
document = f"{args.document.read_text('utf-8').strip()}\n\nQuestion: "
prompts = []
for question in args.questions:
    turn = [{"role": "user", "content": document + question}]
    prompts.append(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
begin = prompts[0][: prompts[0].index(document) + len(document)]
shared = tokenizer(begin, return_tensors="pt", add_special_tokens=False).input_ids

with hfsparse.patch(model, args.plan) as handle:
    # The document is read here, sparsely; its rings forget what the plan says they may.
    with torch.no_grad():
        read = model(shared, use_cache=True).past_key_values
    stats = handle.stats()
    print(
        f"read {shared.shape[1]:,} tokens once: computed {stats.pair_density:.0%} of the pairs of "
        f"tokens that a dense model computes, and kept {stats.cache_share:.0%} of its cache"
    )

    for question, prompt in zip(args.questions, prompts, strict=True):
        rest = tokenizer(prompt[len(begin) :], return_tensors="pt", add_special_tokens=False)
        ids = torch.cat([shared, rest.input_ids], dim=1)
        # A copy for each question: what a ring has dropped can't be taken back.
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: copy.deepcopy(read)},
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
        )
        text = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"\nQ: {question}\nA: {text.strip()}")
    print(f"\neach new token read {handle.stats().decode_share:.0%} of the keys before it")
