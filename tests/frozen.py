"""A stand-in for CUDA graphs on the CPU, for a process in which Triton is interpreted.

A recorded step is run again as Python, with the host's counters as they were when it was recorded:
what it takes from the host is frozen, as in a graph, and only tensors tell one step from another.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import wraps
from importlib import import_module
from types import SimpleNamespace
from unittest.mock import patch

import torch
from transformers import DynamicCache

import hfsparse
from hfsparse import kernels
from hfsparse.lists import PAGE
from hfsparse.models.names import text_decoder
from hfsparse.plan import Below
from hfsparse.runtime import graphs
from hfsparse.runtime.cache import host
from hfsparse.runtime.call import use_tables
from hfsparse.runtime.decode import Step
from hfsparse.runtime.graphs import products, recording
from tests import latents
from tests.patcher import families, runs
from tests.support import models


class Frozen(recording.Graph):
    """Its Python is what is replayed."""

    recorded, wrong = 0, ""  # how many, and what is wrong with their replays
    ended = 0  # rows that were empty in replays
    of_lengths: list[int]  # how many tokens a row each replayed step had
    device = torch.device("cpu")
    devices = (device,)

    def __init__(self, call, given, lengths, key, serving, weights):
        Frozen.recorded += 1
        self.replays, self.weights = 0, weights
        self.call, self.key, self.given, self.serving = call, key, given, serving
        self.lengths = lengths

    def replay(self, given, rows, ended=None):
        Frozen.of_lengths.append(self.lengths.columns)
        length = torch.tensor(rows)
        recording.write_lengths(length, rows, ended)
        Frozen.ended += int((length == 0).sum())
        step = Step.recorded(self.lengths, length)
        tensors = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        with recording.record_step(step, self.serving), self.wrong_page():
            output = self.call(**recording.hide_cache({**self.given, **tensors}))
        if self.wrong == "bit":
            output.last_hidden_state[0, 0, 0] *= 1 + torch.finfo(torch.float32).eps
        return recording.show_cache(output, given)

    @contextmanager
    def wrong_page(self):
        """The last layer reads one page of one head in the place of another."""
        k = self.serving[max(self.serving)][1].stores[-1].k[:1, :1]
        right = k.clone()
        if self.wrong == "page":
            k[:, :, :PAGE] = right[:, :, PAGE : 2 * PAGE]
        yield
        if self.wrong == "page":
            k[:, :, :PAGE] = right[:, :, :PAGE]


@contextmanager
def frozen():
    """Steps are recorded and replayed without a GPU."""
    obstacle = graphs.find_obstacle

    def on_cpu(decoder, kwargs, new):
        return obstacle(decoder, kwargs, SimpleNamespace(is_cuda=True, shape=new.shape))

    with ExitStack() as stack:
        stack.enter_context(patch.object(graphs, "Graph", Frozen))
        stack.enter_context(patch.object(graphs, "find_obstacle", on_cpu))
        for name in ("Stream", "current_stream"):
            stack.enter_context(patch.object(torch.cuda, name, lambda *a: None))
        stack.enter_context(patch.object(torch.cuda, "is_current_stream_capturing", lambda: False))
        Frozen.recorded, Frozen.of_lengths, Frozen.ended = 0, [], 0
        yield Frozen


def noisy(norm) -> type:
    """A kind of norm that says something else each time, as sums in another order do."""

    class Noisy(type(norm)):
        def forward(self, x):
            return super().forward(x) + 1e-5 * torch.randn_like(x)

    return Noisy


def waiting(decoder) -> type:
    """A kind of decoder that looks for places between its parts: compiled, it doesn't."""

    class Waiting(type(decoder)):
        @wraps(type(decoder).forward)
        def forward(self, **kwargs):
            held = torch.zeros(2)
            held.index_put_((held == 0,), torch.zeros(()), accumulate=True)
            return super().forward(**kwargs)

    return Waiting


LAUNCHES = ("triton.append.append", "triton.decode.decode", "triton.choose.pages")
FETCHES = ("triton.write_out.write_out", "triton.fetch.fetch", "triton.decode_store.decode")


