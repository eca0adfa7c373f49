"""Claim: under a plan, continuous batching gives more tokens a second than stock `generate_batch`.

    python -m benchmarks.batching [--requests 64] [--shortest 2000] [--longest 32000] [--tokens 64]
                                  [--layers N] [--seconds 60] [--arms stock,full,plan]
                                  [--shape llama-3.1-8b]

Random prompts of lengths evenly spread, greedy, random weights in the shape of Llama-3.1-8B (bf16),
of --layers layers where that is given. `stock` is transformers' manager on the unpatched model with
`paged|sdpa`, the best that it has without flash-attn; `full` is ours under no plan; `plan`: every
second kv head is a ring, the others' steps read 6 % of their pages (quest), and their prompts 10 %
of the blocks (block_topk); `-graphs`: steps are CUDA graphs. Each arm reads two short prompts
first, so that kernels are compiled, and is stopped after --seconds. Shown: tokens processed (of
prompts and answers) and answered, a second, seconds until every request had its first token and ms
a call of the model after that, and, of --alone requests, how far `generate` answers them alike:
where a prompt is read in several calls its heads choose for each, and bf16 rounds. --shape tiny
tries it on a CPU.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.continuous_batching.utils import WorkloadHints

import hfsparse
from benchmarks.common.journal import end_in_order, failure
from benchmarks.common.options import need_cuda
from benchmarks.common.shapes import describe, plan_of, random_model, tidy
from hfsparse.bench import SHAPES
from hfsparse.patterns import PATTERNS


def run(model, prompts: list[list[int]], args: argparse.Namespace, arm: str) -> str:
    """All requests at once; what came of them, in words."""
    generation = GenerationConfig(max_new_tokens=args.tokens, do_sample=False, eos_token_id=-1)
    total = sum(map(len, prompts)) + args.tokens * len(prompts)
    size = 256 if args.shape != "tiny" else 64
    blocks = total // size + 2 * len(prompts) + args.batch // size
    more = {"use_cuda_graph": True} if arm.endswith("-graphs") else {}
    settings = ContinuousBatchingConfig(
        block_size=size, num_blocks=blocks * 5 // 4, max_batch_tokens=args.batch, **more
    )
    hints = WorkloadHints(args.longest, args.tokens, len(prompts))
    warm = time.perf_counter()
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=settings, workload_hints=hints
    ) as manager:
        done: list = []
        try:
            while not manager.is_running() or manager.batch_processor is None:
                time.sleep(0.01)
            warm = time.perf_counter() - warm
            began = time.perf_counter()
            manager.add_requests(prompts, max_new_tokens=args.tokens, record_timestamps=True)
            while len(done) < len(prompts) and time.perf_counter() - began < args.seconds:
                if (result := manager.get_result(timeout=0.2)) is not None:
                    if result.error is not None:
                        return f"{arm:<14} failed: {result.error[:300]}"
                    done.append(result)
                elif not manager.is_running():
                    return f"{arm:<14} failed: {manager.background_thread_status.fatal_error}"
            ended = time.perf_counter()
            active = list(manager.batch_processor.scheduler.active_requests.values())
            answered = sum(len(r.generated_tokens) for r in [*done, *active])
            read = sum(len(r.prompt_ids) + len(r.generated_tokens) for r in done)
            read += sum(state.position_offset for state in active)
        finally:
            if len(done) < len(prompts):  # also at SIGTERM: what is asked is not waited for
                manager.stop(block=True, hard_stop=True)
    took = ended - began
    told = f"{arm:<14} {read / took:>10,.0f} {answered / took:>9,.1f} {took:>8.1f} s"
    if len(done) == len(prompts):
        first = max(r.timestamps[0] for r in done)
        last = max(r.timestamps[-1] for r in done)
        calls = max(1, max(sum(t > first for t in r.timestamps) for r in done))
        told += (
            f"  first tokens {first - began:>6.1f} s, then {(last - first) / calls * 1e3:.2f} ms"
        )
    else:
        told += f"  stopped: {len(done)} of {len(prompts)} done, {read / total:.0%} of tokens"
    told += f"  (warm-up {warm:.1f} s)"
    return told + (agreement(model, done, args.alone) if args.alone and len(done) else "")


def agreement(model, done: list, count: int) -> str:
    """How far the shortest requests were answered as `generate` answers them alone."""
    alike = first = total = 0
    for each in sorted(done, key=lambda r: len(r.prompt_ids))[:count]:
        ids = torch.tensor([each.prompt_ids], device=model.device)
        new, mask = len(each.generated_tokens), torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        pairs = zip(out[0, ids.shape[1] :].tolist(), each.generated_tokens, strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), new)
        alike, first, total = alike + same, first + (same > 0), total + new
    return f"  as alone: {first} of {count} first tokens, {alike} of {total} before one differs"


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--requests", type=int, default=64)
    args.add_argument("--shortest", type=int, default=2000)
    args.add_argument("--longest", type=int, default=32000)
    args.add_argument("--tokens", type=int, default=64)
    args.add_argument("--alone", type=int, default=0, help="requests that generate answers, too")
    args.add_argument("--batch", type=int, default=8192, help="tokens of a call, at most")
    args.add_argument("--layers", type=int)
    args.add_argument("--seconds", type=float, default=60)
    args.add_argument("--arms", default="plan,full,stock")
    args.add_argument("--shape", default="llama-3.1-8b", choices=SHAPES)
    args = args.parse_args()
    if args.shape != "tiny":
        need_cuda()
    end_in_order()
    config = SHAPES[args.shape]
    if args.layers:
        config = {**config, "num_hidden_layers": args.layers}
    model = random_model(LlamaForCausalLM, LlamaConfig(**config))
    steps = max(args.requests - 1, 1)
    lengths = [
        args.shortest + (args.longest - args.shortest) * i // steps for i in range(args.requests)
    ]
    torch.manual_seed(0)
    words = model.config.vocab_size
    prompts = [torch.randint(3, words, (n,), device="cpu").tolist() for n in lengths]
    print(describe(model, args.shape) + f", {model.config.num_hidden_layers} layers")
    print(f"{len(prompts)} requests of {lengths[0]:,} to {lengths[-1]:,} tokens, {args.tokens} new")
    print(f"{'arm':<14} {'tokens/s':>10} {'new/s':>9} {'took':>10}", flush=True)
    prompt = PATTERNS["block_topk"](share=0.1)
    for arm in args.arms.split(","):
        name = "no plan" if arm.startswith("full") else "quest 6 % + ring"
        try:
            stock = arm.startswith("stock")
            with nullcontext() if stock else hfsparse.patch(model, plan_of(model, name, prompt)):
                run(model, [words[:3000] for words in prompts[:2]], args, arm)
                print(run(model, prompts, args, arm), flush=True)
        except Exception as error:
            print(f"{arm:<14} {failure(error)}", flush=True)
        tidy()


if __name__ == "__main__":
    main()
