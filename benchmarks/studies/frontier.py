"""Every selector and every pattern on the same texts: what is lost at which share of the keys.

    python -m benchmarks.studies.frontier MODEL --out DIR --ask decode [--lengths 8192,24576]
        [--texts 96] [--batch 32] [--arms REGEX] [--shares 0.02,0.06,0.12,0.25] [--seconds 480]
    python -m benchmarks.studies.frontier MODEL --out DIR --ask prefill|whole …
    python -m benchmarks.studies.frontier --out DIR --tables --picture FILE

All heads of all layers follow one arm. Texts hide facts, and one is asked for at their end (the
puzzles of `studies/methods`); the right answer is read token by token, and counts as said if each
of its tokens is the model's first choice. `decode`: the prompt but its last token is read densely,
once for all arms; that token and the answer are decode steps under the arm. `prefill`: the prompt
is read under the arm, the answer densely. `prose`, beside them: perplexity over the dense model's,
of the last tokens of long texts, read in steps or in the prompt. `whole`: the answer is part of the
prompt that is read under the arm; of prose its second half is judged.

Share is what was read: of decode, keys over all keys; of prompts, causal pairs. Index is the bytes
that a selector keeps of a token, over those of its key and value. What an arm costs in time is
measured by benchmarks/decode.py and benchmarks/prefill.py.
"""

from __future__ import annotations

import argparse
import re
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

import hfsparse
from benchmarks.common.facts import SEED, judge, make_text, read, tail_of
from benchmarks.common.journal import Journal
from benchmarks.common.journal import read as read_journal
from hfsparse.interval import interval
from hfsparse.lists.lengths import Lengths
from hfsparse.models.loading import device_name, load
from hfsparse.models.logits import read_logits
from hfsparse.models.names import text_decoder
from hfsparse.models.window import context_window
from hfsparse.patterns import PATTERNS
from hfsparse.plan import Layer, ModelId, Plan
from hfsparse.plan.files import DataFile
from hfsparse.profiler.prompts.calibration import fill, make_prompts
from hfsparse.profiler.verify.trials import Trial
from hfsparse.runtime.layer_plan import layer_plans_of, observed
from hfsparse.selectors import SELECTORS

FEWEST = 2
PROSE = 64  # last tokens of a long text
DENSE = "dense"
ASKED = "decode", "prefill", "whole"
CHUNK = 8192  # tokens of a prompt that are read together, so that a batch fits
CALIBRATE = {4096: 2, 8192: 2, 24576: 2}  # tokens of prompts: how many

