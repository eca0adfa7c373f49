"""plans/: the searches that other projects published, as plans of ours, and the page about them.

    python -m benchmarks.studies.published.plans SOURCES --out plans

SOURCES holds what the projects publish, a folder a form: `minference/*.json`, `duo/MODEL/` (both
its files) and `moa/*.json`, of the names below. No weights are read, and nothing is verified.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.studies.published.configs import config
from hfsparse.plan import Plan
from hfsparse.plan.importers import import_plan

ROOT = Path(__file__).parents[3]
SOURCES = {
    "minference": "https://github.com/microsoft/MInference/tree/main/minference/configs",
    "duo": "https://github.com/mit-han-lab/duo-attention/tree/main/attn_patterns",
    "moa": "https://github.com/thu-nics/MoA/tree/main/examples",
}
HOLDERS = {
    "minference": "Copyright (c) Microsoft Corporation",
    "duo": "Copyright (c) 2024 MIT HAN Lab",
    "moa": "Copyright (c) 2024 NICS-EFC Lab of Tsinghua University",
}
UNVERIFIED = "none: converted from a published search, not verified by us"


@dataclass(frozen=True)
class Published:
    """A search that a project published."""

    name: str  # of the plan
    file: str  # among the sources
    model: str  # its hub name
    more: tuple[str, ...] = ()  # what else gets lost

    @property
    def form(self) -> str:
        return self.name.split(":")[0]

    @property
    def shipped(self) -> str:
        return f"{self.name.replace(':', '-', 1)}.yaml"


PUBLISHED = (
    Published(
        "minference:llama-3.1-8b-instruct",
        "Llama_3.1_8B_Instruct_128k_kv_out_v32_fit_o_best_pattern_v2.json",
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
    Published(
        "minference:phi-3-mini-128k-instruct",
        "Phi_3_mini_128k_instruct_kv_out_v32_fit_o_best_pattern.json",
        "microsoft/Phi-3-mini-128k-instruct",
        (
            "the model was published twice: this plan is for the config whose long factors begin "
            "with 1.07; whether the search ran on that one is not said",
        ),
    ),
    Published(
        "minference:qwen2.5-7b-instruct",
        "Qwen2.5_7B_Instruct_128k_instruct_kv_out_v32_fit_o_best_pattern.json",
        "Qwen/Qwen2.5-7B-Instruct",
        (
            "the search's name says 128k tokens, which the model reads with YaRN: this plan is for "
            "the published config, which has none and a window of 32,768",
        ),
    ),
    Published(
        "minference:qwen2.5-7b-instruct-1m",
        "Qwen2.5_7B_Instruct_1M.json",
        "Qwen/Qwen2.5-7B-Instruct-1M",
        ("dual chunk attention, which the config asks for, is nothing that transformers does",),
    ),
    Published(
        "duo:llama-2-7b-32k-instruct",
        "Llama-2-7B-32K-Instruct",
        "togethercomputer/Llama-2-7B-32K-Instruct",
    ),
    Published(
        "duo:llama-3.1-8b-instruct",
        "Meta-Llama-3.1-8B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
    ),
    Published(
        "duo:mistral-7b-instruct-v0.2",
        "Mistral-7B-Instruct-v0.2",
        "mistralai/Mistral-7B-Instruct-v0.2",
    ),
    Published(
        "moa:llama-3-8b-instruct-262k",
        "gradientai--Llama-3-8B-Instruct-262k.json",
        "gradientai/Llama-3-8B-Instruct-262k",
    ),
    Published(
        "moa:llama-3.2-1b-instruct",
        "meta-llama--Llama-3.2-1B-Instruct.json",
        "meta-llama/Llama-3.2-1B-Instruct",
    ),
    Published(
        "moa:vicuna-7b-v1.5-16k",
        "lmsys--vicuna-7b-v1.5-16k.json",
        "lmsys/vicuna-7b-v1.5-16k",
    ),
)


def convert(search: Published, sources: Path) -> Plan:
    """The plan of a search, which tells where it is from and what it lost on the way."""
    plan, lost = import_plan(search.form, sources / search.form / search.file, config(search.model))
    plan.made |= facts(search) | {"lost": [*lost, *search.more]}
    return plan


def facts(search: Published) -> dict[str, Any]:
    """What `made` says of where a plan is from."""
    return {
        "model": search.model,
        "source": SOURCES[search.form],
        "licence": f"MIT, {HOLDERS[search.form]}",
        "verified": {"told": UNVERIFIED},
    }


# ---- the page

HEAD = """# Plans that are shipped