@contextmanager
def launches():
    """The set of those Triton kernels that a step launches, to be filled."""
    seen: set[str] = set()
    with ExitStack() as stack:
        for name in LAUNCHES + FETCHES:
            module, _, function = name.rpartition(".")
            module = import_module(f"hfsparse.kernels.{module}")
            run = getattr(module, function)

            def noted(*args, name=name, run=run, **more):
                seen.add(name)
                return run(*args, **more)

            stack.enter_context(patch.object(module, function, noted))
        yield seen


def plain_prompts():
    """Prompts without the interpreter: it is slow."""

    def plain(table):
        return tuple(kernel for kernel in table if kernel.name != "Triton")

    tables = kernels.TABLES
    prompts = {name: plain(getattr(tables, name)) for name in ("prefill", "estimate", "count")}
    return use_tables(tables._replace(**prompts))


def compare(
    family: str,
    plan,
    below=None,
    length=100,
    pads=(0,),
    new=9,
    fuse=False,
    wrong="",
    exact=False,
    **more,
):
    """A generation, eager and replayed: what came out, and how many steps were recorded.

    plan: a function of a model, or the name of one in `families`.
    """
    if family in latents.FAMILIES:  # experts that are chosen in a loop would make the host wait
        model = latents.fresh(family, first_k_dense_replace=3)
    else:
        model = models.fresh(family)
    made = (plan if callable(plan) else getattr(families, plan))(model)
    if below is not None:
        made = replace(made, below=Below(*below))
    ids, mask = families.left_padded(length, pads)
    Frozen.wrong = wrong
    if wrong == "noise":
        model.model.norm.__class__ = noisy(model.model.norm)
    if wrong == "waits":
        model.model.__class__ = waiting(model.model)
    found = []
    for replayed in (False, True):
        with ExitStack() as stack:
            stack.enter_context(plain_prompts())
            stack.enter_context(patch.object(products, "BACKEND", "aot_eager"))
            kind = stack.enter_context(frozen()) if replayed else None
            launched = stack.enter_context(launches())
            stack.enter_context(patch.object(host, "why_not", lambda device: None))
            handle = stack.enter_context(hfsparse.patch(model, made, fuse=fuse, exact=exact))
            said = runs.generate(model, ids, mask, new=new, **more)
            stats = handle.stats()
            outcome = dict(tokens=said.sequences.tolist(), kv_bytes=stats.kv_bytes)
            outcome["logits"] = torch.stack(said.logits, 1)
            outcome["shares"] = [layer.decode_share for layer in stats.layers]
            outcome["graphs"] = handle.explain().split("CUDA graph: ")[1].split("\n")[0]
            outcome["launched"] = launched
            outcome["recorded"] = kind.recorded if kind else 0
            outcome["lengths"] = sorted({*kind.of_lengths}) if kind else []
            outcome["drafts"] = stats.drafts
            found.append(outcome)
    return found


def ended(family: str, plan: str, length: int, pads: tuple, new: int) -> tuple:
    """Tokens of rows that read on, and replayed of rows of which all but the last end early; the
    tokens that end them, how many graphs were recorded, how many rows were empty in replays."""
    model, Frozen.wrong = models.fresh(family), ""
    ids, mask = families.left_padded(length, pads)
    given = dict(new=new, pad_token_id=0, return_dict_in_generate=False, output_logits=False)
    with plain_prompts(), hfsparse.patch(model, getattr(families, plan)(model)):
        want = runs.generate(model, ids, mask, eos_token_id=None, **given)[:, length:].tolist()
        ends = [row[1 + b] for b, row in enumerate(want[:-1])]
        with frozen() as kind:
            got = runs.generate(model, ids, mask, eos_token_id=ends, **given)
    return want, got[:, length:].tolist(), ends, kind.recorded, kind.ended


