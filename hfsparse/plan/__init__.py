"""The plan: how every head of a model attends, as a YAML file that people read, diff and share."""

from hfsparse.plan.parts import Below, Layer, ModelId, PlanError, PlanMismatch
from hfsparse.plan.plan import Plan

__all__ = ["Below", "Layer", "ModelId", "Plan", "PlanError", "PlanMismatch"]
