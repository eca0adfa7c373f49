"""Parts of a decoder are compiled apart, for the thread whose step is recorded."""

import pytest
import torch
from torch import nn

from hfsparse.runtime.call import enter, leave, running
from hfsparse.runtime.graphs import parts
from hfsparse.runtime.graphs.obstacles import NoWait


class Layer(nn.Module):
    def __init__(self, index: int, scale: float = 1.0):
        super().__init__()
        self.index, self.scale, self.up = index, scale, nn.Linear(4, 4)

    def forward(self, x, held):
        return held(self.up(x) * self.scale, self.index)


class Norm(nn.LayerNorm):
    """A part, as torch's own is none."""


class Decoder(nn.Module):
    def __init__(self, *scales: float):
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, scale) for i, scale in enumerate(scales))
        self.embed, self.norm = nn.Identity(), Norm(4)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, lambda y, index: y)  # as a cache that knows no layers
        return self.norm(x)


@pytest.fixture
def compiled(monkeypatch):
    """The graphs that were compiled, in a call whose step is recorded."""
    made = []

    def backend(module, inputs):
        made.append(module)
        return module

    torch.compiler.reset()
    monkeypatch.setattr(parts, "compile_step", backend)
    enter("owner")
    running().recorded = lambda *given: None
    with torch.no_grad():
        yield made
    leave("owner")


def fused(decoder, x):
    with parts.fused(decoder):
        return decoder(x)


@pytest.mark.parametrize(("scales", "forms"), [([1.0] * 20, 2), ([1.0, 2.0] * 10, 3)])
def test_layers_of_one_kind_share_what_is_compiled(compiled, scales, forms):
    decoder, x = Decoder(*scales), torch.ones(1, 4)
    want = decoder(x)
    assert torch.equal(fused(decoder, x), want)
    assert torch.equal(fused(decoder, x), want)
    assert len(compiled) == forms
    assert not any("forward" in vars(module) for module in decoder.modules())


def test_more_kinds_than_dynamo_would_compile_are(compiled):
    fused(Decoder(*range(12)), torch.ones(1, 4))
    assert len(compiled) == 13


def test_a_parts_own_forward_is_compiled_and_put_back(compiled):
    decoder, x = Decoder(1.0, 1.0), torch.ones(1, 4)
    forward = decoder.layers[0].forward
    own = decoder.layers[0].forward = lambda x, held: forward(2 * x, held)
    assert torch.equal(fused(decoder, x), decoder(x))
    assert decoder.layers[0].forward is own


def test_another_threads_step_is_not_compiled(compiled):
    running().recorded = None
    fused(Decoder(1.0), torch.ones(1, 4))
    assert not compiled


def test_modes_are_left_outside_and_watch_the_rest(compiled):
    decoder, x = Decoder(1.0), torch.ones(1, 4)
    with NoWait():
        fused(decoder, x)
        with pytest.raises(RuntimeError, match="the host waits"), parts.fused(decoder):
            decoder(x).sum().item()
    assert len(compiled) == 2
