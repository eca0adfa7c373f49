"""Claim: behind 65,536 tokens a token of DeepSeek-V2-Lite costs at most half of the stock model's.

    python -m benchmarks.latent [--lengths 8192,65536] [--tokens 48] [--rounds 2]

Multi-head latent attention: transformers caches one latent a token and expands all of them, for
every head, in each step. Ours reads the latents as they are (no plan), or the pages of them that
Quest chooses. Random weights in the shape of DeepSeek-V2-Lite (27 layers, 16 heads, rank 512, 64
experts of which 6 are chosen, and 2 shared ones; bf16, 31 GB), over caches that are filled with
the same random latents of the given length. Each arm's next token is compared with the stock
model's before any is timed. ms are medians over the tokens of `model.generate` but the first
eight, the least of the rounds. "stock, as a graph" is the stock model's decoder recorded as a CUDA
graph by hand, without generate's Python: its kernels alone. --shape tiny tries the table on a CPU.
"""

from __future__ import annotations

import sys

import torch
import transformers
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache, PreTrainedModel

import hfsparse
from benchmarks.common import options
from benchmarks.common.clock import continued
from benchmarks.common.shapes import cache_bytes, random_model, tidy
from hfsparse.lists.lengths import Lengths
from hfsparse.models.names import text_decoder
from hfsparse.patcher.adopt import adopt
from hfsparse.patcher.state import is_patched, state_of
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.selectors import SELECTORS

SHAPES = {
    "deepseek-v2-lite": dict(
        vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27,
        num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, num_experts_per_tok=6,
        n_shared_experts=2, moe_intermediate_size=1408, first_k_dense_replace=1,
        max_position_embeddings=163840,
    ),
    "tiny": dict(
        vocab_size=1000, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, moe_intermediate_size=32, first_k_dense_replace=1,
        max_position_embeddings=163840,
    ),
}  # fmt: skip
STOCK, GRAPH = "stock", "stock, as a graph"
ARMS = {"no plan": None, "quest 100 %": 1.0, "quest 25 %": 0.25, "quest 6 %": 0.06}
CHECKED = ("no plan", "quest 100 %")  # they read every key: what they say is the stock model's
# Of logits, ‖a − b‖ / ‖b‖: what rounding may make, and how often what it makes of the stock model's
# own two ways to attend (experts that are chosen otherwise part them).
NEAR, OFTEN = {torch.bfloat16: 0.02, torch.float32: 1e-4}, 3


def build(shape: str) -> PreTrainedModel:
    """Random weights, on the GPU if any; experts by a kernel for which the host never waits."""
    model = random_model(DeepseekV2ForCausalLM, DeepseekV2Config(**SHAPES[shape]))
    for layer in model.model.layers:  # sharp attention: a key that is read by mistake shows
        layer.self_attn.q_proj.weight.data.mul_(10)
    if model.device.type == "cuda":
        model.set_experts_implementation("grouped_mm")
    return model


def plan_of(model: PreTrainedModel, share: float | None) -> Plan | None:
    """Every head reads all of a prompt; a step this share of the latents' pages."""
    if share is None:
        return None
    this = ModelId.of(model)
    words = Layer(("full",) * this.q_heads, ("full",), ("quest",))
    quest = SELECTORS["quest"](share=share, min_pages=16 if share < 1 else 2)
    return Plan(this, {"quest": quest}, (words,) * this.layers)


def latents(model: PreTrainedModel, layer: int, length: int) -> tuple[Tensor, Tensor]:
    """Random ones of a layer, and what is rotated beside them; the same each time."""
    made = torch.Generator(model.device).manual_seed(layer)
    random = {"device": model.device, "dtype": model.dtype, "generator": made}
    config = model.config
    return tuple(
        torch.randn(1, 1, length, dim, **random)
        for dim in (config.kv_lora_rank, config.qk_rope_head_dim)
    )


def filled(model: PreTrainedModel, length: int, room: int) -> DynamicCache:
    """A cache that has seen `length` tokens: the stock model's, or the patch's."""
    cache = DynamicCache(config=model.config)
    if not is_patched(model):
        for i in range(model.config.num_hidden_layers):
            cache.update(*latents(model, i, length), i)
        return cache
    adopt(cache, text_decoder(model), reserve=length + room)
    lengths = Lengths.of(None, 0, length, 1)
    for i, layer in enumerate(cache.layers):
        k = torch.cat(latents(model, i, length), -1)
        kept = k, k[..., : layer.rank]
        layer.lazy_initialization(*kept)
        for store in layer.stores:
            store.append(*kept, lengths)
        layer.rows, layer.seen, layer.stored = lengths.rows, length, length
    return cache