Searches that other projects published for models that many people run, converted by `hfsparse import`. **None was verified by us**: `patch` warns of that. Measure what one costs on your own questions: [evaluating](../docs/eval.md).

```python
hfsparse.patch(model, "duo:llama-3.1-8b-instruct")
```

`hfsparse plans` lists them by model, and every command that takes a plan takes a name. A name is its method and its model; the file has `-` in place of `:`. A plan fits models of the same shape, rope and windows, so it fits a fine-tune; another configuration is refused.

| name | model | its hash begins |
| --- | --- | --- |
"""  # noqa: E501, a paragraph is a line
LOST = """
## What gets lost

Each plan has its own list under `made: {lost: …}`, with layers and heads. In all of a kind:

"""
TAIL = """
## What isn't here

Every search that was at hand could be converted. Others of the same forms weren't at hand: MInference's for Qwen2.5-14B-1M, Yi-9B, GLM-4-9B-1M and larger models, DuoAttention's for Llama-3-8B-1048k and Mistral v0.3, MoA's for larger models. `hfsparse import` converts them on your machine, with the config of the model that they were made for. Of models with code of their own, such as GLM-4, see first that transformers' class counts layers and heads alike.

## Make them again

```sh
make plans SOURCES=folder
```

The folder holds what the projects publish, `minference/`, `duo/` and `moa/`; `benchmarks/studies/published/plans.py` names the files, and `benchmarks/studies/published/configs.py` has the config values that the fingerprints are of. They were read in public copies of each model's `config.json`, of Llama-2-7B-32K-Instruct in a copy of LLaMA-2-7B-32K's, which it was tuned from.

## Licence of the sources

"""  # noqa: E501
MIT = """
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""  # noqa: E501


def page(plans: dict[str, Plan]) -> str:
    """plans/README.md, of the plans by name."""
    out = [HEAD]
    for name, plan in plans.items():
        out.append(f"| `{name}` | {plan.made['model']} | `{plan.hash()[:19]}` |\n")
    out.append(LOST)
    for form in SOURCES:
        said = _common([plan for name, plan in plans.items() if name.startswith(f"{form}:")])
        out += [f"- `{form}`:\n", *(f"  - {note}\n" for note in said)]
    out.append(TAIL)
    for form, source in SOURCES.items():
        out.append(f"- `{form}`: [{source.split('/', 5)[4]}]({source}), MIT. {HOLDERS[form]}\n")
    return "".join([*out, MIT])


def _common(plans: Iterable[Plan]) -> list[str]:
    """Their notes, each once, without layers and heads; those of one plan name its model."""
    found: dict[str, list[str]] = {}
    for plan in plans:
        for note in plan.made["lost"]:
            said = note if note.startswith("keys of") else note.split(": layer")[0]
            found.setdefault(said, []).append(plan.made["model"].split("/")[1])
    every = max(map(len, found.values()))
    return [
        said if len(models) == every else f"{said} ({', '.join(models)})"
        for said, models in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "plans")
    asked = parser.parse_args()
    plans = {search.name: convert(search, asked.sources) for search in PUBLISHED}
    asked.out.mkdir(exist_ok=True)
    for search in PUBLISHED:
        plans[search.name].save(asked.out / search.shipped)
        print(f"{plans[search.name].hash()[:19]}  {asked.out / search.shipped}")
    (asked.out / "README.md").write_text(page(plans), encoding="utf-8")


if __name__ == "__main__":
    main()
