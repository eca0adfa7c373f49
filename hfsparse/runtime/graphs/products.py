"""Products of a recorded step at the memory's speed: which linear layers they replace.

Where few rows are multiplied by a matrix that torchao has quantised, its codes become numbers in
our kernel's registers, in fused steps and others. Where a fused step multiplies one row by matrices
of plain numbers, products that share the row become one operator, `hfsparse::products`, and one
whose result is added to a row adds it itself. The rest is left to PyTorch and the compiler.
"""

from __future__ import annotations

import contextlib
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode

from hfsparse.kernels import PRODUCTS, QUANTISED, Kernel, Need, pick
from hfsparse.kernels.codes import Quantised, read

BACKEND = "inductor"
LINEAR = torch._C._nn.linear  # what nn.Linear and F.linear call
FEW = 32  # rows of a step that meet weights in our kernels


class OwnProducts(TorchFunctionMode):
    """Few rows meet quantised weights in our kernel while this is entered."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is LINEAR and _is_served_quantised(*args[:2]):
            return multiply(args[0], [args[1]], [args[2] if len(args) > 2 else kwargs.get("bias")])
        return func(*args, **kwargs)


def with_own_products(forward: Callable) -> Callable:
    """`forward`, within `OwnProducts`."""

    def run(**given):
        with OwnProducts():
            return forward(**given)

    return run


def compile_step(module: fx.GraphModule, inputs: list) -> Callable:
    """What fused steps are compiled with: BACKEND, behind `join_products`."""
    from torch._dynamo.backends.registry import lookup_backend  # a second, where it is asked for

    join_products(module)
    with _chained():
        return lookup_backend(BACKEND)(module, inputs)


def _chained() -> contextlib.AbstractContextManager:
    """Has Inductor's kernels begin while the one before ends, as ours do, where this torch can."""
    from torch._inductor import config

    known = hasattr(config.triton, "enable_pdl")
    return config.patch({"triton.enable_pdl": True}) if known else contextlib.nullcontext()


def join_products(module: fx.GraphModule) -> None:
    """Replace products of few rows with matrices by the operator that reads them together, and
    those with quantised ones likewise."""
    sharing: dict[tuple, list[fx.Node]] = defaultdict(list)
    plain = torch.ops.hfsparse.products.default
    for node in module.graph.nodes:
        if node.target is not LINEAR:
            continue
        x, weight, bias = _arguments(node)
        if any(part is not None and part.op != "placeholder" for part in (weight, bias)):
            continue  # made in the step: not there at the first
        if any(user.op == "call_method" and user.target.endswith("_") for user in x.users):
            continue  # the rows are written between their products
        held = [part.meta.get("example_value") for part in (x, weight, bias) if part is not None]
        if _is_served(*held):
            sharing[x, plain].append(node)
        elif _is_served_quantised(*held):
            sharing[x, multiply, read(held[1]).layout].append(node)
    for (_, joint, *_), nodes in sharing.items():
        if len(nodes) > 1 or joint is not plain or not _add(module.graph, *nodes):
            _join(module.graph, joint, nodes)
    module.graph.lint()
    module.recompile()


def _arguments(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    x, weight, *bias = node.args
    return x, weight, bias[0] if bias else node.kwargs.get("bias")


def _is_served(*held: Tensor) -> bool:
    """Whether these are few rows, a matrix and perhaps a bias that our kernel reads."""
    if any(type(t) is not FakeTensor for t in held):  # quantised: with products of their own
        return False
    rows, *rest = held
    plain = all(t.dtype == rows.dtype and t.is_contiguous() for t in rest)
    few = rows.numel() <= FEW * rows.shape[-1]
    return plain and few and _kernel(*held[:2]) is not PRODUCTS[-1]


def _join(graph: fx.Graph, joint: Callable, nodes: list[fx.Node]) -> None:
    parts = [_arguments(node) for node in nodes]
    sizes = [weight.meta["example_value"].shape[0] for _, weight, _ in parts]
    with graph.inserting_before(nodes[0]):
        given = parts[0][0], [weight for _, weight, _ in parts], [bias for *_, bias in parts]
        joined = graph.call_function(joint, given)
        first = 0
        for node, size in zip(nodes, sizes, strict=True):
            own = graph.call_function(torch.narrow, (joined, -1, first, size))
            own.meta = dict(node.meta)
            node.replace_all_uses_with(own)
            first += size
    for node in nodes:
        graph.erase_node(node)


def _add(graph: fx.Graph, node: fx.Node) -> bool:
    """Have a product add the row that it is added to, as it would a bias; False: there is none.

    The sum would be a kernel by itself, as what reads it is compiled with the next layer.
    """
    x, weight, bias = _arguments(node)
    (total, *more), made = node.users, node.meta["example_value"]
    if bias is not None or more or total.target is not operator.add or len(total.args) != 2:
        return False
    other = total.args[total.args[0] is node]
    row = other.meta.get("example_value") if isinstance(other, fx.Node) else None
    if type(row) is not FakeTensor or (row.shape, row.dtype) != (made.shape, made.dtype):
        return False
    if row.numel() != row.shape[-1]:
        return False  # a bias is one row
    with graph.inserting_before(total):
        flat = graph.call_function(torch.flatten, (other,))
        added = graph.call_function(torch.ops.hfsparse.products.default, (x, [weight], [flat]))
    added.meta = dict(total.meta)
    total.replace_all_uses_with(added)
    graph.erase_node(total)
    graph.erase_node(node)
    return True


def _is_served_quantised(x: object, weight: object = None, bias: object = None) -> bool:
    """Whether these are few rows and a matrix of codes that our kernel reads."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)) or x.numel() > FEW * x.shape[-1]:
        return False
    if (matrix := read(weight)) is None:
        return False
    return _kernel_of_codes(x, matrix.codes) is not QUANTISED[-1]


def multiply(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """`linear` of few rows with each of weights that `read` knows, of one layout, side by side."""
    codes, scales, zeros = map(list, zip(*map(read, weights), strict=True))
    return torch.ops.hfsparse.quantised(x, codes, scales, zeros, biases)


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


def _kernel_of_codes(x: Tensor, codes: Tensor) -> Kernel:
    grad = torch.is_grad_enabled() and x.requires_grad
    return pick(QUANTISED, Need(x.device, x.dtype, *codes.shape, grad=grad, codes=codes.dtype))


def _quantised(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    zeros: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
) -> Tensor:
    matrices = [Quantised(*parts) for parts in zip(codes, scales, zeros, strict=True)]
    return _kernel_of_codes(x, codes[0]).run(x, matrices, biases)


torch.library.custom_op(
    "hfsparse::quantised",
    _quantised,
    mutates_args=(),
    schema="(Tensor x, Tensor[] codes, Tensor[] scales, Tensor?[] zeros, Tensor?[] biases)"
    " -> Tensor",
)


@torch.library.register_fake("hfsparse::quantised")
@torch.library.register_fake("hfsparse::products")
def _(x, weights, *rest):
    return x.new_empty(*x.shape[:-1], sum(len(weight) for weight in weights))
