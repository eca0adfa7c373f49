"""Models of random weights in a true shape, plans for them, and what they run on."""

from __future__ import annotations

import gc
import math
import re
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel

from hfsparse import bench, kernels
from hfsparse.lists.lengths import Lengths
from hfsparse.lists.packed import BITS, said
from hfsparse.models.names import text_decoder
from hfsparse.patcher import generation
from hfsparse.patcher.adopt import adopt
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Below, Layer, ModelId, Plan
from hfsparse.plan.kept import KEPT
from hfsparse.selectors import SELECTORS

STOCK, NONE = "stock", "no plan"


def endless(shape: str) -> PreTrainedModel:
    """A model of this shape with random weights that never ends a text, on the GPU if any."""
    made = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = bench.random_model(shape, torch.device(made[0]), made[1])
    model.generation_config.eos_token_id = None
    return model


def random_model(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """As `endless`, of a config of one's own."""
    cuda, before = torch.cuda.is_available(), torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    try:
        with torch.device("cuda" if cuda else "cpu"):
            model = kind(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    return model


def plan_of(model: PreTrainedModel, name: str, prompt=None) -> Plan | None:
    """A plan by the words of its name; None for one that begins with "no plan".

    Every second kv head is a ring ("ring"), or all but every fourth ("quarter"); the others read
    a share of their pages in decode ("quest 6 %"), chosen anew every few tokens ("refresh 4"), and
    keep them in 8 or 4 bits or fp8, where the name says so. prompt: a pattern by which the heads
    that are no rings read prompts; None: they read all.
    """
    if name.startswith(NONE):
        return None
    this = ModelId.of(model)
    group = this.q_heads // this.kv_heads
    every = 4 if "quarter" in name else 2 if "ring" in name else 1
    rings = [g % every != 0 for g in range(this.kv_heads)]
    share, refresh = (re.search(words, name) for words in (r"(\d+) %", r"refresh (\d+)"))
    read = "quest" if "quest" in name else "full"
    patterns = {} if prompt is None else {"chosen": prompt}
    if any(rings):
        patterns["stream"] = PATTERNS["streaming"](sink=64, recent=256)
    kept = "full"
    for bits in BITS[1:]:
        if said(bits) in name:
            kept, patterns["packed"] = "packed", KEPT["full"](bits)
    if read == "quest":
        given = {"share": int(share[1]) / 100 if share else 0.06}
        given |= {"refresh": int(refresh[1])} if refresh else {}
        patterns["quest"] = SELECTORS["quest"](**given, min_pages=16)
    whole = "full" if prompt is None else "chosen"
    words = Layer(
        tuple("stream" if ring else whole for ring in rings for _ in range(group)),
        tuple("stream" if ring else kept for ring in rings),
        tuple("ring" if ring else read for ring in rings),
    )
    return Plan(this, patterns, (words,) * this.layers, Below())


def random_keys(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Keys, or values, of one layer, `[batch, kv heads, length, head dim]`."""
    config = model.config
    shape = batch, config.num_key_value_heads, length, config.head_dim
    return torch.randn(shape, device=model.device, dtype=model.dtype)


def filled_cache(model: PreTrainedModel, batch: int, length: int, room: int) -> Cache:
    """A patched model's cache that has seen `length` random tokens, with room for more."""
    cache, lengths = DynamicCache(), Lengths.of(None, 0, length, batch)
    adopt(cache, text_decoder(model), reserve=length + room)
    for layer in cache.layers:
        k, v = random_keys(model, batch, length), random_keys(model, batch, length)
        layer.lazy_initialization(k, v)
        for store in layer.stores:
            at = list(store.group.heads)
            store.append(k[:, at], v[:, at], lengths)
        layer.rows, layer.seen, layer.stored = lengths.rows, length, length
    return cache


def cache_bytes(cache: Cache) -> int:
    """Bytes of keys and values, and of a patch's page summaries."""
    own = (layer.bytes() for layer in cache.layers if hasattr(layer, "bytes"))
    stock = (layer for layer in cache.layers if not hasattr(layer, "bytes"))
    return sum(own) + sum(layer.keys.nbytes + layer.values.nbytes for layer in stock)


def chunk_of(arm: str, tokens: int) -> int:
    """Tokens of the chunks in which `generate` reads a prompt; 0: in one piece."""
    return generation.CHUNK if arm != STOCK and tokens > generation.LONG else 0


def room_of(model: PreTrainedModel) -> float:
    """Bytes of the model's device; no limit on a CPU."""
    if model.device.type != "cuda":
        return math.inf
    return torch.cuda.get_device_properties(model.device).total_memory


def tidy() -> None:
    """Give memory that nothing holds back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def describe(model: PreTrainedModel, shape: str) -> str:
    """Device, versions, shape: what stands above a table."""

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    cuda = model.device.type == "cuda"
    parts = [torch.cuda.get_device_name() if cuda else "CPU", f"torch {torch.__version__}"]
    parts += [f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"] if cuda else []
    parts += [of(name) for name in ("triton", "transformers", "flash-attn-4")]
    why = why_not_fa4(model)
    parts[-1] += "" if why is None else f", which does not serve: {why}"
    return (
        f"{'; '.join(parts)}. Shape {shape}, random weights, {str(model.dtype)[6:]}, batch 1; "
        f"dense is {model.config._attn_implementation}."
    )


def why_not_fa4(model: PreTrainedModel) -> str | None:
    """Why FA4 serves none of this model's lists; None: it does."""
    dim = ModelId.of(model).head_dim
    need = kernels.Need(model.device, model.dtype, dim, dim, lists=True)
    rows = [row for row in kernels.PREFILL if row.name == "FA4"]
    return rows[0].why_not(need) if rows else "it is not in the table"
