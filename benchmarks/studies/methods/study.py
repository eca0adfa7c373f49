"""Which method would you trust? Every profiler method at equal budgets, on the same trials.

    python -m benchmarks.studies.methods MODEL --out DIR --make --judge --tables [--gpus 4]
    python -m benchmarks.studies.methods MODEL --out DIR --cost     (8B shape, random weights)

--make writes plans at equal pair density (prompts only), at equal cache share and at equal share of
keys read in decode, with seconds and peak memory; --judge asks dense and every plan the same
(`trials.py`); --tables prints what is known so far. MODEL also gives the tokenizer of --cost.
All is kept in --out as it comes, so that a run that was killed, or ended by --limit, goes on when
it is started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing.pool import Pool
from pathlib import Path
from queue import SimpleQueue

import torch
import transformers

import hfsparse
from benchmarks.common.journal import Journal, cards, end_in_order, failure
from benchmarks.common.shapes import random_model
from benchmarks.studies.methods.tables import tables
from benchmarks.studies.methods.trials import KINDS, Asker, Kind, counted
from hfsparse import bench
from hfsparse.errors import UsageError
from hfsparse.models.loading import device_name, load
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.selectors.quest import Quest

# Of plans: equal pair density of prompts, equal cache share, equal share of keys read in decode
FAMILIES = {"prefill": "prefill_density", "cache": "cache_share", "decode": "decode_share"}
FREE = dict.fromkeys(FAMILIES.values(), 1.0)
READ = 0.06  # the share of decode
PAGED = ("balanced", "minference")  # choose page shares by head
SEEDS = (0, 1)
ONCE = ("streaming-llm",)  # with seed 0 alone
# Methods, and what is changed about them with seed 0 alone: proxies that rank heads.
METHODS = {
    "balanced": (None,),
    "minference": (None,),
    "minference-error": (None,),
    "duo": (None, "copy", "mass", "error"),
    "moa": (None,),
    "streaming-llm": (None,),
}
# Other budgets, of balanced alone: which would do?
OTHERS = {"prefill": (0.12,), "cache": (0.35, 0.5, 0.75), "decode": (0.12, 0.25)}
COST = {  # method: lengths, samples a length; 8 samples in all
    "minference": ((4096, 8192, 16384, 32768), 2),
    "balanced": ((4096, 8192, 16384, 32768), 2),
    "duo": ((4096, 8192, 16384, 32768), 2),
    "moa": ((4096, 8192), 4),
}


# ---- workers: each has a model of its own on one device

MODEL, ASKER, OUT = None, None, None


def begin(places, out: Path, folder: str, dtype: str) -> None:
    """What a worker process does first."""
    global MODEL, ASKER, OUT
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load(folder, places.get(), dtype)
    if model.device.type == "cuda":
        torch.cuda.set_device(model.device)
    MODEL, ASKER, OUT = model, Asker(tokenizer), out


@contextmanager
def crew(given, workers: int) -> Iterator[Pool]:
    """So many processes a device."""
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for _ in range(workers):
        for device in given.devices:
            places.put(device)
    begun = (places, given.out, given.model, given.dtype)
    with context.Pool(workers * len(given.devices), begin, begun) as pool:
        yield pool


def spread(given, pool: Pool, run: Callable, tasks: list) -> Iterator[dict]:
    """Rows of `run(task)` for each task, as they come, until the seconds are over."""
    end, found = given.start + given.limit, pool.imap_unordered(run, tasks)
    for done in range(len(tasks)):
        try:
            yield from found.next(max(1.0, end - time.time()))
        except multiprocessing.TimeoutError:
            print(f"{done} of {len(tasks)} done: start this again, it goes on", flush=True)
            for worker in multiprocessing.active_children():  # may be long in what it computes
                worker.kill()
            os._exit(3)


# ---- plans


def make(given) -> None:
    settings = f"prompts of {given.lengths}, {given.samples} each, budgets {given.density} and "
    settings += f"{given.share}"
    log = Journal(given.out / "make.jsonl", f"{_made(given.model)}; {settings}")
    (given.out / "plans").mkdir(exist_ok=True)
    tasks = [
        (name, given.lengths, given.samples, more)
        for name, more in list_plans(given.density, given.share)
        if name not in log.rows
    ]
    if tasks:
        with crew(given, 3) as pool:
            for row in spread(given, pool, made, tasks):
                print(f"{row['name']}: {row.get('failed') or row.get('seconds', '')}", flush=True)
                if row.get("failed", "UsageError").startswith("UsageError"):
                    log.add(**row)  # others are tried again


def list_plans(density: float, share: float) -> Iterator[tuple[str, dict]]:
    """Every plan by name, with the settings of `hfsparse.profile` that are its own."""
    shares = {"prefill": density, "cache": share, "decode": READ}
    for (family, usual), method, seed in product(shares.items(), METHODS, SEEDS):
        for variant in variants(method, family, seed):
            own = isinstance(variant, float)
            word = f"{100 * variant:.0f}" if own else variant
            name = f"{family}-{method}{f'-{word}' if word else ''}-{seed}"
            budgets = {**FREE, FAMILIES[family]: variant if own else usual}
            proxy = None if own else variant
            yield name, {"method": method, "proxy": proxy, "seed": seed, **budgets}


def variants(method: str, family: str, seed: int) -> list[str | float | None]:
    """What is changed about a method: a proxy, or the family's budget."""
    if (seed and method in ONCE) or (family == "decode" and method not in PAGED):
        return []
    if method == "minference-error" and (seed or family != "prefill"):  # rings, pages: by effect
        return []
    more = OTHERS[family] if method == "balanced" else ()
    return [variant for variant in (*METHODS[method], *more) if not (variant and seed)]


