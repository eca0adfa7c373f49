"""Claim: a change of the code costs no time: two trees take turns on one device.

    python -m benchmarks.studies.before_after BEFORE AFTER [--shape llama-3.1-8b|narrow|tiny]
                                              [--lengths 512,8192,32768,131072] [--turns 7]

BEFORE and AFTER are folders that hold `hfsparse/`. A process each builds the same random weights
and then does as it is told: the two measure one thing after the other, in turns, and the table
shows medians and the median of the turns' ratios. Only public names are used, so that any two
trees can be compared. `first token`: a prompt under a plan, its cache included. `token`: a step of
`generate` behind a prompt, replayed as CUDA graphs on a GPU. `host`: until a call returns, while
the GPU is still at work (eager steps).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise

SETTLED = 7  # the token from which steps are replayed
SHAPES = {  # hidden, intermediate, layers, q heads, kv heads, head dim, vocabulary
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256),
    "narrow": (256, 512, 32, 8, 2, 64, 1024),
    "tiny": (64, 128, 2, 8, 2, 16, 256),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trees", nargs=2, metavar="TREE")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--lengths", default="512,8192,32768,131072")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--fuse", action="store_true", help="fused steps, too")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.shape)
    workers = [start(tree, args.shape) for tree in args.trees]
    lengths = [int(n) for n in args.lengths.split(",")]
    things = [(what, plan, n) for n in lengths for what, plan in WHAT]
    if args.fuse:
        things += [("fused token", plan, n) for n in lengths for plan in ("none", "sparse")]
    print(ask(workers[0], "versions", "", 0))
    print("| what | plan | tokens | before | after | after / before |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for thing in things:
        for worker in workers:
            ask(worker, *thing)  # kernels compile
        pairs = []
        for turn in range(args.turns):
            order = workers if turn % 2 == 0 else workers[::-1]
            found = {id(worker): ask(worker, *thing) for worker in order}
            pairs.append([found[id(worker)] for worker in workers])
        before, after = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(
            f"| {thing[0]} | {thing[1]} | {thing[2]:,} | {before:.3f} ms | {after:.3f} ms "
            f"| {ratio:.3f} |",
            flush=True,
        )


WHAT = (
    ("first token", "none"),
    ("first token", "sparse"),
    ("host of a prompt", "sparse"),
    ("token", "none"),
    ("token", "sparse"),
    ("host of a step", "sparse"),
)


def start(tree: str, shape: str) -> subprocess.Popen:
    """A process that measures the code of a tree."""
    command = [sys.executable, os.path.abspath(__file__), tree, tree, "--shape", shape, "--worker"]
    more = os.environ.get("PYTHONPATH", "")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([os.path.abspath(tree), more])}
    return subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree
    )


def ask(worker: subprocess.Popen, *thing):
    """What the worker measured of a thing, in milliseconds."""
    print(json.dumps(thing), file=worker.stdin, flush=True)
    while line := worker.stdout.readline():
        if line.startswith("= "):
            return json.loads(line[2:])
    raise SystemExit("a worker died")


def work(shape: str) -> None:
    import torch
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    import hfsparse

    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    hidden, inner, layers, q, kv, dim, words = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=q, num_key_value_heads=kv, head_dim=dim, vocab_size=words,
        max_position_embeddings=1 << 20, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(usual)
    model.generation_config.pad_token_id = 0
    plans = {"none": None, "sparse": sparse(model)}
    measure = Measure(model)
    for line in sys.stdin:
        what, plan, tokens = json.loads(line)
        if what == "versions":
            name = torch.cuda.get_device_name() if cuda else "CPU"
            found = f"{name}, torch {torch.__version__}, transformers {transformers.__version__}"
        else:
            with hfsparse.patch(model, plans[plan], fuse=what == "fused token"):
                found = getattr(measure, what.replace(" ", "_"))(tokens)
        print("= " + json.dumps(found), flush=True)


def sparse(model):
    """Half the kv heads rings, the others read 6 % of their pages; prompts under four patterns."""
    from hfsparse.patterns import PATTERNS
    from hfsparse.plan import Below, Layer, ModelId, Plan
    from hfsparse.selectors import SELECTORS

    this = ModelId.of(model)
    patterns = {
        "stream": PATTERNS["streaming"](sink=64, recent=1024),
        "blocks": PATTERNS["block_topk"](share=0.1),
        "slash": PATTERNS["vertical_slash"](columns=256, diagonals=512),
        "quest": SELECTORS["quest"](share=0.06, min_pages=16),
    }
    rings = [head % 2 == 0 for head in range(this.kv_heads)]
    group = this.q_heads // this.kv_heads
    prompt = [
        "stream" if ring else ("blocks", "slash", "full", "blocks")[i % 4]
        for ring in rings
        for i in range(group)
    ]
    words = Layer(
        tuple(prompt),
        tuple("stream" if ring else "full" for ring in rings),
        tuple("ring" if ring else "quest" for ring in rings),
    )
    return Plan(this, patterns, (words,) * this.layers, Below())


class Measure:
    """Milliseconds of one thing, of the model as it is patched."""

    def __init__(self, model):
        self.model = model

    def _wait(self) -> None:
        import torch

        if self.model.device.type == "cuda":
            torch.cuda.synchronize()

    def _prompt(self, tokens: int):
        import torch

        made = torch.Generator().manual_seed(tokens)
        ids = torch.randint(2, self.model.config.vocab_size, (1, tokens), generator=made)
        return ids.to(self.model.device)

    def _timed(self, run, wait: bool) -> float:
        self._wait()
        begun = time.perf_counter()
        run()
        if wait:
            self._wait()
        taken = (time.perf_counter() - begun) * 1e3
        self._wait()
        return taken

    def first_token(self, tokens: int, wait: bool = True) -> float:
        import torch

        ids = self._prompt(tokens)
        with torch.inference_mode():
            return self._timed(lambda: self.model(ids, use_cache=True, logits_to_keep=1), wait)

    def host_of_a_prompt(self, tokens: int) -> float:
        return self.first_token(tokens, wait=False)

    def token(self, tokens: int) -> float:
        """From one token to the next, by the median."""
        import torch

        seen = []

        def watch(input_ids, scores, **more):
            seen.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        more = {"max_new_tokens": 72, "min_new_tokens": 72, "do_sample": False}
        self.model.generate(self._prompt(tokens), stopping_criteria=[watch], **more)
        steps = [after - before for before, after in pairwise(seen[SETTLED:])]
        return statistics.median(steps) * 1e3

    fused_token = token

    def host_of_a_step(self, tokens: int) -> float:
        """A step that no graph replays: one that is asked for hidden states."""
        import torch

        more = {"use_cache": True, "output_hidden_states": True}
        with torch.inference_mode():
            more["past_key_values"] = self.model(self._prompt(tokens), use_cache=True)[1]
            one = self._prompt(1)
            times = [self._timed(lambda: self.model(one, **more), False) for _ in range(12)]
        return statistics.median(times[4:])


if __name__ == "__main__":
    main()
