"""Imports go down only: rooms know those below them, and no two modules know one another."""

import ast
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parents[1]
TREES = {"hfsparse": ROOT / "hfsparse", "hfsparse_eval": ROOT / "eval"}
# From the ground up; a room may import itself and what stands before it.
GROUND = """
errors version precision registry reading writing progress shares interval anytime stats families
""".split()
ROOMS = [
    *GROUND,
    *(
        "lists",
        "patterns",
        "selectors",
        "evictions",
        "models",
        "kernels",
        "plan",
        "runtime",
        "patcher",
    ),
    *("profiler", "recipe", "bench", "cli", "hfsparse_eval"),
]
CLIMBS = {("hfsparse.cli.run", "hfsparse_eval")}  # `hfsparse eval` is the command of eval/
FACE = {"hfsparse", "hfsparse.__main__"}  # what users import and run: they may know every room
KERNELS = "hfsparse.kernels"
# What kernels may share, and the tables above them: these know them all.
SHARED = "codes cpu_flash need positions rows triton.limits"
SHARED = {f"{KERNELS}.{name}" for name in SHARED.split()}
TABLES = {f"{KERNELS}{name}" for name in ("", ".table", ".per_store")}
# Kernels in more than one file, each knowing those before it.
PARTS = "select estimate_antidiagonal estimate_means estimate_probes estimate_flexprefill"
PARTS += " estimate_keys estimate"
HALVES = {tuple(f"{KERNELS}.triton.{n}" for n in (b, a)) for a, b in combinations(PARTS.split(), 2)}
CHOOSE, SCORES, VOTES, *SCORED, MANY = (
    f"{KERNELS}.triton.{name}" for name in ("choose", "scores", "votes", "quest", "labels", "many")
)
HALVES |= {(CHOOSE, part) for part in (SCORES, VOTES, *SCORED, MANY)} | {(MANY, VOTES)}
HALVES |= {(f"{KERNELS}.triton.decode_store", f"{KERNELS}.triton.decode")}
HALVES |= {(f"{KERNELS}.triton.norm_row", f"{KERNELS}.triton.norm")}
HALVES |= {(part, SCORES) for part in (*SCORED, MANY)}


def _modules() -> dict[str, Path]:
    found = {}
    for name, folder in TREES.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join([name, *parts]).removesuffix(".__init__")] = file
    return found


MODULES = _modules()
TEXTS = {name: ast.parse(file.read_text("utf-8")) for name, file in MODULES.items()}


def _imports(name: str) -> Iterator[tuple[str, str | None, str]]:
    """Imports of ours, in functions and for types, too: (module, name in it, name here)."""
    for node in ast.walk(TEXTS[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield alias.name, None, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES:
                    yield whole, None, alias.asname or alias.name
                elif node.module in MODULES:
                    yield node.module, alias.name, alias.asname or alias.name


EDGES = {name: {module for module, *_ in _imports(name)} - {name} for name in MODULES}


def _room(name: str) -> str:
    return name.split(".")[1] if name.startswith("hfsparse.") else name.split(".")[0]


def test_no_room_imports_one_above_it():
    order = {room: i for i, room in enumerate(ROOMS)}
    climbs = [
        f"{name} imports {other}"
        for name, others in EDGES.items()
        for other in others
        if name not in FACE
        and other not in FACE
        and order[_room(other)] > order[_room(name)]
        and (name, _room(other)) not in CLIMBS
    ]
    assert not climbs, "\n".join(sorted(climbs))


def test_no_room_imports_the_face():
    found = [name for name, others in EDGES.items() if name not in FACE and others & FACE]
    assert not found, f"take it from its room: {', '.join(sorted(found))}"


def test_no_modules_import_one_another():
    done, path, circles = set(FACE), [], []

    def visit(name: str) -> None:
        if name in path:
            circles.append(" -> ".join([*path[path.index(name) :], name]))
            return
        if name in done:
            return
        path.append(name)
        for other in sorted(EDGES[name]):
            visit(other)
        path.pop()
        done.add(name)

    for name in sorted(EDGES):
        visit(name)
    assert not circles, "\n".join(circles)


def test_kernels_do_not_import_one_another():
    kernels = {name for name in MODULES if name.startswith(f"{KERNELS}.")} - SHARED - TABLES
    pairs = {(name, other) for name in kernels for other in EDGES[name] & (kernels | TABLES)}
    assert pairs <= HALVES, "\n".join(f"{a} imports {b}" for a, b in pairs - HALVES)


def test_no_module_takes_private_names_of_another():
    taken = []
    for name, text in TEXTS.items():
        modules = {}
        for module, part, here in _imports(name):
            modules[here] = module
            if part and part.startswith("_") and not part.startswith("__"):
                taken.append(f"{name} takes {part} of {module}")
        for node in ast.walk(text):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                if private and modules.get(node.value.id) in MODULES:
                    taken.append(f"{name} takes {node.attr} of {modules[node.value.id]}")
    assert not taken, "\n".join(sorted(taken))
