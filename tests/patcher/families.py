"""Tiny random models of each family, plans that really drop something, and inputs."""

from __future__ import annotations

from functools import cache

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from hfsparse import Plan
from hfsparse.models.layers import layer_shapes
from hfsparse.plan import Below, Layer, ModelId
from hfsparse.plan.parts import kinds

VOCAB, LAYERS, WINDOW = 100, 3, 40
SIZES = dict(
    vocab_size=VOCAB,
    num_hidden_layers=LAYERS,
    hidden_size=64,
    intermediate_size=64,
    head_dim=16,
    max_position_embeddings=1024,
    initializer_range=0.12,  # sharp attention: a key dropped by mistake shows
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
FAMILIES = {  # name: model, config, q heads, kv heads, more
    "llama": (LlamaForCausalLM, LlamaConfig, 4, 2, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, 6, 2, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, 3, 3, {}),
    "mistral": (MistralForCausalLM, MistralConfig, 8, 2, dict(sliding_window=None)),
    "mistral-window": (MistralForCausalLM, MistralConfig, 4, 2, dict(sliding_window=WINDOW)),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        4,
        1,
        dict(
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            query_pre_attn_scalar=20,
        ),
    ),
}


@cache
def tiny(family: str):
    """A family's tiny model. Shared: leave it as you found it."""
    return fresh(family)


def fresh(family: str, **sizes: int):
    """A new tiny model with the weights of one seed; sizes: other ones than SIZES."""
    model, config, q_heads, kv_heads, more = FAMILIES[family]
    torch.manual_seed(0)
    counts = dict(num_attention_heads=q_heads, num_key_value_heads=kv_heads)
    built = model(config(**{**SIZES, **counts, **more, **sizes})).eval()
    for name, parameter in built.named_parameters():
        if "norm" in name:
            parameter.data.normal_(0 if "gemma" in family else 1, 0.1)
    return built


def own_window(model) -> list[bool]:
    """Which layers have the model's own sliding window."""
    return [shape.window is not None for shape in layer_shapes(model)]


def heads(model) -> tuple[int, int]:
    """Of q and of k and v, in layers that a plan may change."""
    return ModelId.of(model).heads


SCALED = {
    "default": {},
    "linear": dict(factor=2.0),
    "yarn": dict(factor=4.0, original_max_position_embeddings=128),
    "llama3": dict(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=128,
    ),
    "dynamic": dict(factor=2.0),
    "longrope": dict(
        short_factor=[1.0] * 8,
        long_factor=[4.0] * 8,
        original_max_position_embeddings=128,
        factor=2.0,
    ),
}


def rotated(kind: str):
    """The tiny Llama with rope of this kind, trained on 128 tokens."""
    torch.manual_seed(0)
    rope = {"rope_type": kind, **SCALED[kind]}
    sizes = {**SIZES, "max_position_embeddings": 128, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, rope_theta=10000.0, rope_scaling=rope)
    return LlamaForCausalLM(config).eval()


def wide_window():
    """A window so wide that vertical_slash and block_topk drop keys inside it."""
    torch.manual_seed(0)
    more = dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=170)
    return MistralForCausalLM(MistralConfig(**SIZES, **more)).eval()


def by_content_in_windows(model) -> Plan:
    """Heads that choose by content beside streaming ones, in layers with their own window."""

    def layer(index, windowed):
        assert windowed
        return ["vs", "blocks", "s", "means"], ["full"] * 2, ["full"] * 2

    means = BLOCKS[0], {**BLOCKS[1], "means": True}
    return plan_of(model, layer, s=STREAM, vs=VS, blocks=BLOCKS, means=means)


def plan_of(model, layer, below=(0, 0, 0), **patterns) -> Plan:
    """A plan from `layer(index, windowed) -> (prefill, cache, decode)` and `name=(kind, {…})`."""
    known = kinds()
    words = {name: known[kind](**values) for name, (kind, values) in patterns.items()}
    whole, layers = Plan.full(ModelId.of(model)), []
    for i, shape in enumerate(layer_shapes(model)):
        open_to_words = shape.attends and not shape.chunked and shape.heads == heads(model)
        own = Layer(*map(tuple, layer(i, shape.window is not None)))
        own = own if shape.producer is None else reading(layers[shape.producer], own)
        layers.append(own if open_to_words else whole.layers[i])
    plan = Plan(whole.model, words, tuple(layers), Below(*below))
    plan.validate()
    return plan


