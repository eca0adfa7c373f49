"""The dense model under a plan's equivalent boolean mask: what every patched model must equal.

    with oracle(model, plan) as truth:
        model(ids, **whole_cache())
    truth.pairs[layer, q_head]      # pairs that prompts may read

transformers' own cache keeps every key; this attention function builds, row by row and head by
head, the mask of what the plan says that the call reads, and takes a plain float32 softmax.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from contextlib import contextmanager
from functools import lru_cache

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaModel

from hfsparse.evictions import EVICTIONS
from hfsparse.lists import PAGE, Grid, default_block
from hfsparse.models.layers import layer_shapes
from hfsparse.models.names import text_decoder
from hfsparse.patcher.probe import attention_modules
from tests.helpers import with_means
from tests.patcher import dual_chunk
from tests.patterns.matrix import oracle_pages

NAME = "plan_oracle"
DECODE = 16  # a call with a past and at most so many new tokens is decode
CACHE = (
    "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
)

_now: list[Truth] = []


class Truth:
    """The plan that the oracle follows, and what it lets heads read."""

    def __init__(self, plan, layers, keeps=(), prompt=0, left=None, least=None):
        self.plan = plan
        self.layers = layers  # of attention modules
        self.keeps = keeps  # whose keys, and so whose part of a table, each layer reads
        self.prompt = prompt  # columns of a prompt that comes in chunks: none of them is decode
        self.calls = 0
        self.new = 0  # columns of the call: its last layers may be given fewer queries
        self.pairs = defaultdict(int)  # (layer, q head) → pairs kept for prompts
        self.causal = defaultdict(int)  # (layer, q head) → pairs of dense attention
        self.reads = defaultdict(int)  # (layer, kv head) → keys read by each step's newest query
        self.total = defaultdict(int)  # (layer, kv head) → keys it could see
        # (layer, row, kv head) → which keys an eviction left, and what they are worth; and which
        # there were for the last call, new ones included
        self.left: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {} if left is None else left
        self.least = plan.below.cache if least is None else least  # shorter rows evict nothing
        self.read: dict[tuple, torch.Tensor] = {}


@contextmanager
def oracle(model, plan, prompt=0, left=None, least=None):
    """Run the unpatched `model` under the plan's boolean mask.

    left: what evictions left in earlier calls, which is kept up. least: tokens from which on rows
    evict, where the plan's threshold says another thing.
    """
    assert "_hfsparse" not in text_decoder(model).__dict__
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _keep_mask)
    decoder = text_decoder(model)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(NAME)
    shapes = enumerate(layer_shapes(model))
    keeps = [i if shape.producer is None else shape.producer for i, shape in shapes]
    _now.append(Truth(plan, attention_modules(decoder), keeps, prompt, left, least))
    try:
        yield _now[-1]
        assert _now[-1].calls, "the oracle's attention was never called"
    finally:
        decoder.set_attn_implementation(before)
        _now.pop()


def whole_cache(model=None) -> dict:
    """A cache argument that keeps every key, of window layers too."""
    config = model and model.config.get_text_config()
    hybrid = config and any(shape.has_state for shape in layer_shapes(config))
    return {CACHE: DynamicCache(config=config) if hybrid else DynamicCache()}


def _keep_mask(*args, attention_mask=None, mask_function=None, **kwargs):
    """The mask of columns `[B, 1, 1, columns]`; of pairs `[B, 1, Q, Q]` where one sees a later."""
    columns = attention_mask if attention_mask is None else attention_mask[:, None, None]
    if kwargs.get("allow_is_causal_skip", True) or mask_function is None:
        return columns
    at = kwargs.get("cache_position")
    at = torch.arange(kwargs["q_length"]) + kwargs["q_offset"] if at is None else at
    rows = torch.arange(kwargs["batch_size"])[:, None, None]
    seen = mask_function(rows, 0, at[:, None], torch.arange(kwargs["kv_length"]))
    seen = seen.expand(len(rows), -1, -1)
    if attention_mask is not None:
        seen = seen & attention_mask[:, None].bool()
    later = torch.arange(seen.shape[2]) > at[:, None]
    return seen[:, None] if bool((seen & later).any()) else columns


def _attend(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    truth = _now[-1]
    truth.calls += 1
    layer = truth.layers[module]
    B, Hq, Q, _ = query.shape
    columns = key.shape[2]
    if not getattr(module, "is_kv_shared_layer", False):
        truth.new = Q
    starts, blocks = [0] * B, None
    if attention_mask is not None and attention_mask.shape[2] > 1:
        blocks = attention_mask[:, 0]
        starts = [int(row[-1].byte().argmax()) for row in blocks]
        if sliding_window is not None:
            starts = [int((~row.any(1)).sum()) for row in blocks]
    elif attention_mask is not None:
        attention_mask = attention_mask[:, 0, 0]
        if attention_mask.shape != (B, columns):
            raise ValueError(f"a mask of {list(attention_mask.shape)} for {columns} columns")
        starts = [int((~row.bool()).sum()) for row in attention_mask]
    out = query.new_zeros(B, Hq, Q, value.shape[3])
    for b, start in enumerate(starts):
        pads = max(0, start - (columns - Q))  # of these new columns
        q, k, v = query[b, :, pads:], key[b, :, start:], value[b, :, start:]
        if not q.shape[1]:
            continue
        past = columns > truth.new
        decode = past and truth.new <= DECODE and columns > truth.prompt
        chunk, latents = _chunk(module.config, layer), None
        if hasattr(module, "expand_kv"):
            latents = _as_latents(module, q, k, v)
        asked = sliding_window, chunk, past, decode, latents
        evicting = _evicting(truth.plan, layer, len(k) if latents is None else 1)
        producer = layer_shapes(module.config)[layer].producer
        if producer is None:
            for head in evicting:
                _hold(truth, (layer, b, head), q.shape[1], k.shape[1])
        held_by = layer if producer is None else producer
        left = {head: truth.read[held_by, b, head] for head in evicting}
        read = _packed(truth.plan, layer, k, v, len(k[0]) - (0 if decode else q.shape[1]))
        kept = _mask(truth, layer, q, k if decode else read[0], scaling, *asked, left)
        for head, eviction in evicting.items():
            if producer is None and (not decode or eviction.kind != "snapkv"):
                own_q, own_k = (q, k) if latents is None else latents
                where = slice(head * Hq // len(own_k), (head + 1) * Hq // len(own_k))
                bare = s_aux if s_aux is None else s_aux[where]
                shown = own_q[where], own_k[head], scaling, softcap, bare
                _evict(truth, eviction, (layer, b, head), *shown)
        if blocks is not None:  # tokens that see later ones see all that the model lets them
            own = blocks[b, pads:, start:]
            later = (own & torch.ones_like(own).triu(1)).any(1)
            kept = torch.where(later[:, None], own, kept)
        k, v = (t.repeat_interleave(Hq // len(t), 0).float() for t in read)
        if (rule := truth.plan.extend) is not None and sliding_window is None:
            given = q, k, v, kept, scaling, module.config, rule
            out[b, :, pads:] = dual_chunk.attend(*given).to(out.dtype)
            continue
        sizes = _corrected(truth.plan, layer, Hq, decode, k.shape[1])
        seen = _seen(q.shape[1], k.shape[1], sliding_window)
        k, v, kept, weight = with_means(k, v, kept, seen, sizes)
        logits = q.float() @ k.transpose(1, 2) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = (logits + weight).masked_fill(~kept, -torch.inf)
        if s_aux is not None:  # one more logit, of a key without a value
            bare = s_aux.float()[:, None, None].expand(Hq, len(logits[0]), 1)
            logits = torch.cat([logits, bare], -1)
        weights = torch.softmax(logits, -1)[..., : k.shape[1]]
        out[b, :, pads:] = (weights @ v).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _corrected(plan, layer, Hq, decode, total) -> list[int]:
    """By q head: tokens of the units that enter by their means where none is read; 0: none do."""
    words = plan.layers[layer].decode if decode else plan.layers[layer].prefill
    sizes = []
    for head in range(Hq):
        pattern = plan.patterns.get(words[head * len(words) // Hq])
        size = pattern.budget.unit if hasattr(pattern, "budget") else default_block(total)
        sizes.append(size if getattr(pattern, "means", False) else 0)
    return sizes


def _seen(n, total, window) -> torch.Tensor:
    """bool [n, total]: keys that the model lets a row's newest queries read."""
    back = torch.arange(total - n, total)[:, None] - torch.arange(total)
    return (back >= 0) & (back < (total if window is None else window))


