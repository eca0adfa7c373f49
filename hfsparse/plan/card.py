"""The page of a plan's repository on the hub, and all that lies beside it there.

address = write_folder(plan, "plan.yaml", folder, "ORG/REPO")   # README.md, heads.png, tables
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from hfsparse.plan import headmap
from hfsparse.plan.hub import SCHEME
from hfsparse.plan.plan import Plan
from hfsparse.writing import write_whole

PAGE, PICTURE = "README.md", "heads.png"
HUB_MODEL = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)


def write_folder(plan: Plan, file: str, folder: Path, repo: str) -> str:
    """Write what a plan's repository holds into an empty folder; the plan's address there.

    file: the plan's name there.
    """
    plan.save(folder / file)
    headmap.png(plan, folder / PICTURE)
    address = f"{SCHEME}{repo}/{file}"
    write_whole(folder / PAGE, page(plan, file, address).encode())
    return address


def page(plan: Plan, file: str, address: str) -> str:
    """The card: head map, proof, budgets, and how to use the plan."""
    model, made = plan.model, plan.made
    origin = "{source} ({licence})".format_map(made) if {"source", "licence"} <= {*made} else None
    parts = [
        _front(made),
        f"# A sparse attention plan for {made.get('model') or model.class_name}\n",
        f"![For each layer and head, what it reads of a prompt, keeps in the cache, and reads for "
        f"a new token]({PICTURE})\n",
        f"For {model.class_name} with {model.sizes}, fingerprint `{model.fingerprint}`. "
        f"The plan is [{file}]({file}), its hash `{plan.hash()}`."
        + (f" It was converted from {origin}.\n" if origin else "\n"),
        f"## Proof\n\n{_proof(plan)}\n",
        f"## Budgets\n\n{_budgets(plan)}\n",
        f"## Use\n\n{_use(plan, address)}\n",
        f"## Heads\n\n```text\n{headmap.text(plan).plain}\n```\n",
    ]
    return "\n".join(parts)


def _front(made: dict[str, Any]) -> str:
    """What the hub reads: its tags, and the model that the plan is for."""
    model = str(made.get("model"))
    facts = {
        "library_name": "hfsparse",
        "tags": ["hfsparse", "sparse-attention"],
        **({"base_model": model} if HUB_MODEL.fullmatch(model) else {}),
    }
    return f"---\n{yaml.safe_dump(facts, sort_keys=False)}---\n"


def _proof(plan: Plan) -> str:
    if plan.unproved:
        return f"Verified by nothing: {plan.unproved}. Compare it with dense on your own questions."
    if told := plan.verified.get("told"):
        return f"Verified by the profiler: {told}."
    return "Not verified. Compare it with dense on your own questions: `hfsparse eval custom`."


def _budgets(plan: Plan) -> str:
    """What the plan states that it computes, keeps and reads, by length."""
    method = f"Chosen by the method {plan.made.get('method') or 'that nobody named'}."
    names = list(dict.fromkeys(name for row in plan.expected.values() for name in row))
    if not names:
        return f"{method} The plan states no figures."
    lines = [method, "", f"| tokens | {' | '.join(names)} |", "| ---: |" + " ---: |" * len(names)]
    for length, row in sorted(plan.expected.items()):
        cells = (f"{row[name]:.3f}" if name in row else "-" for name in names)
        lines.append(f"| {length} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _use(plan: Plan, address: str) -> str:
    return f"""```python
import hfsparse

with hfsparse.patch(model, "{address}") as handle:  # a model of transformers
    model.generate(**inputs)
    print(handle.stats())
```

```sh
hfsparse check {address} MODEL
hfsparse generate MODEL --plan {address} --prompt-file prompt.txt
```

To have this very plan and no later one, pin it: `{address}#{plan.hash()[:19]}`."""