@torch.no_grad()
def next_logits(model: PreTrainedModel, length: int) -> Tensor:
    """What it says of a token behind `length` random latents."""
    cache = filled(model, length, 2)
    ids = torch.full((1, 1), 7, device=model.device)
    return model(ids, past_key_values=cache, use_cache=True).logits.float()


def check(model: PreTrainedModel, length: int) -> dict[str, float]:
    """How far the arms that read every key lie from the stock model; raises where that is far."""
    want = next_logits(model, length)

    def apart() -> float:
        return float((next_logits(model, length) - want).norm() / want.norm())

    model.set_attn_implementation("eager")
    found = {"stock, eager attention": apart()}
    model.set_attn_implementation("sdpa")
    most = max(NEAR[model.dtype], OFTEN * found["stock, eager attention"])
    for arm in CHECKED:
        with hfsparse.patch(model, plan_of(model, ARMS[arm])):
            found[arm] = apart()
        if not found[arm] <= most:
            apart_by = f"{found[arm]:.1e} from the stock model, where {most:.1e} is rounding"
            raise SystemExit(f"{arm}, {length:,} tokens: {apart_by}")
    return found


def timed(model: PreTrainedModel, length: int, tokens: int) -> tuple[float, float]:
    """ms a token of `generate`, GiB of its cache."""
    tidy()
    cache = filled(model, length, tokens + 2)
    ids = torch.full((1, length + 1), 7, device=model.device)
    clock, _ = continued(model, ids, tokens, past_key_values=cache)
    return clock.ms(), cache_bytes(cache) / 2**30


@torch.no_grad()
def recorded(model: PreTrainedModel, length: int, times: int = 20) -> float:
    """ms of one step of the stock model's decoder, recorded as a CUDA graph."""
    tidy()
    cache = filled(model, length, 2)
    held = [(layer.keys, layer.values) for layer in cache.layers]
    ids = torch.full((1, 1), 7, device=model.device)
    at = torch.full((1, 1), length, device=model.device)

    def step() -> None:
        for layer, (keys, values) in zip(cache.layers, held, strict=True):
            layer.keys, layer.values = keys, values
        model.model(ids, position_ids=at, past_key_values=cache, use_cache=True)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(times):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def measure(model: PreTrainedModel, length: int, tokens: int, rounds: int) -> dict[str, tuple]:
    """By arm: ms a token, GiB of cache, whether its steps were replayed."""
    found: dict[str, tuple] = {}

    def add(arm: str, ms: float, gib: float, graph: str) -> None:
        ms = min(ms, found[arm][0]) if arm in found else ms
        found[arm] = ms, gib, graph
        print(f"  {arm}, {length:,}: {ms:.2f} ms {graph}", file=sys.stderr, flush=True)

    for _ in range(rounds):
        add(STOCK, *timed(model, length, tokens), "")
        if model.device.type == "cuda":
            try:
                add(GRAPH, recorded(model, length), found[STOCK][1], "yes")
            except Exception as error:  # of other versions: a step that can't be recorded
                print(f"  {GRAPH}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        for arm, share in ARMS.items():
            with hfsparse.patch(model, plan_of(model, share)):
                ms, gib = timed(model, length, tokens)
                add(f"ours, {arm}", ms, gib, str(state_of(model).graphs))
    return found


def table(found: dict[str, tuple], length: int, apart: dict[str, float]) -> str:
    """Markdown."""
    stock = found[STOCK][0]
    kernels = found.get(GRAPH, (float("nan"),))[0]
    lines = [
        f"\n{length:,} tokens; logits are "
        + ", ".join(f"{off:.1e} ({arm})" for arm, off in apart.items())
        + " from the stock model's.\n",
        "| arm | ms a token | x stock | x stock's graph | KV GiB | graph |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for arm, (ms, gib, graph) in found.items():
        lines.append(
            f"| {arm} | {ms:.2f} | {stock / ms:.2f} | {kernels / ms:.2f} | {gib:.2f} | {graph} |"
        )
    return "\n".join(lines)


def main() -> None:
    args = options.parse(options.parser(__doc__, "8192,65536", 48, "deepseek-v2-lite", SHAPES))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{where}; {versions}. Shape {args.shape}, random weights, batch 1.", flush=True)
    model = build(args.shape)
    for length in args.lengths:
        apart = check(model, length)
        print(table(measure(model, length, args.tokens, args.rounds), length, apart), flush=True)


if __name__ == "__main__":
    main()
