"""One script a claim: scripts stand alone, and use of the product what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import latents

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks").rglob("*.py"))
STUDIES = ROOT / "benchmarks" / "studies"


def names(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def imports(tree: ast.AST) -> list[tuple[str, str]]:
    """(module, name) of each import."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=names)
def test_no_script_imports_another_or_changes_the_path(file):
    tree = ast.parse(file.read_text("utf-8"))
    own = f"benchmarks.studies.{file.parent.name}" if file.parent.parent == STUDIES else None
    for module, name in imports(tree):
        assert module != "unittest.mock" or file.stem in ("ttft", "agreement"), "a mock of others"
        if module.startswith("benchmarks") and not (own and module.startswith(own)):
            assert f"{module}.{name}".startswith("benchmarks.common."), f"imports {module}"
    assert "sys.path" not in file.read_text("utf-8")


@pytest.mark.parametrize("file", FILES, ids=names)
def test_nothing_private_of_the_product_is_used(file):
    """No `_name` but of `self` and of other packages, and nothing set in a module of ours."""
    tree = ast.parse(file.read_text("utf-8"))
    ours = {
        name: module for module, name in imports(tree) if module.startswith("hfsparse") and name
    }
    assert not [name for name in ours if name.startswith("_")]
    targets = [
        target for node in ast.walk(tree) if isinstance(node, ast.Assign) for target in node.targets
    ]
    flat = [each for one in targets for each in getattr(one, "elts", [one])]
    assert not [ast.unparse(x) for x in flat if getattr(getattr(x, "value", 0), "id", 0) in ours]
    used = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]
    foreign = (
        "config._attn",
        "torch._dynamo",
        ".kernel._",
        "out._sparsity",
        "os._exit",
    )  # of other packages
    assert not [word for word in used if not any(mark in f".{word}" for mark in foreign)], used


CASES = (
    "decode --shape tiny --lengths 600 --tokens 12 --rounds 1",
    "ttft --shape tiny --lengths 600 --repeat 1",
    "short_prompts --shape tiny --lengths 100 --rounds 1",
    "ended --shape tiny --batch 2 --lengths 100 --tokens 40",
    "memory --shape tiny --lengths 600",
    "million --shape tiny --out OUT --tokens 2000 --new 12 --dense 600 --warm 300,200 --no-fused"
    " --chunk 700",
    "cpu_reference --lengths 256 --runs 1",
    "studies.interval --runs 2",
    "studies.decided benchmarks/results/proof/smollm2.md --replays 1",
)
if latents.exists("deepseek_v2"):  # cached as latents: 4.57 expands them before
    CASES += ("latent --shape tiny --lengths 600 --tokens 12 --rounds 1",)
OTHERS = "prefill cards host devices recall demo studies.extend studies.methods.study studies.proof"
OTHERS += " studies.proof_plans studies.evictions studies.shared_attention studies.star"
OTHERS += " studies.bits_answers studies.bits_ways context_parallel wire products lookup"
OTHERS += " studies.window_prices studies.fp8_prefill"
RUN = """
import importlib, runpy, shlex, sys
for line in sys.stdin.read().splitlines():
    script, *sys.argv[1:] = shlex.split(line)
    print("==", script, flush=True)
    if sys.argv[1:]:
        runpy.run_module(f"benchmarks.{script}", run_name="__main__")
    else:
        importlib.import_module(f"benchmarks.{script}").main
"""


def test_scripts_run_on_a_cpu_or_at_least_load(tmp_path):
    """All in one process: each would load torch anew. agreement wants lm-eval."""
    lines = [*CASES, *OTHERS.split()]
    given = "\n".join(lines).replace("OUT", str(tmp_path))
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = dict(part.split("\n", 1) for part in done.stdout.split("== ")[1:])
    assert list(told) == [line.split()[0] for line in lines]
    for line in CASES:
        assert "| --- |" in told[line.split()[0]]
        assert "Error" not in told[line.split()[0]]