def _packed(plan, layer, k, v, end) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v `[Hkv, total, D]` with the pages that are full before `end` in their words' bits.

    Keys take steps from their page's smallest to its largest by channel, values by token; of keys
    in 4 bits the farther-reaching of two channels takes 31, the other 7. fp8 is torch's, the end
    farther from zero its largest number.
    """
    words, k, v = plan.layers[layer].cache, k.clone(), v.clone()
    for head, word in enumerate(words if len(words) == len(k) else ()):
        if (bits := getattr(plan.patterns.get(word), "bits", 16)) == 16:
            continue
        for page in range(end // PAGE):
            for t, over in ((k, 0), (v, 1)):
                t = t[head, page * PAGE : (page + 1) * PAGE]
                low, high = t.amin(over, keepdim=True), t.amax(over, keepdim=True)
                if bits == "fp8":  # of its 448 units the farther end has all
                    unit = torch.maximum(high, -low).clamp(min=1e-30) / 448
                    t.copy_((t / unit).to(torch.float8_e4m3fn).to(t) * unit)
                    continue
                most = torch.full_like(low, 2**bits - 1)
                half = t.shape[1] // 2
                for c in range(half if (bits, over) == (4, 0) else 0):
                    other = half + (c + half // 4 * 2) % half
                    first = (high - low)[0, c] > (high - low)[0, other]
                    most[0, c], most[0, other] = (31, 7) if first else (7, 31)
                step = ((high - low) / most).clamp(min=1e-30)
                t.copy_(low + ((t - low) / step).round() * step)
    return k, v


def _as_latents(module, q, k, v) -> tuple[torch.Tensor, torch.Tensor]:
    """MLA: queries as the one head of latents `[1, total, rank + rope]` takes them, and that head.

    The latents are solved for: those of which the module makes these keys and values.
    """
    q, k, v, weight = (t.double() for t in (q, k, v, module.kv_b_proj.weight))
    nope, heads = module.qk_nope_head_dim, len(k)
    made = torch.cat([k[..., :nope], v], -1).transpose(0, 1).flatten(1)  # [total, heads * ...]
    latent = torch.linalg.lstsq(weight, made.T).solution.T
    up = q[..., :nope] @ weight.view(heads, -1, latent.shape[1])[:, :nope]
    one = torch.cat([latent, k[0, :, nope:]], -1)
    return torch.cat([up, q[..., nope:]], -1).float(), one[None].float()


def _chunk(config, layer) -> int | None:
    """Tokens in a chunk, of a layer that sees no further back than its chunk's first."""
    kinds = getattr(config, "layer_types", None) or ()
    chunked = [*kinds[layer:], ""][0] == "chunked_attention"
    return config.attention_chunk_size if chunked else None