def refused(plan: str, mend, length: int, pads=(0, 9)) -> tuple[str, bool, bool]:
    """What a step says to a mask that `mend` spoilt, whether it ran, whether later ones bear it."""
    model, told, found, Frozen.wrong = families.fresh("qwen2"), "nothing", [], ""
    ids, mask = families.left_padded(length, pads)
    for spoilt in (False, True):
        with plain_prompts(), frozen(), hfsparse.patch(model, getattr(families, plan)(model)):
            cache, seen, logits = DynamicCache(), mask, []
            runs.forward(model, ids, mask, cache)
            for step in range(6):
                new, seen = ids[:, step : step + 1], torch.cat([seen, seen[:, -1:]], 1)
                if spoilt and step == 4:  # the first replay that looks at bounds alone
                    try:
                        with launches() as ran:
                            runs.forward(model, ids[:, 40:41], mend(seen.clone()), cache)
                    except ValueError as error:
                        told = str(error)
                logits.append(runs.forward(model, new, seen, cache).logits)
            assert text_decoder(model)._hfsparse.graphs.why is None
            found.append(torch.stack(logits))
    return told, bool(ran), torch.equal(*found)


def moved(move, length: int = 40) -> tuple[list[int], bool]:
    """Graphs recorded after each single token of a loop in which `move(model)` comes once, after
    the fourth; whether the tokens that follow are eager ones."""
    counts, found, Frozen.wrong = [], [], ""
    ids = families.tokens(1, length)
    for replayed in (True, False):
        model = families.fresh("llama")
        with ExitStack() as stack:
            stack.enter_context(plain_prompts())
            kind = stack.enter_context(frozen()) if replayed else None
            stack.enter_context(hfsparse.patch(model, families.full(model)))
            cache, logits = DynamicCache(), []
            runs.forward(model, ids, cache=cache)
            for step in range(8):
                if step == 4:
                    move(model)
                logits.append(runs.forward(model, ids[:, step : step + 1], cache=cache).logits)
                if kind:
                    counts.append(kind.recorded)
            found.append(torch.stack(logits))
    return counts, torch.equal(*found)


def nothing(model):
    pass


def whole_model(model):
    model._apply(torch.clone)  # what model.cpu() and model.cuda() do


def new_parameter(model):
    layer = model.model.layers[2].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() / 2)


def in_place(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)


def by_steps(model, ids, steps: int, act=None, at: int = 0) -> torch.Tensor:
    """Logits of single tokens written by hand over one cache, `act` called before one of them."""
    cache, logits = DynamicCache(), []
    runs.forward(model, ids, cache=cache)
    for step in range(steps):
        if act and step == at:
            act()
        logits.append(runs.forward(model, ids[:, step : step + 1], cache=cache).logits)
    return torch.cat(logits, 1)


def spoilt_later() -> tuple[list[str | None], bool]:
    """Why the first and the second cache's last step was no replay, where the second is wrong."""
    model, why, found = families.fresh("llama"), [], []
    for kind in (nullcontext, frozen):
        with plain_prompts(), kind(), hfsparse.patch(model, families.streaming(model)):
            for Frozen.wrong in ("", "page"):
                ids = families.tokens(1, 200, seed=len(why) % 2)
                found.append(by_steps(model, ids, 6))
                why.append(text_decoder(model)._hfsparse.graphs.why)
    return why[2:], torch.equal(torch.stack(found[:2]), torch.stack(found[2:]))


class Scaled(torch.nn.Module):
    """A projection with an adapter's scale in a dict and a word that says which, as in peft."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scaling, self.active = base, {"a": 1.0, "b": 2.0}, "a"

    def forward(self, x):
        return self.base(x) * self.scaling[self.active]


def changed(what: str) -> tuple[bool, int]:
    """Whether steps are eager ones when a Python number changes on the way; graphs recorded."""
    found, Frozen.wrong = [], ""
    for kind in (nullcontext, frozen):
        model = families.fresh("llama")
        attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
        mlp.up_proj = Scaled(mlp.up_proj)
        acts = {
            "scale": lambda held=attention: setattr(held, "scaling", held.scaling * 2),
            "adapter": lambda held=mlp.up_proj: held.scaling.update(a=3.0),
            "training": model.train,
            "config": lambda held=model: setattr(held.config, "rms_norm_eps", 1e-2),
        }
        with plain_prompts(), kind(), hfsparse.patch(model, families.streaming(model)):
            found.append(by_steps(model, families.tokens(1, 80), 8, acts[what], at=4))
    return torch.equal(*found), Frozen.recorded


def hole(mask):
    mask[0, 30] = 0
    return mask


def longer_row(mask):
    mask[1, 3:] = 1
    return mask


def none(mask):
    return None
