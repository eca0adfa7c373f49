"""Steps over keys in host memory, whose queries a script has made steady; a CPU stands for both."""

import copy

import pytest
import torch

from benchmarks import host
from benchmarks.common.shapes import endless
from hfsparse.runtime.cache import host as stores

SIZES = (None, 2, 20)


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    model = endless("tiny")
    made = {size: copy.deepcopy(model) for size in SIZES}
    for size in SIZES[1:]:
        host.steady(made[size], size)
    return made


@pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")  # transformers 5.24
def test_the_steadier_queries_are_the_more_is_hit(models, monkeypatch):
    monkeypatch.setattr(stores, "why_not", lambda device: None)
    rates = []
    torch.manual_seed(0)
    for model in models.values():
        follows = host.plan(model, host.HOST, share=0.06, hot=0.12, rings=False)
        rates.append(host.run(model, host.HOST, follows, 4096, 16).hits)
    assert rates[0] + 0.05 < rates[1] < rates[2] - 0.05, rates
    assert rates[2] > 0.96  # the steps before those that are timed, which fetch all, are no part


def test_what_no_token_changes_is_as_large_as_was_asked(models):
    """Beside what does, of inputs as a norm leaves them; in the slow half of each head's channels,
    and in whatever size the same."""
    x = torch.randn(4000, models[None].config.hidden_size)
    for layers in zip(*(model.model.layers for model in models.values()), strict=True):
        plain, steady, steadier = (m.self_attn.q_proj for m in layers)
        fixed = steady.bias.view(-1, 2, 8)  # heads, rope's halves, frequencies
        assert not fixed[..., :4].any()
        assert fixed[..., 4:].all()
        torch.testing.assert_close(steadier.bias, 10 * steady.bias)
        moved = plain(x).std(0).view_as(fixed)
        assert 0.7 < (fixed / moved)[..., 4:].std() / 2 < 1.3
