"""What a step is recorded with in fewer launches, interpreted, and which of a model's modules that
serves."""

from importlib import import_module

import pytest
import torch
from torch import nn

from hfsparse import kernels
from hfsparse.kernels import plain
from hfsparse.runtime.graphs import fewer
from hfsparse.runtime.graphs.fewer import with_fewer_launches
from tests.kernels.interpreter import interpreter

ROOTS = {"rtol": 2e-3, "atol": 0}  # the interpreter's roots and exponentials are its own


@pytest.fixture(scope="module")
def interpreted():
    with interpreter(triton__norm__WIDE=32, triton__gated__WIDE=32) as run:
        yield lambda name, *given: run(f"triton.{name}", *given)


def close(got, want) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, **ROOTS)


@pytest.mark.parametrize("form", plain.NORM_FORMS)
@pytest.mark.parametrize(
    ("kernel", "shape"),
    [
        ("norm", (1, 1, 100)),
        ("norm", (2, 3, 32)),
        ("norm_row", (1, 1, 576)),
        ("norm_row", (2, 3, 132)),
        ("norm_row", (1, 2, 516)),
    ],
)
def test_a_norm_is_what_models_write(interpreted, kernel, shape, form):
    torch.manual_seed(0)
    given = torch.randn(shape).half(), torch.randn(shape[-1]).half(), 1e-5, form
    close(interpreted(f"{kernel}.rms_norm", *given), plain.rms_norm(*given))


@pytest.mark.parametrize(("heads", "rows", "dim"), [((4, 2), 1, 16), ((5, 1), 2, 12)])
def test_a_rotary_embedding_is_what_models_write(interpreted, heads, rows, dim):
    """Rows have angles of their own, or all the same."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 3, n, dim).half().transpose(1, 2) for n in heads)
    given = q, k, *torch.randn(2, rows, 3, dim).half()
    for got, want in zip(interpreted("rope.rotate", *given), plain.rotate(*given), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("form", plain.GATE_FORMS)
def test_a_gate_is_what_models_write(interpreted, form):
    torch.manual_seed(0)
    given = *torch.randn(2, 3, 1, 40).half(), form
    close(interpreted("gated.gated", *given), plain.gated(*given))


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
    monkeypatch.setattr(fewer, "NORMS", table)
    torch.manual_seed(0)
    known = [kind(form=form) for form in plain.NORM_FORMS]
    known[1].weight.data.fill_(1)  # by which it has the bits of the first form
    decoder = nn.Sequential(*known, kind(more=1.5), MadeRMSNorm())
    decoder[-1].forward = lambda x: x
    with torch.no_grad():
        call = with_fewer_launches(lambda x: decoder(x), decoder, {})
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
    monkeypatch.setattr(fewer, "NORMS", table)

    def forward(self, x, gate=None):
        return plain.rms_norm(x, self.weight, self.eps, self.form) * (1 if gate is None else gate)

    norm, x = kind(forward=forward), torch.randn(1, 1, 8).half()
    call = with_fewer_launches(lambda x: norm(x, x), norm, {})
    assert torch.equal(call(x=x), norm(x, x))


@pytest.fixture
def ran(monkeypatch):
    """Which of the tables' kernels ran, that have PyTorch's bits."""
    ran = []
    for name, run in (("ROPES", plain.rotate), ("GATES", plain.gated), ("NORMS", plain.rms_norm)):
        own = kernels.Kernel(name, lambda *a, n=name, r=run: ran.append(n) or r(*a), lambda _: None)
        monkeypatch.setattr(fewer, name, (own, getattr(kernels, name)[-1]))
    return ran


def kind_of(family: str, part: str) -> type:
    module = import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    return getattr(module, f"{family}{part}")


def tiny(family: str, part: str, **more) -> nn.Module:
    """A module of transformers' own, and of random weights."""
    kind = kind_of(family, part)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "head_dim": 8, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = kind_of(family, "TextConfig" if family == "Gemma3" else "Config")
    config = config(**{**sizes, **heads, **more}, attn_implementation="eager")
    return kind(config, *([0] if part == "Attention" else [])).half().eval()


PARTIAL = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
}


@pytest.mark.parametrize(
    ("family", "more", "dim", "rotated"),
    [("Llama", {}, 8, 1), ("Qwen3", {}, 8, 1), ("Gemma3", {}, 8, 1), ("Phi3", PARTIAL, 4, 0)],
)
def test_queries_and_keys_are_turned_whole_in_one_launch(ran, family, more, dim, rotated):
    """Where a part of their dims is, the model does it; elsewhere the name is the model's."""
    torch.manual_seed(0)
    attention = tiny(family, "Attention", **more)
    x, angles = torch.randn(2, 3, 32).half(), tuple(torch.randn(2, 1, 3, dim).half())
    given = {"hidden_states": x, "position_embeddings": angles, "attention_mask": None}
    with torch.no_grad():
        call, want = with_fewer_launches(attention, attention, {}), attention(**given)[0]
        ran.clear()
        assert torch.equal(call(**given)[0], want)
        assert ran.count("ROPES") == rotated
        ran.clear()
        attention(**given)
    assert not ran
    assert "forward" not in vars(attention)


@pytest.mark.parametrize(("family", "gated"), [("Llama", 1), ("Gemma3", 1), ("Phi3", 0)])
def test_a_gate_meets_up_in_one_launch(ran, family, gated):
    torch.manual_seed(0)
    mlp, x = tiny(family, "MLP"), torch.randn(2, 1, 32).half()
    with torch.no_grad():
        want, known = mlp(x), {}
        for _ in range(2):
            ran.clear()
            assert torch.equal(with_fewer_launches(lambda x: mlp(x), mlp, known)(x=x), want)
        assert ran == ["GATES"] * gated  # asked before, once


OTHERS = {
    "changes what it reads": lambda mlp, x: mlp.down_proj(
        mlp.act_fn(mlp.gate_proj(2 * x)) * mlp.up_proj(x)
    ),
    "changes what it gives": lambda mlp, x: (
        x + mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    ),
    "has the two the other way round": lambda mlp, x: mlp.down_proj(
        mlp.act_fn(mlp.up_proj(x)) * mlp.gate_proj(x)
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_an_mlp_of_another_form_stays_the_models(ran, other):
    torch.manual_seed(0)
    mlp, x = tiny("Llama", "MLP"), torch.randn(1, 1, 32).half()
    mlp.__class__ = type("Other", (type(mlp),), {"forward": OTHERS[other]})
    with torch.no_grad():
        call, _ = with_fewer_launches(mlp, mlp, {}), ran.clear()
        assert torch.equal(call(x=x), mlp(x))
    assert not ran
