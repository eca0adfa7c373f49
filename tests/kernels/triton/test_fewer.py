"""RMS norms, interpreted, and which of a model's a step is given."""

import pytest
import torch
from torch import nn

from hfsparse import kernels
from hfsparse.kernels import plain
from hfsparse.runtime.graphs.fewer import with_fewer_launches
from tests.kernels.interpreter import interpreter


@pytest.fixture(scope="module")
def interpreted():
    with interpreter(triton__norm__WIDE=32) as run:
        yield lambda name, *given: run(f"triton.{name}", *given)


@pytest.mark.parametrize("form", plain.NORM_FORMS)
@pytest.mark.parametrize("shape", [(1, 1, 100), (2, 3, 32)])
def test_a_norm_is_what_models_write(interpreted, shape, form):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).half(), torch.randn(shape[-1]).half()
    given = x, weight, 1e-5, form
    want, got = plain.rms_norm(*given), interpreted("norm.rms_norm", *given)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-3, atol=0)  # the interpreter's roots are its own


class MadeRMSNorm(nn.Module):
    """A norm of a kind of its own."""

    form, more = "whole", 1.0

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(8).half()), 1e-3

    def forward(self, x):
        return self.more * plain.rms_norm(x, self.weight, self.eps, self.form)


def kind(**own) -> nn.Module:
    return type("AnyRMSNorm", (MadeRMSNorm,), own)()


def test_a_step_is_given_norms_that_have_the_bits_of_the_models(monkeypatch):
    """One of another form, one that somebody has replaced and other types of numbers are not."""
    ran = []

    def run(x, weight, eps, form):
        ran.append(form)
        return plain.rms_norm(x, weight, eps, form)

    table = kernels.Kernel("any", run, lambda need: None), kernels.NORMS[-1]
    monkeypatch.setattr("hfsparse.runtime.graphs.fewer.NORMS", table)
    torch.manual_seed(0)
    known = [kind(form=form) for form in plain.NORM_FORMS]
    known[1].weight.data.fill_(1)  # by which it has the bits of the first form
    decoder = nn.Sequential(*known, kind(more=1.5), MadeRMSNorm())
    decoder[-1].forward = lambda x: x
    with torch.no_grad():
        call = with_fewer_launches(lambda x: decoder(x), decoder)
        x = torch.randn(1, 1, 8).half()
        want = decoder(x)
        ran.clear()
        assert torch.equal(call(x=x), want)
        assert ran == [*plain.NORM_FORMS]
        call(x=x.float())
        assert len(ran) == 3
    assert all("forward" not in vars(norm) for norm in decoder[:-1])


def test_a_norm_that_takes_a_gate_too_stays_the_models(monkeypatch):
    table = kernels.Kernel("any", plain.rms_norm, lambda need: None), kernels.NORMS[-1]
    monkeypatch.setattr("hfsparse.runtime.graphs.fewer.NORMS", table)

    def forward(self, x, gate=None):
        return plain.rms_norm(x, self.weight, self.eps, self.form) * (1 if gate is None else gate)

    norm, x = kind(forward=forward), torch.randn(1, 1, 8).half()
    call = with_fewer_launches(lambda x: norm(x, x), norm)
    assert torch.equal(call(x=x), norm(x, x))
