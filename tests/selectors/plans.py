"""Plans whose heads all read what one selector chooses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hfsparse.plan import Below, ModelId, Plan
from hfsparse.plan.files import DataFile
from hfsparse.selectors.centroids import Centroids
from hfsparse.selectors.channels import Channels
from hfsparse.selectors.landmarks import Landmarks
from tests.patcher.families import own_window
from tests.patterns.matrix import table_of


def plan_of(model, selector: Any, below: int = 0) -> Plan:
    """Full caches, every kv head of every layer that may be sparse reads what a selector chooses.

    Any selector: one that reads a table is given one.
    """
    this = ModelId.of(model)
    full = Plan.full(this).layers[0]
    mine = replace(full, decode=("it",) * this.kv_heads)
    layers = tuple(full if windowed else mine for windowed in own_window(model))
    table = table_of(selector, this.layers, this.kv_heads, this.head_dim)
    data = table and {selector.data: DataFile.of(f"{selector.data}.safetensors", table)}
    return Plan(this, {"it": selector}, layers, Below(decode=below), data=data or {})


def labelled(model) -> Plan:
    """Three pages, of which one is chosen, by labels: kernels keep and score them."""
    return plan_of(model, Channels(0.06, 3, unit=64, bits=8, channels=3))


def means_of_labelled(model) -> Plan:
    """As `labelled`, and what is left out enters by its means."""
    return plan_of(model, Channels(0.06, 3, unit=64, bits=8, channels=3, means=True))


def refreshed(model) -> Plan:
    """By landmarks, which no kernel keeps, and read again by three more steps; top_p."""
    return plan_of(model, Landmarks(0.9, 2, refresh=4, top_p=0.6))


def segmented(model) -> Plan:
    """By clusters of a row, which are made anew between steps."""
    return plan_of(model, Centroids(0.2, 2, clusters=2, segment=256))
