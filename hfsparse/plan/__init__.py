"""The plan: how every head of a model attends, as a YAML file that people read, diff and share.

    plan = Plan.load("plan.yaml")

`plan` holds the class, `parts` what it is made of, `rules` and `layer_rules` what must hold of it.
`reader` (on `nodes`, strict YAML) and `writer` are its text, `words` the words of their messages.
`diff`, `headmap` and `importers` compare, draw and bring plans. `sources` opens one wherever it is
from, `hub` gets and puts it on the Hugging Face hub, `card` is its page there.
"""

from hfsparse.errors import PlanError, PlanMismatch
from hfsparse.plan.parts import Below, Layer, ModelId
from hfsparse.plan.plan import Plan

__all__ = ["Below", "Layer", "ModelId", "Plan", "PlanError", "PlanMismatch"]
