"""For what Triton kernels would be compiled on a GPU, seen without one."""

from __future__ import annotations

import re
from subprocess import run
from tempfile import NamedTemporaryFile


class Launches:
    """Stands in for a kernel, and notes for what it would be compiled; card: 90 is an H100."""

    def __init__(self, kernel, seen: set | list, card: int = 90):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        self.target = GPUTarget("cuda", card, 32)
        self.backend = make_backend(self.target)
        self.bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **more):
        _, special, options = self.bind(*args, **more)
        self.seen.add((self.kernel.__name__, str(special), str(options)))


class Compiled(Launches):
    """Stands in for a kernel, and compiles it for a card instead of running it."""

    def __call__(self, *args, **more):
        from triton.compiler import ASTSource, compile

        options, *source = self.kernel._pack_args(self.backend, more, *self.bind(*args, **more))
        source = ASTSource(self.kernel, *source)
        self.seen.append(compile(source, target=self.target, options=options.__dict__))


def stack_of(kernel) -> int:
    """Bytes of each thread that a compiled kernel has in memory for want of registers."""
    return used_by(kernel)[1]


def used_by(kernel) -> tuple[int, int]:
    """Registers of a thread of a compiled kernel, and its bytes in memory for want of them."""
    from triton import knobs

    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = run(told, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{name}:(\d+)", told).group(1) for name in ("REG", "STACK"))
    return int(registers), int(stack)


def compiled(monkeypatch, module, name: str, card: int = 90) -> list:
    """Put `Compiled` in place of a module's kernel; the list that it will fill."""
    seen = []
    monkeypatch.setattr(module, name, Compiled(getattr(module, name), seen, card))
    return seen


def watch(monkeypatch, *modules) -> set:
    """Put `Launches` in place of the modules' kernels; the set that they will fill."""
    from triton.runtime import JITFunction

    seen = set()
    for module in modules:
        for name, kernel in vars(module).items():
            if isinstance(kernel, JITFunction):
                monkeypatch.setattr(module, name, Launches(kernel, seen))
    return seen


def launched(monkeypatch, *modules) -> list:
    """Put a recorder in place of the modules' kernels; the list of launches that it will fill.

    Of each: the kernel's name, its grid, and its arguments, of tensors their shapes and strides.
    """
    from torch import Tensor
    from triton.runtime import JITFunction

    calls = []

    class Recorder:
        def __init__(self, name: str, grid=None):
            self.name, self.grid = name, grid

        def __getitem__(self, grid):
            return Recorder(self.name, grid)

        def __call__(self, *args, **more):
            shown = [
                (tuple(a.shape), a.stride()) if isinstance(a, Tensor) else a
                for a in (*args, *more.items())
            ]
            calls.append((self.name, self.grid, shown))

    for module in modules:
        for name, kernel in vars(module).items():
            if isinstance(kernel, JITFunction):
                monkeypatch.setattr(module, name, Recorder(name))
    return calls
