"""Read a folder of documents once, keep a cache of each, and ask questions of them any day later.

    hfsparse profile MODEL -o plan.yaml
    python examples/library.py MODEL plan.yaml documents "Who wrote this?"

Prints an answer a document and question. A first run reads each `.txt` file and saves its cache,
which takes the time and the disk that it says; later ones load it, and read the question alone. A
document that was changed is read again, and so are all under another plan or model.
"""

import argparse
import copy
import inspect
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hfsparse
from hfsparse.errors import CacheError, UsageError

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder or hub name")
parser.add_argument("plan", help="made for this model")
parser.add_argument("documents", type=Path, help="a folder of text files")
parser.add_argument("questions", nargs="*", help="of each document; none: only read them")
parser.add_argument("--caches", type=Path, help="where caches are kept (default: DOCUMENTS/caches)")
parser.add_argument("--max-new-tokens", type=int, default=48)
args = parser.parse_args()
caches = args.caches or args.documents / "caches"
caches.mkdir(parents=True, exist_ok=True)

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
# The argument that takes a cache has a new name from transformers 5.24 on.
renamed = "cache" in inspect.signature(model.forward).parameters
CACHE = "cache" if renamed else "past_key_values"


def tokens(text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids


def prompt(document: str, question: str) -> str:
    """The chat template round both; documents come first, so that a prompt begins with its own."""
    turn = [{"role": "user", "content": f"{document}\n\nQuestion: {question}"}]
    return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)


with hfsparse.patch(model, args.plan) as handle:
    for file in sorted(args.documents.glob("*.txt")):
        document = file.read_text("utf-8").strip()
        begin = prompt(document, "").split(document)[0] + document + "\n\nQuestion: "
        shared, folder = tokens(begin), caches / file.stem
        try:
            cache = handle.load(folder, tokens=shared)
            print(f"{file.name}: {shared.shape[1]:,} tokens, read before")
        except (CacheError, UsageError):  # not read yet, or something else was
            with torch.no_grad():
                cache = model(shared, use_cache=True).past_key_values
            handle.save(cache, folder, tokens=shared, overwrite=True)
            size = sum(part.stat().st_size for part in folder.iterdir()) / 2**20
            print(
                f"{file.name}: {shared.shape[1]:,} tokens, read now; its cache takes {size:.1f} MiB"
            )
        for question in args.questions:
            ids = torch.cat([shared, tokens(prompt(document, question)[len(begin) :])], dim=1)
            answer = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **{CACHE: copy.deepcopy(cache)},  # the next question begins with it, too
                max_new_tokens=args.max_new_tokens,
                do_sample=False,
            )
            text = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
            print(f"Q: {question}\nA: {text.strip()}")
