"""Products of a fused step at the memory's speed: which linear layers of its graph they replace.

Where one row is multiplied by matrices of plain numbers, products that share the row become one
operator, `hfsparse::products`; the rest is left to the compiler.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from hfsparse.kernels import PRODUCTS, Kernel, Need, pick

BACKEND = "inductor"
LINEAR = torch._C._nn.linear  # what nn.Linear and F.linear call


def compile_step(module: fx.GraphModule, inputs: list) -> Callable:
    """What fused steps are compiled with: BACKEND, behind `join_products`."""
    from torch._dynamo.backends.registry import lookup_backend  # a second, where it is asked for

    join_products(module)
    return lookup_backend(BACKEND)(module, inputs)


def join_products(module: fx.GraphModule) -> None:
    """Replace products of a row with matrices by the operator that reads them together."""
    sharing: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in module.graph.nodes:
        if node.target is LINEAR and _is_served(*_arguments(node)):
            sharing[node.args[0]].append(node)
    for nodes in sharing.values():
        _join(module.graph, nodes)
    module.graph.lint()
    module.recompile()


def _arguments(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    x, weight, *bias = node.args
    return x, weight, bias[0] if bias else node.kwargs.get("bias")


def _is_served(x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> bool:
    """Whether this is a row times a parameter that our kernel reads."""
    given = [part for part in (weight, bias) if part is not None]
    if any(part.op != "placeholder" for part in given):  # made in the step: not there at the first
        return False
    if any(user.op == "call_method" and user.target.endswith("_") for user in x.users):
        return False  # the row is written between its products
    held = [part.meta.get("example_value") for part in (x, *given)]
    if any(type(t) is not FakeTensor for t in held):  # quantised: with products of their own
        return False
    row, *rest = held
    plain = all(t.dtype == row.dtype and t.is_contiguous() for t in rest)
    return plain and row.numel() == row.shape[-1] and _kernel(*held[:2]) is not PRODUCTS[-1]


def _join(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    parts = [_arguments(node) for node in nodes]
    sizes = [weight.meta["example_value"].shape[0] for _, weight, _ in parts]
    with graph.inserting_before(nodes[0]):
        given = parts[0][0], [weight for _, weight, _ in parts], [bias for *_, bias in parts]
        joined = graph.call_function(torch.ops.hfsparse.products.default, given)
        first = 0
        for node, size in zip(nodes, sizes, strict=True):
            own = graph.call_function(torch.narrow, (joined, -1, first, size))
            own.meta = dict(node.meta)
            node.replace_all_uses_with(own)
            first += size
    for node in nodes:
        graph.erase_node(node)


def _kernel(x: Tensor, weight: Tensor) -> Kernel:
    return pick(PRODUCTS, Need(x.device, x.dtype, x.shape[-1], len(weight)))


def _products(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    return _kernel(x, weights[0]).run(x, weights, biases)


torch.library.custom_op(
    "hfsparse::products",
    _products,
    mutates_args=(),
    schema="(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor",
)


@torch.library.register_fake("hfsparse::products")
def _(x, weights, biases):
    return x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))
