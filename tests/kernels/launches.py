"""For what Triton kernels would be compiled on a GPU, seen without one."""

from __future__ import annotations


class Launches:
    """Stands in for a kernel, and notes for what it would be compiled."""

    def __init__(self, kernel, seen: set):
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


def watch(monkeypatch, *modules) -> set:
    """Put `Launches` in place of the modules' kernels; the set that they will fill."""
    from triton.runtime import JITFunction

    seen = set()
    for module in modules:
        for name, kernel in vars(module).items():
            if isinstance(kernel, JITFunction):
                monkeypatch.setattr(module, name, Launches(kernel, seen))
    return seen
