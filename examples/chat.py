"""Chat over several turns, keeping the cache: each turn reads only what is new.

    hfsparse profile MODEL -o plan.yaml
    python examples/chat.py MODEL plan.yaml "My name is Ada." "What is my name?"

Prints each turn, and below it how many tokens were new, which are all that it read, and what share
of a dense cache is held: a little over all in a short chat, where memory is taken by the page, and
less once the chat is longer than the plan's `below`.
"""

import argparse
import inspect

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfsparse

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder or hub name")
parser.add_argument("plan", help="made for this model")
parser.add_argument("turns", nargs="+", help="what you say, one after another")
parser.add_argument("--max-new-tokens", type=int, default=48)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
# The argument that takes a cache has a new name from transformers 5.24 on.
renamed = "cache" in inspect.signature(model.forward).parameters
CACHE = "cache" if renamed else "past_key_values"

messages: list[dict] = []
ids = torch.zeros(1, 0, dtype=torch.long)  # the whole chat, as tokens
said = ""  # the same, as text
cache = None
with hfsparse.patch(model, args.plan) as handle:
    for turn in args.turns:
        messages.append({"role": "user", "content": turn})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # Only the new end becomes tokens: text that is tokenized anew may give other tokens than
        # the model wrote, and the cache holds those.
        if not text.startswith(said):
            raise SystemExit("this chat template rewrites earlier turns: they must be read again")
        new = tokenizer(text[len(said) :], return_tensors="pt", add_special_tokens=False).input_ids
        ids = torch.cat([ids, new], dim=1)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: cache},
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        cache, answer = out.past_key_values, out.sequences[0, ids.shape[1] :]
        if answer[-1] in tokenizer.all_special_ids:
            answer = answer[:-1]  # the template writes it again
        ids = torch.cat([ids, answer[None]], dim=1)
        reply = tokenizer.decode(answer, clean_up_tokenization_spaces=False)
        messages.append({"role": "assistant", "content": reply})
        said = text + reply
        print(f"you:   {turn}\nmodel: {reply.strip()}")
        read, share = new.shape[1], handle.stats().cache_share
        print(f"  (read {read} new tokens, {ids.shape[1]} so far; cache: {share:.0%} of dense)")