def _evicting(plan, layer, kv_heads) -> dict:
    """The kv heads of a layer that evict, and how."""
    words = plan.layers[layer]
    fits = len(words.cache) == kv_heads
    kept = {head: plan.patterns.get(word) for head, word in enumerate(words.cache) if fits}
    return {head: each for head, each in kept.items() if each and each.kind in EVICTIONS}


def _hold(truth, where, n, total) -> None:
    """A head has the n new keys of a row, too, which then has `total`."""
    if n == total:
        truth.left[where] = torch.zeros(0).bool(), torch.zeros(0).double()
    held, worth = truth.left[where]
    held, worth = held[: total - n], worth[: total - n]  # fewer after a crop
    truth.left[where] = torch.cat([held, torch.ones(n).bool()]), torch.cat([worth, torch.zeros(n)])
    truth.read[where] = truth.left[where][0]


def _evict(truth, eviction, where, q, k, scale, softcap, s_aux) -> None:
    """Behind a call: new queries q `[heads, n, D]` of a group over its keys k `[total, D]`."""
    (held, worth), total = truth.left[where], len(k)
    most = {"snapkv": eviction.window, "h2o": q.shape[1], "adore": 1, "alisa": 8 * eviction.window}
    asked = min(most[eviction.kind], q.shape[1])
    logits = q[:, -asked:].double() @ k.double().T * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    at, key = torch.arange(total - asked, total)[:, None], torch.arange(total)
    logits = logits.masked_fill(~((key <= at) & held), -torch.inf)
    if s_aux is not None:
        bare = s_aux.double()[:, None, None].expand(-1, asked, 1)
        logits = torch.cat([logits, bare], 2)
    each = torch.softmax(logits, -1)[..., :total].mean(0)
    got = each.sum(0)
    newest = key >= total - eviction.window
    if eviction.kind == "h2o":
        worth = worth + got
    elif eviction.kind == "adore":
        worth = each[-1]
    elif eviction.kind == "alisa":
        lasts = 1 - 1 / eviction.window
        worth = worth * lasts ** q.shape[1]
        worth += sum(row * lasts**age for age, row in enumerate(reversed(each)))
    else:
        places = held.nonzero()[:, 0].tolist()
        got, near = got.masked_fill(newest, 0), eviction.pool // 2
        worth = torch.zeros(total).double()
        for i, place in enumerate(places):
            worth[place] = got[places[max(i - near, 0) : i + near + 1]].max()
    truth.left[where] = held, worth
    if total < truth.least or held.sum() <= eviction.size:
        return
    rank = worth.masked_fill(newest, torch.inf).masked_fill(~held, -torch.inf)
    if eviction.window >= eviction.size:
        rank = torch.where(held, key, -1)
    best = torch.sort(rank, descending=True, stable=True).indices[: eviction.size]
    truth.left[where] = torch.isin(key, best), worth