def reading(producer: Layer, own: Layer) -> Layer:
    """A layer's words where it reads another's keys: of prompts its own, where no ring binds it."""
    ratio = len(own.prefill) // len(own.cache)
    prefill = [
        word if producer.cache[head // ratio] == "full" else producer.prefill[head]
        for head, word in enumerate(own.prefill)
    ]
    return Layer(tuple(prefill), producer.cache, producer.decode)


def full(model) -> Plan:
    return Plan.full(ModelId.of(model))


STREAM = ("streaming", dict(sink=2, recent=5))
GROW = ("streaming", dict(sink=2, recent=5, recent_per_token=0.25))
VS = ("vertical_slash", dict(columns=31, diagonals=101))  # 30 and 100 are always kept
BLOCKS = ("block_topk", dict(share=0.1, min_blocks=4))
QUEST = ("quest", dict(share=0.06, min_pages=3))  # first, last and one that it chooses


def streaming(model, below=(0, 0, 0), pattern=STREAM) -> Plan:
    """Every second kv head a ring, the others full; layers with a window stream their prompt."""
    Hq, Hkv = heads(model)

    def layer(index, windowed):
        rings = [(g + index) % 2 == 0 for g in range(Hkv)]
        prefill = ["s" if rings[h * Hkv // Hq] else "full" for h in range(Hq)]
        if windowed:
            return prefill, ["full"] * Hkv, ["full"] * Hkv
        return (
            prefill,
            ["s" if r else "full" for r in rings],
            ["ring" if r else "full" for r in rings],
        )

    return plan_of(model, layer, below, s=pattern)


def corrected(model, below=(0, 0, 0)) -> Plan:
    """What is left out enters by its means: of blocks, of pages and of smaller units; beside heads
    without, and full ones."""
    Hq, Hkv = heads(model)

    def layer(index, windowed):
        prefill = [("blocks", "near", "full", "bare")[(h + index) % 4] for h in range(Hq)]
        decode = [("pages", "units", "full")[(g + index) % 3] for g in range(Hkv)]
        if windowed:
            return [("s", "full")[h % 2] for h in range(Hq)], ["full"] * Hkv, ["full"] * Hkv
        return prefill, ["full"] * Hkv, decode

    more = {"share": 0.06, "min_pages": 2, "means": True}
    return plan_of(
        model,
        layer,
        below,
        blocks=("block_topk", {**BLOCKS[1], "means": True}),
        near=("energy", dict(alpha=0.99, recent_blocks=1, means=True)),
        bare=BLOCKS,
        s=STREAM,
        pages=("quest", more),
        units=("quest", {**more, "unit": 16}),
    )


def growing(model) -> Plan:
    return streaming(model, pattern=GROW)


def mixed(model, below=(0, 0, 0)) -> Plan:
    """Rings, vertical_slash, block_topk, full and quest side by side, other heads in each layer."""
    Hq, Hkv = heads(model)

    def layer(index, windowed):
        rings = [Hkv > 1 and (g + index) % 2 == 0 for g in range(Hkv)]
        rings = [r or (Hkv == 1 and index == LAYERS - 1) for r in rings]
        free = ["vs", "blocks", "s", "full"]
        if windowed:
            free = ["s", "full"]
        prefill = [
            "s" if rings[h * Hkv // Hq] else free[(h + index) % len(free)] for h in range(Hq)
        ]
        if windowed:
            return prefill, ["full"] * Hkv, ["full"] * Hkv
        decode = ["ring" if r else "quest" for r in rings]
        return prefill, ["s" if r else "full" for r in rings], decode

    return plan_of(model, layer, below, s=STREAM, vs=VS, blocks=BLOCKS, quest=QUEST)


def evicting(model, below=(0, 0, 0), size=20, kinds=("snap", "h2o", "full", "s")) -> Plan:
    """kv heads that keep by attention, full ones and rings in turns; any pattern reads prompts."""
    Hq, Hkv = heads(model)

    def layer(index, windowed):
        kept = [kinds[(g + index) % 4] for g in range(Hkv)]
        prefill = [("full", "vs", "blocks", "s")[(h + index) % 4] for h in range(Hq)]
        prefill = ["s" if kept[h * Hkv // Hq] == "s" else word for h, word in enumerate(prefill)]
        if windowed:
            return [("s", "full")[h % 2] for h in range(Hq)], ["full"] * Hkv, ["full"] * Hkv
        read = {"full": "full", "s": "ring"}
        return prefill, kept, [read.get(word, "kept") for word in kept]

    named = {kind: (kind, dict(size=size, window=7)) for kind in ("h2o", "alisa", "adore")}
    named |= dict(snap=("snapkv", dict(size=size, window=6, pool=3)))
    named |= dict(s=STREAM, vs=VS, blocks=BLOCKS)
    return plan_of(model, layer, below, **named)


def snapkv(model) -> Plan:
    """As `evicting`, with steps that evict nothing."""
    return evicting(model, kinds=("snap", "full", "snap", "s"))


def choosing(model, below=(0, 0, 0), **quest) -> Plan:
    """Full caches: a choice is read again for 4 tokens, and in layer 1; top_p in layer 2."""
    Hq, Hkv = heads(model)
    words = ["young"] * Hkv, ["full"] * (Hkv - 1) + ["again"], ["top"] * Hkv

    def layer(index, windowed):
        return ["full"] * Hq, ["full"] * Hkv, words[index]

    young = dict(share=0.06, min_pages=3, refresh=4, **quest)
    top = dict(share=0.9, min_pages=2, top_p=0.6)
    selectors = dict(young=("quest", young), again=("reuse", {}), top=("quest", top))
    return plan_of(model, layer, below, **selectors)


def hosted(model, below=0, hot=0.3, beside="ring", bits=16, **quest) -> Plan:
    """Chosen pages of keys in host memory, and beside them rings, full heads or means, where there
    are heads for that; any pattern reads prompts."""
    Hq, Hkv = heads(model)
    kinds = [("quest", beside, "full")[g % 3] for g in range(Hkv)]
    prefill = [("full", "vs", "blocks", "ring")[h % 4] for h in range(Hq)]
    prefill = ["ring5" if "ring" in (x, kinds[h * Hkv // Hq]) else x for h, x in enumerate(prefill)]
    cache = [{"quest": "host", "ring": "ring5"}.get(x, "full") for x in kinds]
    words = prefill, cache, kinds
    return plan_of(
        model,
        lambda index, windowed: (["full"] * Hq, *[["full"] * Hkv] * 2) if windowed else words,
        (below,) * 3,
        ring5=("streaming", dict(sink=2, recent=70)),
        quest=("quest", dict(share=0.1, min_pages=2) | quest),
        host=("full", dict(host=True, hot=hot, bits=bits)),
        mean=("quest", dict(share=0.1, min_pages=2, means=True)),
        **dict(vs=VS, blocks=BLOCKS),
    )


def packing(model, bits=4, below=(0, 0, 0), every=False, kinds=("quest", "ring", "full")) -> Plan:
    """Chosen pages, rings and full heads in so many bits, of layer 0 or of every layer; any pattern
    reads prompts."""
    Hq, Hkv = heads(model)

    def layer(index, windowed):
        if index and not every:
            return ["full"] * Hq, ["full"] * Hkv, ["full"] * Hkv
        own = [kinds[g % len(kinds)] for g in range(Hkv)]
        prefill = [("full", "vs", "blocks", "r")[h % 4] for h in range(Hq)]
        prefill = ["r" if own[h * Hkv // Hq] == "ring" else x for h, x in enumerate(prefill)]
        return prefill, ["r" if x == "ring" else "packed" for x in own], own

    ring = "streaming", dict(sink=2, recent=70, bits=bits)
    quest = "quest", dict(share=0.1, min_pages=2)
    named = dict(r=ring, quest=quest, packed=("full", dict(bits=bits)), vs=VS, blocks=BLOCKS)
    return plan_of(model, layer, below, **named)


def straddled(model) -> Plan:
    """Thresholds between the rows of `left_padded(260)`, crossed by some while generating."""
    return mixed(model, below=(250, 262, 256))


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, shape, generator=generator)


def left_padded(length: int, pads=(0, 7, 13), seed: int = 0):
    """(ids, mask) of `len(pads)` rows, row b beginning with pads[b] pad tokens."""
    ids, mask = tokens(len(pads), length, seed=seed), torch.ones(len(pads), length).long()
    for b, n in enumerate(pads):
        ids[b, :n] = 0
        mask[b, :n] = 0
    return ids, mask
