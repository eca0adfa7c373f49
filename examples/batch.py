"""Ask the same of many files, several at a time.

    hfsparse profile MODEL -o plan.yaml
    python examples/batch.py MODEL plan.yaml docs/*.md --ask "What is this text about?"

Prints an answer a file, and below each batch what share of a dense model's work and memory it took:
less for longer files, since heads that look near by do not grow with them.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfsparse

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder or hub name")
parser.add_argument("plan", help="made for this model")
parser.add_argument("files", nargs="+", type=Path, help="text files")
parser.add_argument("--ask", default="Say in one sentence what this text is about.")
parser.add_argument("--batch", type=int, default=4, help="files at a time")
parser.add_argument("--max-new-tokens", type=int, default=48)
args = parser.parse_args()

# Pads on the left: answers begin where prompts end. A padded row gives what it gives alone.
tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()

prompts = {}
for file in args.files:
    turn = [{"role": "user", "content": f"{file.read_text('utf-8').strip()}\n\n{args.ask}"}]
    prompts[file] = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
files = sorted(prompts, key=lambda file: len(prompts[file]))  # alike in length: few pads

with hfsparse.patch(model, args.plan) as handle, torch.no_grad():
    for first in range(0, len(files), args.batch):
        batch = files[first : first + args.batch]
        inputs = tokenizer(
            [prompts[file] for file in batch],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        out = model.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers = tokenizer.batch_decode(
            out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
        )
        for file, answer in zip(batch, answers, strict=True):
            print(f"{file}: {' '.join(answer.split())}")
        stats = handle.stats()
        print(
            f"  ({len(batch)} at once; so far {stats.pair_density:.0%} of the pairs of tokens that "
            f"a dense model computes; cache: {stats.cache_share:.0%} of dense)"
        )
