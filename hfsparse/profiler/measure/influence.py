"""What leaving attention out costs the model's own answer, by gradient (MoA, arXiv 2406.14909).

Leaving out entry j of a row of the attention matrix A, and sharing its mass among the others, moves
the row by A_j (A - e_j) / (1 - A_j). To first order the loss then changes by

    E_j = -A_j (g_j - sum_k g_k A_k) / (1 - A_j),    g = gradient of the loss at A.

As g is the gradient at the attention's output times the values, E follows from one backward pass, a
tile of rows at a time. A rule's cost is the sum of |E| over what it drops, by blocks of 64 x 64.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import PreTrainedModel

from hfsparse.models.greedy import greedy
from hfsparse.models.loading import input_device
from hfsparse.models.logits import read_logits
from hfsparse.models.names import text_decoder
from hfsparse.patcher import patch
from hfsparse.plan import Plan
from hfsparse.profiler.measure.capture import Seen, backward, stack_layers
from hfsparse.profiler.measure.exact import attention
from hfsparse.profiler.measure.modes import isolate_modes
from hfsparse.profiler.measure.slices import slice_tokens
from hfsparse.profiler.prompts.calibration import Prompt

BLOCK = 64  # edge of the blocks that |E| is summed in
TILE = 512  # query rows of one head that exist at a time
ANSWER = 64  # tokens that the model generates where a prompt has no answer
ROUNDING = 1e-5  # where 1 - A is less, the row is this entry alone


def measure_influence(seen: Seen) -> Tensor:
    """|E| summed in blocks, float32 `[Hq, n, n]` with n = ceil(L / BLOCK)."""
    (_, heads, L, _), device = seen.q.shape, seen.q.device
    group, n = heads // seen.k.shape[1], -(-L // BLOCK)
    total = torch.zeros(heads, n, n, dtype=torch.float32, device=device)
    for start in range(0, L, TILE):
        end = min(start + TILE, L)
        rows, known = torch.arange(start, end, device=device), replace(seen, k=seen.k[:, :, :end])
        span = slice(start // BLOCK, -(-end // BLOCK))
        for head in range(heads):
            A = attention(known, rows, head)  # [R, end]
            values = seen.v[0, head // group, :end].float()
            g = seen.grad[0, head, start:end].float() @ values.T
            E = A * (g - (g * A).sum(1, keepdim=True)) / (1 - A).clamp(min=ROUNDING)
            E = pad(E.abs(), (0, -end % BLOCK, 0, -end % BLOCK))
            blocks = E.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).sum((1, 3))
            total[head, span, : span.stop] = blocks
    return total


def measure_costs(model: PreTrainedModel, prompt: Prompt, dropped: np.ndarray) -> np.ndarray:
    """Influence `[layers, Hq, rules]` that each rule loses, measured in layers that may be sparse.

    dropped `[rules, n, n]`: the share of each block that a rule drops.
    """

    def measure(seen: Seen) -> dict[str, np.ndarray]:
        share = torch.from_numpy(dropped).to(seen.q.device)
        return {"cost": (measure_influence(seen).flatten(1) @ share.flatten(1).T).cpu().numpy()}

    ids, keys = append_answer(model, prompt)
    return stack_layers(model, backward(model, ids, keys, _cross_entropy, measure))["cost"]


@isolate_modes
def append_answer(model: PreTrainedModel, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """The prompt with the model's own greedy answer `[1, L]`, and the rows [n] that predict it.

    The answer takes the place of the prompt's own, or of its last ANSWER tokens (a quarter of the
    prompt at most), and counts up to its first end of text.
    """
    where, L = input_device(model), prompt.ids.shape[1]
    ids = prompt.ids.to(where).clone()
    start, end = prompt.answer_span or (L - min(ANSWER, L // 4), L)
    text = ids[:, :start]
    with patch(model), slice_tokens(model), greedy(model, end - start):
        whole = model.generate(text, attention_mask=torch.ones_like(text))
    end = whole.shape[1]  # earlier where the text ends
    ids[:, start:end] = whole[:, start:]
    return ids, torch.arange(start - 1, end - 1, device=ids.device)


def measure_losses(model: PreTrainedModel, prompt: Prompt, plans: list[Plan]) -> np.ndarray:
    """Cross entropy [plans] of the dense model's own answer under each plan."""
    ids, keys = append_answer(model, prompt)
    decoder, found = text_decoder(model), []
    for plan in plans:
        with patch(model, plan), slice_tokens(model), torch.no_grad():
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state
            at = keys.to(hidden.device)
            found.append(float(_cross_entropy(model, hidden[:, at], ids[0, keys + 1])))
    return np.array(found)


def _cross_entropy(model: PreTrainedModel, hidden: Tensor, wanted: Tensor) -> Tensor:
    scores = read_logits(model, hidden)[0].float()
    return cross_entropy(scores, wanted.to(scores.device))