def _mask(truth, layer, q, k, scale, window, chunk, past, decode, latents, left) -> torch.Tensor:
    """bool [Hq, n, total]: what a row's new queries q `[Hq, n, D]` read of k `[Hkv, total, D]`."""
    (Hq, n, _), total = q.shape, k.shape[1]
    Hkv, by_head = truth.plan.model.kv_heads, k.repeat_interleave(Hq // len(k), 0)
    if decode and latents is not None:
        q, k = latents
    at, key = torch.arange(total - n, total)[:, None], torch.arange(total)
    seen = key <= at
    if window is not None:
        seen = seen & (at - key < window)
    if chunk is not None:
        seen = seen & (at - at % chunk <= key)
    words, masks = truth.plan.layers[layer], []
    for head in range(Hq):
        group = head * Hkv // Hq
        if (len(words.prefill), len(words.cache)) != (Hq, Hkv):  # it has no words of its own
            kept = torch.ones(n, total, dtype=torch.bool)
        elif decode:
            own = q[group * Hq // Hkv : (group + 1) * Hq // Hkv]
            kept = _decode(truth, layer, group, own, k[group], scale)
        elif past and window is not None and not _streams(truth.plan, layer, head):
            kept = torch.ones(n, total, dtype=torch.bool)  # the window's ring is read whole
        else:
            kept = _prompt(truth.plan, layer, head, group, q[head], by_head[head], scale, window)
            if past and group in left:  # all that is left is read
                kept = torch.ones_like(kept)
        masks.append(seen & kept & left.get(group, torch.tensor(True)))
        if decode and head % (Hq // Hkv) == 0:
            truth.reads[layer, group] += int(masks[-1][-1].sum())
            truth.total[layer, group] += int(seen[-1].sum())
        if not decode:
            truth.pairs[layer, head] += int(masks[-1].sum())
            truth.causal[layer, head] += int(seen.sum())
    return torch.stack(masks)


def _streams(plan, layer, head) -> bool:
    pattern = plan.patterns.get(plan.layers[layer].prefill[head])
    return pattern is not None and pattern.kind == "streaming"


def _prompt(plan, layer, head, group, q, k, scale, window) -> torch.Tensor:
    n, total = len(q), len(k)
    words = plan.layers[layer]
    ring = words.cache[group] != "full" and words.decode[group] == "ring"
    limit = plan.below.cache if ring else plan.below.prefill
    if words.prefill[head] == "full" or total < limit:
        return torch.ones(n, total, dtype=torch.bool)
    pattern = plan.patterns[words.prefill[head]]
    if pattern.kind == "streaming":
        return _stream(pattern, n, total)
    lengths = torch.tensor([n]), torch.tensor([total])
    grid = Grid(*lengths, n, total, default_block(total), window)
    return pattern.lists(q[None, None], k[None, None], grid, scale).mask()[0, 0]


def _decode(truth, layer, group, q, k, scale) -> torch.Tensor:
    n, total, plan = q.shape[1], len(k), truth.plan
    words = plan.layers[layer]
    kept = torch.ones(n, total, dtype=torch.bool)
    if words.decode[group] == "kept":
        return kept
    if words.decode[group] == "ring":
        ring = plan.patterns[words.cache[group]]
        return kept if total < plan.below.cache else _stream(ring, n, total)
    if words.decode[group] == "full" or total < plan.below.decode:
        return kept
    selector = plan.patterns[words.decode[group]]
    table = plan.table_of(selector)
    chosen = _pages(selector, table, truth.keeps[layer], group, q, k, scale)
    return kept & torch.isin(torch.arange(total) // selector.budget.unit, torch.tensor(chosen))


def _pages(selector, table, layer, group, q, k, scale) -> list[int]:
    """Those that the selector's own oracle reads; of a table it sees this layer's part alone."""
    mine = table and {name: t[layer : layer + 1] for name, t in table.items()}
    pages, _ = oracle_pages(selector, q, k, scale, mine, group, slack=0)
    return pages.nonzero()[0].tolist()


@lru_cache(256)
def _stream(pattern, n: int, total: int) -> torch.Tensor:
    """Written out: the first `sink` keys and the last recent + floor(position * rate)."""
    rate, rows = round(pattern.recent_per_token * 65536), []  # rates are held in 1/65536
    for p in range(total - n, total):
        span = pattern.recent + p * rate // 65536
        rows.append([k < pattern.sink or p - k < span for k in range(total)])
    return torch.tensor(rows)
