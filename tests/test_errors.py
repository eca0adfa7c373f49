"""Every error that a user can meet is an `hfsparse.Error`; all others keep their traceback."""

import ast
import builtins
import importlib
import pkgutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import hfsparse
import hfsparse_eval
from hfsparse import errors
from hfsparse.cli import app
from hfsparse.patcher import memory
from hfsparse.patterns.block_topk import BlockTopK
from hfsparse.patterns.streaming import Streaming
from hfsparse.plan import Plan, PlanError, PlanMismatch
from hfsparse.selectors.quest import Quest
from tests.test_layers import TEXTS

# Raised as Python's own, and why no user meets them so.
INSIDE = {
    "hfsparse": {"AttributeError": "what a module without a name says"},
    "hfsparse.patcher.supported": {"AttributeError": "what an object without a name says"},
    "hfsparse.reading": {"ValueError": "callers name the file"},
    "hfsparse.plan.nodes": {"ValueError": "a problem of the plan's first line"},
    "hfsparse.plan.importers.form": {"ValueError": "`no_plan` names the file"},
    "hfsparse.lists.places": {"ValueError": "caches make contiguous buffers alone"},
    "hfsparse.kernels.triton.append": {"ValueError": "longer prompts are appended by PyTorch"},
    "hfsparse.kernels.triton.prefill": {"ValueError": "`why_not` asks before"},
    "hfsparse.runtime.graphs": {"RuntimeError": "such a step is not recorded"},
    "hfsparse.runtime.graphs.obstacles": {"RuntimeError": "such a step is not recorded"},
    "hfsparse.runtime.graphs.recording": {
        "RuntimeError": "such a step is not recorded",
        "TypeError": "such a step is not recorded",
    },
    "hfsparse_eval.tasks": {"ValueError": "tasks are named in this tree alone"},
    "hfsparse_eval.tasks.own_questions": {"ValueError": "`read` names file and line"},
    "hfsparse_eval.arms.modelopt": {"ValueError": "a result line says it, and the run goes on"},
}


def public_classes():
    """Exceptions of the tree, after all of it that can be imported here is."""
    for package in (hfsparse, hfsparse_eval):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
    todo, classes = [Exception], set()
    while todo:
        below = todo.pop().__subclasses__()
        classes |= {each for each in below if each.__module__.startswith("hfsparse")}
        todo += below
    return classes


def builtin_raises():
    """(module, builtin exception) of each `raise` of one, by that name."""
    for module, text in TEXTS.items():
        for node in ast.walk(text):
            if isinstance(node, ast.Raise) and node.exc is not None:
                named = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                name = getattr(named, "id", "")
                kind = getattr(builtins, name, None)
                if isinstance(kind, type) and issubclass(kind, Exception):
                    yield module, name


def test_every_exception_of_the_tree_is_an_error():
    assert {"PlanMismatch", "Infeasible"} <= {each.__name__ for each in public_classes()}
    assert [each for each in public_classes() if not issubclass(each, hfsparse.Error)] == []


def test_no_builtin_exception_is_raised_that_a_user_could_meet():
    found = {pair for pair in builtin_raises() if pair[1] not in INSIDE.get(pair[0], {})}
    assert not found, f"raise an Error of hfsparse.errors: {sorted(found)}"


def test_the_base_is_on_the_face_and_needs_no_torch():
    code = (
        "import sys, hfsparse; assert hfsparse.Error.__module__ == 'hfsparse.errors';"
        "assert 'Error' in hfsparse.__all__; assert {*hfsparse.__all__} <= {*dir(hfsparse)};"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (PlanError, PlanMismatch) == (errors.PlanError, errors.PlanMismatch)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Streaming(sink=-1),
        lambda: BlockTopK(share=2.0),
        lambda: Quest(share=0.0),
        lambda: Plan.load("nowhere.yaml"),
        lambda: Plan.loads("hfsparse: 1"),
        lambda: hfsparse.patch(None),
        lambda: hfsparse.unpatch(None),
        lambda: hfsparse.explain(None),
        lambda: hfsparse.profile(None, None, method="none"),
    ],
)
def test_what_cannot_be_used_is_an_error_and_a_value_error(wrong):
    with pytest.raises(hfsparse.Error) as refused:
        wrong()
    assert isinstance(refused.value, ValueError)


def test_an_error_is_still_what_it_was_before():
    kinds = {
        errors.HandleError: (errors.PatchError, TypeError, AttributeError),
        memory.OutOfMemoryError: (torch.cuda.OutOfMemoryError, RuntimeError),
        PlanMismatch: (PlanError, ValueError),
    }
    for kind, before in kinds.items():
        error = kind("why")
        assert isinstance(error, (hfsparse.Error, ValueError))
        assert all(isinstance(error, each) for each in before)
        assert str(error) == "why"


@pytest.mark.parametrize("kind", [ValueError, TypeError, KeyError, torch.cuda.OutOfMemoryError])
def test_a_foreign_exception_keeps_its_traceback_on_the_command_line(kind, monkeypatch):
    def fail(path):
        raise kind("of another package")

    fail.__module__ = "hfsparse.plan"  # where it is raised says nothing
    monkeypatch.setattr(Plan, "load", fail)
    result = CliRunner().invoke(app, ["show", "plan.yaml"])
    assert type(result.exception) is kind
    assert result.exception.__traceback__ is not None
    assert "error: " not in result.output


def test_an_error_of_ours_is_one_line_on_the_command_line(monkeypatch):
    def fail(path):
        raise memory.OutOfMemoryError("out of memory: give less")

    monkeypatch.setattr(Plan, "load", fail)
    result = CliRunner().invoke(app, ["show", "plan.yaml"])
    assert (result.exit_code, result.stderr) == (1, "error: out of memory: give less\n")
