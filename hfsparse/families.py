"""What the census of families found of each family of transformers; docs/families.md shows it.

    verdict("t5", "T5ForConditionalGeneration")    # "refused in a sentence: it is an …"

`make census` writes families.json: `transformers`, the version that was asked about; `answers`, by
`TYPE/CLASS` or a variant's name; `variants`, the model type of each variant.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".json")
PAGE = "docs/families.md"
OUTCOMES = {
    "right": "accepted and right",
    "wrong": "accepted, tokens, logits or cache wrong",
    "useless": "accepted, then every call is refused or fails",
    "uncompared": "accepted; stock takes no bare text, not compared",
    "refused": "refused in a sentence",
    "unexplained": "refused in words that name no reason",
    "crash": "patch ends in another exception",
    "unbuilt": "not built here",
}


@cache
def record() -> dict[str, Any]:
    """The census's record, as it lies in its file."""
    return json.loads(RECORD.read_text())


def verdict(model_type: str, class_name: str | None = None) -> str:
    """What the census says of a family, in words: of its class where it was asked, else the best
    that was found of its type, by a variant too."""
    answers, variants = record()["answers"], record()["variants"]
    own = [name for name in answers if variants.get(name, name.partition("/")[0]) == model_type]
    if not own:
        version = record()["transformers"]
        return f"not asked: no causal or image-text family of transformers {version}"
    ranked = sorted(own, key=lambda name: [*OUTCOMES].index(answers[name]["outcome"]))
    exact = f"{model_type}/{class_name}"
    chosen = exact if exact in own else ranked[0]
    said = answers[chosen]
    words = OUTCOMES[said["outcome"]] + (f": {said['reason']}" if "reason" in said else "")
    best = ranked[0]
    if best != chosen and {said["outcome"], answers[best]["outcome"]} == {"refused", "right"}:
        words += f"; right as {best.replace('/', ', ')}"
    return words if chosen == exact else f"as {chosen.replace('/', ', ')} {words}"


def counted() -> str:
    """How many families are accepted and right, of how many of which transformers."""
    whole = [said for name, said in record()["answers"].items() if name not in record()["variants"]]
    right = sum(said["outcome"] == "right" for said in whole)
    return f"{right} of {len(whole)} families of transformers {record()['transformers']}"