# By arm: a kind, and its parameters beside the share.
CHOOSERS = {
    "quest, pages": ("quest", {}),
    "quest, pages by bounds over 16": ("quest", {"bound": 16}),
    "quest, units of 16": ("quest", {"unit": 16}),
    "quest, units of 8": ("quest", {"unit": 8}),
    "quest, units of 16, top_p 0.9": ("quest", {"unit": 16, "top_p": 0.9}),
    "quest, pages, means": ("quest", {"means": True}),
    "quest, units of 16, means": ("quest", {"unit": 16, "means": True}),
    "lowrank 32, pages": ("lowrank", {"unit": 64}),
    "lowrank 32, units of 16": ("lowrank", {"unit": 16}),
    "lowrank 32, units of 8": ("lowrank", {"unit": 8}),
    "lowrank 32, tokens": ("lowrank", {"unit": 1}),
    "lowrank 32, units of 16, 8 bits": ("lowrank", {"unit": 16, "bits": 8}),
    "lowrank 16, units of 16, 8 bits": ("lowrank", {"rank": 16, "unit": 16, "bits": 8}),
    "lowrank 32 by keys (Loki), units of 16": ("lowrank", {"unit": 16, "by": "keys"}),
    "lowrank 32 by keys (Loki), tokens": ("lowrank", {"unit": 1, "by": "keys"}),
    "channels 16, units of 16": ("channels", {"unit": 16}),
    "channels 16, tokens": ("channels", {"unit": 1}),
    "landmarks": ("landmarks", {}),
    "lsh, units of 16": ("lsh", {"unit": 16}),
    "centroids, tokens": ("centroids", {}),
    "centroids of 1,024 tokens, tokens": ("centroids", {"segment": 1024}),
    "centroids of 1,024 tokens, half as many, tokens": (
        "centroids",
        {"segment": 1024, "clusters": 4},
    ),
}
PATTERN_ARMS = {
    "streaming": [{"sink": 64, "recent": 64, "recent_per_token": s} for s in (0.05, 0.1, 0.2)],
    "block_topk": [{"share": s, "min_blocks": 2} for s in (0.05, 0.1, 0.2, 0.35)],
    "antidiagonal": [{"tau": t, "max_share": 1.0} for t in (0.8, 0.9, 0.95)],
    "vertical_slash": [{"columns": c, "diagonals": c // 4} for c in (256, 512, 1024)],
    "flexprefill": [{"gamma": g, "max_share": 1.0} for g in (0.7, 0.8, 0.9)],
    "sparge": [{"tau": t, "max_share": 1.0} for t in (0.7, 0.8, 0.9)],
    "energy": [{"alpha": a, "max_share": 1.0} for a in (0.3, 0.1, 0.03)],
    "sample": [{"alpha": a, "max_share": 1.0} for a in (0.8, 0.9, 0.95)],
    "hip": [{"share": s, "recent": 256} for s in (0.05, 0.1, 0.2)],
    "strided": [{"stride": s} for s in (8, 16)] + [{"stride": 0, "random": n} for n in (4, 8)],
}
for kind in ("block_topk", "antidiagonal", "energy"):
    PATTERN_ARMS[kind] += [{**more, "means": True} for more in PATTERN_ARMS[kind]]


# ---- texts


def make_prose(tokenizer, length: int, index: int) -> Trial:
    """A text without questions, whose last tokens count."""
    rng = Random(f"frontier prose {index}")
    ids = [token for part in fill(tokenizer, "prose", length, rng) for token in part][:length]
    return Trial("prose", ids[:-PROSE], [([], ids[-PROSE:])])


# ---- arms


def plan_of(model_id: ModelId, word: object, phase: str, data: dict) -> Plan:
    """Every head by one selector or one pattern."""
    full = Plan.full(model_id)
    layer = full.layers[0]
    if phase == "decode":
        layer = Layer(layer.prefill, layer.cache, ("it",) * model_id.kv_heads)
    else:
        layer = Layer(("it",) * model_id.q_heads, layer.cache, layer.decode)
    name = getattr(word, "data", None)
    tables = {} if name is None else {name: data[name]}
    return replace(full, patterns={"it": word}, layers=(layer,) * model_id.layers, data=tables)


def list_arms(phase: str, shares: list[float], wanted: str) -> dict[str, object]:
    """Selectors or patterns by name; kinds that are not there are left out."""
    made = {}
    if phase == "decode":
        for name, (kind, more) in CHOOSERS.items():
            for share in shares if kind in SELECTORS else []:
                made[f"{name} @{share:g}"] = SELECTORS[kind](share, FEWEST, **more)
    else:
        for kind, settings in PATTERN_ARMS.items():
            for more in settings if kind in PATTERNS else []:
                said = ", ".join(f"{k} {v:g}" for k, v in more.items())
                made[f"{kind} {said}".strip()] = PATTERNS[kind](**more)
    return {name: word for name, word in made.items() if re.search(wanted, name)}


@torch.inference_mode()
def calibrate(model, tokenizer, words) -> dict[str, DataFile]:
    """The tables that selectors read, of prompts that no text is among."""
    needed = {w.data: w for w in words if hasattr(w, "calibrate")}
    if not needed:
        return {}
    found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def observe(module, q, k, v, logits) -> None:
        seen = SimpleNamespace(q=q, k=k, v=v, logits=logits, layer=module.layer_idx)
        for name, selector in needed.items():
            for part, t in selector.calibrate(seen).items():
                found[name][part].append(t.float().cpu())

    layers, window = ModelId.of(model).layers, context_window(model.config)
    counts = {n: count for n, count in CALIBRATE.items() if window is None or n <= window}
    with hfsparse.patch(model), observed(model, observe):
        made = (make_prompts(tokenizer, n, count, SEED, None) for n, count in counts.items())
        for prompt in chain.from_iterable(made):
            text_decoder(model)(input_ids=prompt.ids.to(model.device), use_cache=False)
    means = {
        name: {
            part: torch.stack(each).unflatten(0, (-1, layers)).mean(0)
            for part, each in parts.items()
        }
        for name, parts in found.items()
    }
    return {name: DataFile.of(f"{name}.safetensors", parts) for name, parts in means.items()}


# ---- reading


def filled(model, dense: list[tuple[Tensor, Tensor]], tokens: int) -> DynamicCache:
    """A cache of the patch that is on the model, with keys and values that were read before."""
    cache = DynamicCache()
    cache.layers = []
    for layer_plan, (k, v) in zip(layer_plans_of(model), dense, strict=True):
        layer = layer_plan.new_cache(reserve=tokens + 2 * PROSE)
        layer.lazy_initialization(k, v)
        lengths = Lengths([0] * len(k), [tokens] * len(k), tokens)
        for store in layer.stores:
            at = list(store.group.heads)
            store.append(k[:, at, :tokens], v[:, at, :tokens], lengths)
        layer.seen = layer.stored = tokens
        layer.rows = lengths.rows
        cache.layers.append(layer)
    return cache


@torch.inference_mode()
def decode_steps(model, cache, last: Tensor, values: list[list[int]]) -> dict[str, np.ndarray]:
    """The prompt's last token `[B, 1]` and the values but their last token, a token at a time."""
    given = torch.cat([last, tail_of(values, last.device)[:, :-1]], 1)
    hidden = torch.cat([read(model, ids, cache) for ids in given.split(1, 1)], 1)
    return judge(read_logits(model, hidden), values)


def batches(tokenizer, given, length: int):
    """Name, prompts `[B, length]` and values, of texts and of prose."""
    for kind, make, count in (
        ("text", make_text, given.texts),
        ("prose", make_prose, given.texts // 8 if given.prose is None else given.prose),
    ):
        for first in range(0, count, given.batch):
            at = range(first, min(first + given.batch, count))
            texts = [make(tokenizer, length, i) for i in at]
            names = [f"{kind}/{text.task}/{length}/{i}" for text, i in zip(texts, at, strict=True)]
            yield names, torch.tensor([t.text for t in texts]), [t.turns[0][1] for t in texts]


def ask_decode(model, names, ids, values, arms, note) -> None:
    todo = {arm: plan for arm, plan in arms.items() if f"{arm}|{names[0]}" not in note.rows}
    if not todo:
        return
    ids = ids.to(model.device)
    with hfsparse.patch(model), torch.inference_mode():
        cache = DynamicCache()
        for at in range(0, ids.shape[1] - 1, CHUNK):
            read(model, ids[:, at : min(at + CHUNK, ids.shape[1] - 1)], cache)
        dense = [layer.stores[0].held() for layer in cache.layers]
    for arm, plan in todo.items():
        with hfsparse.patch(model, plan) as handle, torch.inference_mode():
            cache = filled(model, dense, ids.shape[1] - 1)
            index = [t.nbytes for x in cache.layers for s in x.stores for t in s.index.values()]
            kept = [t.nbytes for x in cache.layers for s in x.stores for t in s.held()]
            found = decode_steps(model, cache, ids[:, -1:], values)
            share = handle.stats().decode_share
        note(arm, names, found, share, sum(index) / sum(kept))
        del cache


def ask_prefill(model, names, ids, values, arms, note) -> None:
    ids = ids.to(model.device)
    tail = tail_of(values, ids.device)
    for arm, plan in arms.items():
        if f"{arm}|{names[0]}" in note.rows:
            continue
        with hfsparse.patch(model, plan) as handle, torch.inference_mode():
            cache = DynamicCache()
            last = read(model, ids, cache)[:, -1:]
            hidden = [last]
            if tail.shape[1] > 1:
                hidden += [read(model, part, cache) for part in tail[:, :-1].split(16, 1)]
            found = judge(read_logits(model, torch.cat(hidden, 1)), values)
            share = handle.stats().pair_density
        note(arm, names, found, share, 0.0)
        del cache


def ask_whole(model, names, ids, values, arms, note) -> None:
    whole = torch.cat([ids, tail_of(values, ids.device)], 1).to(model.device)
    first = whole.shape[1] // 2 if names[0].startswith("prose") else ids.shape[1]
    wanted = values if first == ids.shape[1] else whole[:, first:].tolist()
    for arm, plan in arms.items():
        if f"{arm}|{names[0]}" in note.rows:
            continue
        with hfsparse.patch(model, plan) as handle, torch.inference_mode():
            hidden = read(model, whole[:, :-1], DynamicCache())[:, first - 1 :]
            found = judge(read_logits(model, hidden), wanted)
            share = handle.stats().pair_density
        note(arm, names, found, share, 0.0)


class Notes:
    """Rows of a journal, one a batch of texts and arm."""

    def __init__(self, log: Journal):
        self.log, self.rows = log, log.rows

    def __call__(self, arm, names, found, share, index) -> None:
        said, loss = found["said"].astype(int).tolist(), found["loss"].round(5).tolist()
        more = {"share": round(float(share), 5), "index": round(index, 5)}
        self.log.add(f"{arm}|{names[0]}", texts=list(names), said=said, loss=loss, **more)


def ask(given) -> None:
    model, tokenizer = load(given.model, "auto", "auto")
    made = (
        f"{Path(given.model).name}; {device_name(model.device)}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    note = Notes(Journal(given.out / f"{given.ask}.jsonl", made))
    words = list_arms(given.ask, given.shares, given.arms)
    data = calibrate(model, tokenizer, words.values())
    this = ModelId.of(model)
    arms = {DENSE: Plan.full(this)}
    arms |= {name: plan_of(this, word, given.ask, data) for name, word in words.items()}
    run = {"decode": ask_decode, "prefill": ask_prefill, "whole": ask_whole}[given.ask]
    start = time.time()
    for length in given.lengths:
        for names, ids, values in batches(tokenizer, given, length):
            if time.time() - start > given.seconds:
                return print("out of time: start this again, it goes on")
            run(model, names, ids, values, arms, note)
            print(f"{time.time() - start:.0f} s: {names[0]} of {length:,}", flush=True)


# ---- tables


def tables(given) -> None:
    for phase in ASKED:
        file = given.out / f"{phase}.jsonl"
        if file.exists():
            print(f"## {phase}\n\n{read_journal(file)[0]}\n")
            print("\n".join(table(file)) + "\n")


@dataclass
class Asked:
    """What a journal holds: texts by arm, kind and length, and what was read of them."""

    texts: dict[tuple[str, str, str], dict[str, tuple[int, float]]]  # said, nats a token
    costs: dict[tuple[str, str], list[tuple[float, float]]]  # shares and indexes by arm and length

    @classmethod
    def read(cls, file: Path) -> Asked:
        texts, costs = defaultdict(dict), defaultdict(list)
        for name, row in read_journal(file)[1].items():
            arm = name.split("|")[0]
            for text, said, loss in zip(row["texts"], row["said"], row["loss"], strict=True):
                kind, _, length, _ = text.split("/")
                texts[arm, kind, length][text] = said, loss
            costs[arm, length].append((row["share"], row["index"]))
        return cls(texts, costs)

    @property
    def arms(self) -> list[str]:
        return [*dict.fromkeys(arm for arm, _, _ in self.texts)]

    @property
    def lengths(self) -> list[str]:
        return sorted({length for _, _, length in self.texts}, key=int)

    def cost(self, arm: str, length: str) -> tuple[float, float]:
        """Means of the share and of the index; nan where it was not asked."""
        share, index = np.mean(self.costs.get((arm, length), [(np.nan, np.nan)]), 0)
        return float(share), float(index)

    def changes(self, arm: str, kind: str, length: str) -> np.ndarray:
        """By text: points that the dense model's answer lost, and nats a token, `[texts, 2]`."""
        dense, mine = (self.texts.get((each, kind, length), {}) for each in (DENSE, arm))
        both = [(dense[name], mine[name]) for name in mine if name in dense]
        found = [(100.0 * (a[0] - b[0]), b[1] - a[1]) for a, b in both]
        return np.array(found).reshape(-1, 2)


def table(file: Path) -> list[str]:
    """A line an arm: by length what was read and lost, in points, nats a token and perplexity."""
    asked = Asked.read(file)
    parts = "share", "lost, points", "nats", "prose"
    heads = [f"{int(n):,}: {part}" for n in asked.lengths for part in parts]
    lines = [f"| arm | index | {' | '.join(heads)} |", f"|{' --- |' * (len(heads) + 2)}"]
    for arm in asked.arms:
        cells, index = [], 0.0
        for length in asked.lengths:
            share, index = asked.cost(arm, length)
            cells += [f"{share:.3f}", *told(asked, arm, length)]
        lines.append(f"| {arm} | {index:.3f} | {' | '.join(cells)} |")
    return lines


def told(asked: Asked, arm: str, length: str) -> list[str]:
    """Points lost, nats a token, and the perplexity of prose over the dense model's."""
    cells = ["", "", ""]
    if len(found := asked.changes(arm, "text", length)):
        (lost, nats), (low, high) = found.mean(0), interval(found[:, 0], worst=100.0)
        error = 1.96 * found[:, 1].std(ddof=1) / len(found) ** 0.5
        cells[:2] = [
            f"{lost:.1f} [{low:.1f}, {high:.1f}], {len(found)}",
            f"{nats:.3f} ± {error:.3f}",
        ]
    if len(found := asked.changes(arm, "prose", length)):
        cells[2] = f"{np.exp(found[:, 1].mean()):.3f}"
    return cells


def draw(file: Path, picture: Path) -> None:
    """Nats lost at each share, a panel a length and a line for what differs in its share alone."""
    from matplotlib.figure import Figure

    asked = Asked.read(file)
    figure = Figure(figsize=(5 * len(asked.lengths) + 3, 4.4), layout="constrained")
    panels = figure.subplots(1, len(asked.lengths), squeeze=False, sharey=True)[0]
    lines: dict[str, list[str]] = defaultdict(list)
    for arm in asked.arms:
        if arm != DENSE:
            lines[arm.split(" @")[0] if "@" in arm else arm.split()[0]].append(arm)
    for axes, length in zip(panels, asked.lengths, strict=True):
        for i, (name, arms) in enumerate(lines.items()):
            found = [(arm, asked.changes(arm, "text", length)) for arm in arms]
            at = [(asked.cost(arm, length)[0], t[:, 1].mean()) for arm, t in found if len(t)]
            mark, colour = "os^vD*"[i // 10 % 6], f"C{i % 10}"
            axes.plot(*zip(*sorted(at), strict=True), marker=mark, color=colour, label=name)
        axes.set_yscale("symlog", linthresh=0.02)
        axes.set(title=f"{int(length):,} tokens", xlabel="share that was read")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("nats a token of the answer lost")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize=7)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ask", choices=ASKED)
    parser.add_argument("--lengths", type=numbers(int), default=[8192, 24576])
    parser.add_argument("--texts", type=int, default=96)
    parser.add_argument("--prose", type=int, help="texts of it; an eighth of the others")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--arms", default="", help="a regular expression")
    parser.add_argument("--shares", type=numbers(float), default=[0.02, 0.06, 0.12, 0.25])
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--picture", type=Path, help="of decode, as a PNG")
    given = parser.parse_args()
    if given.ask:
        ask(given)
    if given.tables:
        tables(given)
    if given.picture:
        draw(given.out / "decode.jsonl", given.picture)


def numbers(kind: type):
    """A reader of numbers with commas between."""
    return lambda text: [kind(each) for each in text.split(",")]


if __name__ == "__main__":
    main()