def made(task) -> list[dict]:
    """One plan, saved, and what it cost; a run that was stopped goes on with what was measured."""
    name, lengths, samples, more = task
    path = OUT / "plans" / f"{name}.yaml"
    if MODEL.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        plan = hfsparse.profile(
            MODEL,
            ASKER.tokenizer,
            out=path,
            lengths=lengths,
            samples=samples,
            verify=False,
            **more,
        )
    except Exception as error:
        return [{"name": name, "failed": failure(error)}]
    if name.startswith("prefill"):
        prompts_only(plan).save(path)
    cost = {"seconds": plan.made["seconds"], "gib": plan.made["peak_gib"]}
    return [{"name": name, **cost, "device": device_name(MODEL.device), "made": plan.made}]


def prompts_only(plan: Plan) -> Plan:
    """Its patterns in prompts, with every key kept and read by decode."""
    kv = ("full",) * plan.model.kv_heads
    layers = tuple(Layer(layer.prefill, kv, kv) for layer in plan.layers)
    used = {word for layer in layers for word in layer.prefill}
    patterns = {word: pattern for word, pattern in plan.patterns.items() if word in used}
    return dataclasses.replace(plan, layers=layers, patterns=patterns, expected={})


def shuffled(plan: Plan, family: str, seed: int) -> Plan:
    """Its words on heads drawn at random: q heads in prompts, or kv heads with their group."""
    rng, kv = random.Random(seed), plan.model.kv_heads
    group = plan.model.q_heads // kv
    each = 1 if family == "prefill" else group
    starts = range(0, plan.model.q_heads, each)
    units = [
        (layer.prefill[h : h + each], layer.cache[h // group], layer.decode[h // group])
        for layer in plan.layers
        for h in starts
    ]
    rng.shuffle(units)
    layers = []
    for at in range(0, len(units), len(starts)):
        own = units[at : at + len(starts)]
        prefill = tuple(word for words, _, _ in own for word in words)
        cache, decode = (tuple(u[i] for u in own[:: len(own) // kv]) for i in (1, 2))
        layers.append(Layer(prefill, cache, decode))
    return dataclasses.replace(plan, layers=tuple(layers), expected={}, made={})


def quest(model: ModelId, below: int) -> Plan:
    """Decode alone: every head reads pages, READ of the row."""
    full = Plan.full(model)
    layer = dataclasses.replace(full.layers[0], decode=("quest6",) * model.kv_heads)
    floor = dataclasses.replace(full.below, decode=below)
    patterns = {"quest6": Quest(READ, 4)}
    return dataclasses.replace(full, patterns=patterns, layers=(layer,) * model.layers, below=floor)


# ---- trials


def arms(out: Path, family: str) -> dict[str, Plan]:
    """Plans of a family by name; beside them heads at random and, of decode, quest on all."""
    every = {file.stem: Plan.load(file) for file in sorted((out / "plans").glob("*.yaml"))}
    if not every:
        raise UsageError(f"no plans in {out / 'plans'}: --make first")
    own = f"{family}-"
    plans = {n.removeprefix(own): plan for n, plan in every.items() if n.startswith(own)}
    if family == "decode":
        return plans | {"quest-0": quest(next(iter(every.values())).model, 2048)}
    drawn = SEEDS if "balanced-0" in plans else ()
    return plans | {f"random-{s}": shuffled(plans["balanced-0"], family, s) for s in drawn}


def judge(given) -> None:
    log = Journal(given.out / "judge.jsonl", _made(given.model))
    log.drop([name for name, row in log.rows.items() if stale(given.out, name, row)])
    with crew(given, given.workers) as pool:
        for stage in ("screen", "all"):
            todo = [task for task in _todo(given, stage, log) if task[2]]
            print(f"{stage}: {len(todo)} texts, {sum(len(t[2]) for t in todo)} runs", flush=True)
            for done, row in enumerate(spread(given, pool, asked, todo), 1):
                log.add(**row)
                if done % 500 == 0:
                    print(f"{done} runs, {time.time() - given.start:.0f} s", flush=True)


def stale(out: Path, name: str, row: dict) -> bool:
    """Whether a row is of a plan that is no more, or was made anew since."""
    kind, *_, arm = name.split("/")
    plan = _plans(_kind(kind).family, out).get(arm) if "plan" in row else None
    return "plan" in row and (plan is None or plan.hash() != row["plan"])


def _todo(given, stage: str, log: Journal) -> list[tuple]:
    """(kind, (task, length, index), arms that lack it): what is asked next, evenly mixed."""
    tasks, known = [], set(log.rows)
    for kind in KINDS:
        plans = {} if stage == "screen" else arms(given.out, kind.family)
        names = kind.tasks if stage == "screen" else counted(log.rows, kind)
        for length in given.at:
            share = given.trials if length <= given.full_until else given.trials // 3
            if kind.name.startswith("prose"):
                share = given.trials // 16
            count = -(-share // max(1, len(names)))
            for i in range(min(given.pilot, count) if stage == "screen" else count):
                wanted = [None, *(a for a in plans if i * portion(a) < count)]
                for name in names:
                    at = f"{length}/{name}/{i}"
                    lacks = [a for a in wanted if key(kind, at, a) not in known]
                    known.update(key(kind, at, arm) for arm in lacks)
                    where = i / count
                    tasks.append((where, kind.name, (name, length, i), lacks))
    tasks.sort(key=lambda task: task[0])
    return [task[1:] for task in tasks]


def portion(arm: str) -> int:
    """One in how many of the texts an arm is asked: all, if it is held against the targets."""
    held = arm == "minference-0" or (arm.startswith("balanced-") and arm != "balanced-1")
    return 1 if held else 6


def key(kind: Kind, at: str, arm: str | None) -> str:
    """What a row is called: conversations alike share the dense model's answers."""
    return f"{kind.name if arm else kind.dense or kind.name}/{at}/{arm or 'dense'}"


def asked(task) -> list[dict]:
    """One text, read and answered by each of these arms."""
    name, (asks, length, index), wanted = task
    kind, rows = _kind(name), []
    try:
        plans = _plans(kind.family, OUT) if any(wanted) else {}
        text = ASKER.text(kind, asks, length, index)
        for arm in wanted:
            found = ASKER.answers(MODEL, text, plans[arm] if arm else None, index == 0)
            mark = {"plan": plans[arm].hash()} if arm else {}
            called = key(kind, f"{length}/{asks}/{index}", arm)
            rows.append({"name": called, "device": device_name(MODEL.device), **mark, **found})
    except Exception as error:
        rows.append({"name": f"failed/{name}/{length}/{asks}/{index}", "why": failure(error)})
    return rows


LOADED: dict[str, dict[str, Plan]] = {}


def _plans(family: str, out: Path) -> dict[str, Plan]:
    if family not in LOADED:
        LOADED[family] = arms(out, family)
    return LOADED[family]


def _kind(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


# ---- cost at the size of 8B


def cost(given) -> None:
    """Each method in a process of its own, so that it can be stopped; one at a time on a GPU."""
    log = Journal(given.out / "cost.jsonl", _made(given.shape))
    free = SimpleQueue()
    for card in (cards() or given.devices)[: len(given.devices)]:
        free.put(card)
    methods = given.methods.split(",") if given.methods else COST
    tries = {m: [r for n, r in log.rows.items() if n.startswith(f"{m}/")] for m in methods}
    todo = [m for m in tries if not any(row.keys() & {"peak_gib", "failed"} for row in tries[m])]

    def one(method: str) -> None:
        device = free.get()
        left = min(given.arm_limit, given.start + given.limit - time.time())
        if left > 30:
            row = _costed(given, method, device, left)
            log.add(f"{method}/{len(tries[method])}", **row)
        else:
            print(f"{method}: no time is left, start this again", flush=True)
        free.put(device)

    with ThreadPoolExecutor(len(given.devices)) as threads:
        list(threads.map(one, todo))


def _costed(given, method: str, device: str, left: float) -> dict:
    """What one method took on one device within the seconds left."""
    start, file = time.time(), given.out / f"cost-{method}.json"
    file.unlink(missing_ok=True)
    more = [given.model, "--out", given.out, "--cost-of", method, "--shape", given.shape]
    if given.cost_lengths:
        more += ["--cost-lengths", given.cost_lengths]
    if given.cost_layers:
        more += ["--cost-layers", given.cost_layers]
    command = [sys.executable, "-m", "benchmarks.studies.methods", *map(str, more)]
    seen = {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": device}
    try:
        code = subprocess.run(command, timeout=left, env={**os.environ, **seen}).returncode
    except subprocess.TimeoutExpired:
        code = None
    row = {"seconds": round(time.time() - start, 1)}
    if file.exists():
        row |= json.loads(file.read_text("utf-8"))
    elif code is not None:
        row["failed"] = f"exit code {code}"
    print(f"{method}: {json.dumps(row)}", flush=True)
    return row


def cost_of(given) -> None:
    """One method on random weights, to a file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(given.model)
    config = transformers.LlamaConfig(**bench.SHAPES[given.shape])
    config.num_hidden_layers = given.cost_layers or config.num_hidden_layers
    model = random_model(transformers.LlamaForCausalLM, config)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    lengths, samples = COST[given.cost_of]
    if given.cost_lengths:
        lengths = tuple(map(int, given.cost_lengths.split(",")))
    out, start, found = given.out / f"cost-{given.cost_of}", time.time(), {}
    try:
        plan = hfsparse.profile(
            model,
            tokenizer,
            out=out.with_suffix(".yaml"),
            lengths=lengths,
            samples=samples,
            method=given.cost_of,
            verify=False,
        )
        found = {"profile_s": plan.made["seconds"], "peak_gib": plan.made["peak_gib"]}
        if "train_seconds" in plan.made:
            found["train_s"] = plan.made["train_seconds"]
            found["steps"] = plan.made["steps"]
    except Exception as error:
        found = {"failed": failure(error)}
    found |= {"weights_gib": round(weights, 2), "lengths": lengths, "samples": samples}
    found |= {"layers": config.num_hidden_layers}
    found |= {"device": device_name(device), "with_start_s": round(time.time() - start, 1)}
    out.with_suffix(".json").write_text(json.dumps(found), "utf-8")


# ---- command line


def _made(model: str) -> str:
    versions = f"hfsparse {hfsparse.__version__}, torch {torch.__version__}"
    return f"{Path(model).name}, {versions}, transformers {transformers.__version__}"


def _numbers(words: str) -> tuple[int, ...]:
    return tuple(int(word) for word in words.split(","))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("model", help="folder of the 32K model")
    add("--out", type=Path, required=True)
    for stage in ("make", "judge", "cost", "tables"):
        add(f"--{stage}", action="store_true")
    add("--limit", type=float, default=570, help="seconds, after which it ends in order")
    add("--gpus", type=int, help="how many to use; all of them if not given")
    add("--workers", type=int, default=4, help="judge: processes a GPU")
    add("--dtype", default="auto")
    add("--lengths", type=_numbers, default=(4096, 8192), help="of calibration prompts")
    add("--samples", type=int, default=6, help="calibration prompts a length")
    add("--density", type=float, default=0.15, help="pair density of plans for prompts")
    add("--share", type=float, default=0.25, help="cache share of plans for the cache")
    add("--at", type=_numbers, default=(8192, 24576, 32768), help="lengths of trials")
    add("--full-until", type=int, default=24576, help="longer ones get a third of the trials")
    add("--trials", type=int, default=304, help="texts a length, over all tasks that count")
    add("--pilot", type=int, default=8, help="texts a task that show whether it counts")
    add("--shape", default="llama-3.1-8b", help="cost: random weights of this shape")
    add("--methods", help="cost: some of them, by commas")
    add("--arm-limit", type=float, default=500, help="cost: seconds of one method")
    add("--cost-lengths", help="cost: other lengths")
    add("--cost-layers", type=int, help="cost: so many layers in place of the shape's")
    add("--cost-of", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.start = time.time()
    end_in_order()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    count = torch.cuda.device_count() if given.gpus is None else given.gpus
    given.devices = [f"cuda:{i}" for i in range(count)] or ["cpu"]
    given.out.mkdir(parents=True, exist_ok=True)
    if given.cost_of:
        return cost_of(given)
    try:
        for stage in (make, judge, cost):
            if getattr(given, stage.__name__):
                stage(given)
    except UsageError as error:
        sys.exit(f"error: {error}")
    if given.tables:
        text = tables(given.out)
        (given.out / "methods.md").write_text(text, "utf-8")
        print(text)
