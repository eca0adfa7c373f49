"""Continuous batching under a patch: `generate_batch`, and the manager behind it.

The manager, its scheduler and its paged cache are transformers' own. Ours keeps the model's
attention, tells each call's attention what the requests are, and where the cache has their keys.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sized
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel
from transformers.generation.continuous_batching import continuous_api

from hfsparse.errors import PatchError, UsageError
from hfsparse.kernels import TABLES, Need, pick
from hfsparse.lists import FULL, PAGE
from hfsparse.models.loading import check_ids
from hfsparse.models.names import text_decoder
from hfsparse.models.sharding import Shard
from hfsparse.patcher.state import State
from hfsparse.plan.words import show
from hfsparse.runtime.batch import Pool, Request
from hfsparse.runtime.cache.group import Group
from hfsparse.runtime.cache.paged import PagedLayer
from hfsparse.selectors import segment_of

OLDEST = "5.17.0"
KNOWN = Version(transformers.__version__) >= Version(OLDEST)
BLOCKS = 32  # of a request's block table, where nothing tells how long requests are


class Manager(continuous_api.ContinuousBatchingManager):
    """transformers' manager of a model that a patch is on."""

    def __init__(self, state: State, continuous_batching_config: Any, workload_hints: Any, **more):
        self._state = state
        super().__init__(
            continuous_batching_config=continuous_batching_config,
            workload_hints=workload_hints,
            **more,
        )
        config, hints = self.continuous_batching_config, workload_hints
        if (why := why_not_config(config)) is not None:
            raise PatchError(f"this ContinuousBatchingConfig can't be followed: {why}")
        given = continuous_batching_config
        graphs, blocks = given.use_cuda_graph, given.max_blocks_per_request
        decodes = graphs[1] if isinstance(graphs, tuple) else graphs is not False
        on_gpu = self.model.device.type == "cuda"
        # Prompts are read by what the host knows of them, and can't be recorded; steps are.
        config.use_cuda_graph = False, bool(decodes and on_gpu and reads_lengths(self.model))
        if blocks is None and hints is not None:
            tokens = hints.max_prompt_length + hints.max_generated_length
            blocks = -(-tokens // block_size(config)) + 1 if tokens else None
        if config.use_cuda_graph[1] or given.max_blocks_per_request:
            config.max_blocks_per_request = BLOCKS if blocks is None else blocks
        state.managers.add(self)

    def switch_to_cb_friendly_attn(self, *args, **kwargs) -> None:
        """The model's attention stays as it is: ours."""

    def add_request(self, input_ids, *args, **more):
        """A request that holds tokens: an empty one would end all that run beside it."""
        check_prompt(input_ids)
        return super().add_request(input_ids, *args, **more)

    def _create_batch_processor(self):
        processor = super()._create_batch_processor()
        if processor.cache not in self._state.pools:
            self._state.pools[processor.cache] = pool = _pool(self._state, processor)
            cache, scheduler, runner = processor.cache, processor.scheduler, processor.model_runner
            scheduler.schedule_batch = partial(_schedule, type(scheduler).schedule_batch, scheduler)
            extend = type(cache).extend_read_and_write_indices
            cache.extend_read_and_write_indices = partial(_extend, extend, cache, pool)
            io, kind = processor.inputs_and_outputs, type(runner)
            runner.compute_batch = partial(_compute, partial(kind.compute_batch, runner), io)
            warm_up = partial(kind.run_one_warmup, runner)
            runner.run_one_warmup = partial(_warm_up, warm_up, io, self._state)
        return processor

    def _generation_step(self) -> None:
        requests = asked_of(self.batch_processor)
        super()._generation_step()
        steps = self._state.layers[0].steps
        told = ((request.tokens, 1, request.tokens) for request in requests if request.steps)
        steps.update(told)


def check_prompt(input_ids: Sized) -> None:
    """Raise UsageError for a request that holds no tokens."""
    if len(input_ids) == 0:
        raise UsageError("this request holds no tokens: give a prompt of one or more")


def generate_batch(self, inputs, *args, **more):
    """`generate_batch` of prompts that are such: transformers tells what is wrong with a request
    in that request's answer alone, or in an exception of its code."""
    prompts = inputs if isinstance(inputs, (list, tuple)) else [inputs]
    for prompt in prompts:
        ids = prompt if isinstance(prompt, (list, tuple)) else ()
        if not ids or prompts is not inputs or not all(isinstance(each, Integral) for each in ids):
            raise UsageError(
                f"prompts hold {show(prompt)}: give a list of prompts, each a list of token ids "
                "with one or more, such as tokenizer(texts).input_ids"
            )
        check_ids(self, ids)
    return type(self).generate_batch(self, inputs, *args, **more)


def start(
    self,
    generation_config=None,
    continuous_batching_config=None,
    workload_hints=None,
    *older,
    **more,  # what versions take that are refused
):
    """`init_continuous_batching`: a manager whose model follows the plan."""
    state: State = text_decoder(self)._hfsparse
    if (why := why_not(state)) is not None:
        raise PatchError(
            f"continuous batching can't follow this plan: {why}. Use model.generate, or "
            "handle.undo() first"
        )
    kept = self.__dict__.get("_cached_continuous_batching_manager")
    if kept is not None and kept in state.managers:
        return kept
    if kept is not None:
        raise PatchError(
            "this model keeps a manager of continuous batching from before it was patched: call "
            "model.destroy_cached_continuous_batching_manager() first"
        )
    config = self.generation_config if generation_config is None else generation_config
    if config.eos_token_id is None:
        config.eos_token_id = -1  # none ends an answer
    if continuous_batching_config is None:
        continuous_batching_config = transformers.ContinuousBatchingConfig()
    return Manager(
        state,
        continuous_batching_config,
        workload_hints,
        model=self,
        generation_config=config,
    )


def stop_all(state: State) -> None:
    """End what managers of a patch still do; their requests fail."""
    for manager in list(state.managers):
        if manager.is_running():
            manager.stop(block=True, hard_stop=True)
        if state.model.__dict__.get("_cached_continuous_batching_manager") is manager:
            state.model.destroy_cached_continuous_batching_manager()
    state.managers.clear()


def why_not(state: State) -> str | None:
    """Why requests can't be batched continuously under a patch; None: they can."""
    layers, plan = state.layers, state.plan
    groups = [group for layer in layers for group in layer.groups]
    selectors = [group.selector for group in groups if group.selector is not None]
    if not KNOWN:
        return f"it needs transformers {OLDEST} or newer, this is {transformers.__version__}"
    if state.context is not None:
        return "ranks share a prompt's tokens (context parallel), and requests lie side by side"
    if state.exact is not None:
        return "exact=True drafts tokens, which are taken back, in generate alone"
    if state.shard != Shard():
        return "ranks share the model's heads (tensor parallel)"
    if len(layers) < len(plan.layers) or any(layer.has_state for layer in layers):
        return "some of the model's layers are linear, whose state the paged cache doesn't keep"
    if any(layer.window is not None for layer in layers):
        return "the model has layers with a window or chunks of its own"
    if any(layer.producer is not None for layer in layers):
        return "some of the model's layers read the keys of others"
    if any(layer.rank for layer in layers):
        return "the model's cache keeps latents (MLA)"
    if plan.extend is not None:
        return "the plan has extend, by which long rows are read otherwise"
    if any(group.eviction is not None for group in groups):
        return "the plan evicts keys, and the paged cache keeps all"
    if any(layer.packs for layer in layers):
        return "the plan keeps keys in fewer bits, and the paged cache has the model's type"
    if any(layer.hosts for layer in layers):
        return "the plan keeps keys in host memory, and the paged cache has them on the GPU"
    if any(selector.budget.refresh for selector in selectors):
        return "the plan has refresh, and no choice of pages is kept for a request"
    if named := sorted({each.kind for each in selectors if segment_of(each) > PAGE}):
        return f"{', '.join(named)} makes its index of many pages together, which requests share"
    return None


def why_not_config(config: Any) -> str | None:
    """Why a ContinuousBatchingConfig, resolved, can't be followed; None: it can."""
    if (size := block_size(config)) % PAGE:
        return f"a page of its cache has {size} tokens: give a multiple of {PAGE}"
    if config.cpu_offload_space:
        return "cpu_offload_space moves keys away from what selectors know of them: leave it 0"
    if config.use_async_batching:
        return (
            "one call is over before the next is prepared: leave use_async_batching out, or False"
        )
    if config.varlen_compile_config is not None or config.decode_compile_config is not None:
        return "torch.compile is not supported: leave the compile configs and level out"
    return None


def block_size(config: Any) -> int:
    """Tokens in what the cache is handed out by; newer versions say page_size."""
    return getattr(config, "page_size", None) or config.block_size


def reads_lengths(model: PreTrainedModel) -> bool:
    """Whether steps can be recorded: their kernel reads rows' lengths on the device."""
    head = model.config.get_text_config()
    dim = getattr(head, "head_dim", None) or head.hidden_size // head.num_attention_heads
    need = Need(model.device, model.dtype, dim, dim, lists=True, block=PAGE, pooled=True)
    return pick(TABLES.decode, need).device_lengths


def asked_of(processor: Any) -> list[Request]:
    """The requests of the call that a batch processor has prepared."""
    io = processor.inputs_and_outputs
    if pairs := getattr(io, "io_pairs", None):
        io = pairs[io.current_pair].host_io
    found = []
    for future in io.requests_in_batch:
        state, new = future.state, future.query_length
        found.append(Request(state.position_offset - new, new, len(state.initial_tokens)))
    return found


def _schedule(schedule: Callable, scheduler: Any, tokens: int, reads: int) -> tuple:
    """`schedule_batch`, which takes no last token of a prompt for a step: its heads follow the
    prompt's patterns, unless the call would read more than there are places for."""
    requests, fast, new, read = schedule(scheduler, tokens, reads)
    for each in requests or ():
        state = each.state
        fast = fast and (state.position_offset >= len(state.initial_tokens) or read > reads)
    return requests, fast, new, read


def _compute(compute: Callable, io: Any, *args, **more) -> None:
    """`compute_batch`, once the call's inputs are written, which is done on another stream than it
    runs on: a replayed graph begins so soon that it would read what they were before."""
    if (stream := io.compute_stream) is not None:
        torch.cuda.current_stream(stream.device).synchronize()
    compute(*args, **more)


def _warm_up(warm_up: Callable, io: Any, state: State, *, max_kv_read: int | None, **more) -> float:
    """`run_one_warmup`, of steps alone, which nobody has asked for and that count nowhere. Prompts
    are not recorded, and one that fills the cache takes long."""
    if max_kv_read is not None:
        return 0.0
    with ExitStack() as stack:
        for layer in state.layers:
            stack.enter_context(layer.counts.paused())
        took = warm_up(max_kv_read=None, **more)
        if io.compute_stream is not None:
            io.compute_stream.synchronize()
    return took


def _extend(
    extend: Callable,
    cache: Any,
    pool: Pool,
    request: str,
    past: int,
    new: int,
    reads: list[list[int]] | None,
    writes: list[list[int]],
) -> None:
    """`extend_read_and_write_indices`, which names a request's pages, not each of its tokens."""
    extend(cache, request, past, new, None, writes)
    if reads is not None:
        blocks, each = pool.blocks_of(request), pool.size // PAGE
        pages = range(-(-(past + new) // PAGE))
        reads[0].extend(blocks[n // each] * pool.stride + n % each * PAGE for n in pages)


def _pool(state: State, processor: Any) -> Pool:
    """What attention needs of a paged cache, whose keys lie as this transformers has them."""
    cache = processor.cache
    own = getattr(cache, "layer_to_allocator", None)
    if own is not None:  # from 5.24 on, or a little before
        tables = first = next(iter(own.values()))
        size, stride = first.tokens_per_page, first.block_physical_stride
        trash, keys = first.write_trash_index, first._kv_token_views
    else:
        size, tables = cache.block_size, cache.group_cache_managers[0]
        trash = cache.write_trash_index
        stride, at = size, cache.layer_index_to_group_indices
        keys = {i: (cache.key_cache[j], cache.value_cache[j]) for i, (_, j) in at.items()}
    layers, plans = {}, {}
    for plan in state.layers:
        k, v = keys[plan.index]
        k, v = (t[: len(t) // PAGE * PAGE] for t in (k, v))
        groups = tuple(map(_as_kept, plan.groups))
        pages = -(-len(k) // stride) * (size // PAGE)
        below = plan.below.decode, plan.below.cache
        plans[plan.index] = replace(plan, groups=groups)
        layers[plan.index] = PagedLayer(k, v, groups, below, pages, plan.at)
    asked, tables = partial(asked_of, weakref.proxy(processor)), weakref.proxy(tables)
    return Pool(layers, plans, size, stride, trash, own is None, asked, partial(_blocks, tables))


def _blocks(tables: Any, request: str) -> list[int]:
    """The blocks of a request, in order."""
    return tables.block_table[request]


def _as_kept(group: Group) -> Group:
    """As steps read a group where every key is kept: of a ring, the keys in its band."""
    return group if group.band == FULL else replace(group, band=FULL, reads=group.band)
