"""For what Triton kernels would be compiled on a GPU, seen without one."""

from __future__ import annotations

import re
from subprocess import run
from tempfile import NamedTemporaryFile


class Launches:
    """Stands in for a kernel, and notes for what it would be compiled."""

    def __init__(self, kernel, seen: set | list):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **more):
        _, special, options = self.bind(*args, **more)
        self.seen.add((self.kernel.__name__, str(special), str(options)))


class Compiled(Launches):
    """Stands in for a kernel, and compiles it for an H100 instead of running it."""

    def __call__(self, *args, **more):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile, make_backend

        target = GPUTarget("cuda", 90, 32)
        packed = self.kernel._pack_args(make_backend(target), more, *self.bind(*args, **more))
        options, *source = packed
        source = ASTSource(self.kernel, *source)
        self.seen.append(compile(source, target=target, options=options.__dict__))


def stack_of(kernel) -> int:
    """Bytes of each thread that a compiled kernel has in memory for want of registers."""
    from triton import knobs

    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        told = run(told, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", told).group(1))


def compiled(monkeypatch, module, name: str) -> list:
    """Put `Compiled` in place of a module's kernel; the list that it will fill."""
    seen = []
    monkeypatch.setattr(module, name, Compiled(getattr(module, name), seen))
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
