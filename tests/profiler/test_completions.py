"""Completions on the real model, asked as a base model: without its chat template."""

import numpy as np
import pytest

from hfsparse.models.loading import load
from hfsparse.profiler.verify import trials


@pytest.mark.slow
def test_a_small_model_without_a_chat_template_completes_what_a_text_has_said(smollm2):
    model, tokenizer = load(str(smollm2))
    tokenizer.chat_template = None
    shares = {}
    for i in range(2 * len(trials.COMPLETIONS)):
        trial = trials.make_trial(tokenizer, 400, i, 0, trials.COMPLETIONS)
        shares[trial.task] = float(np.mean(trials.run_trial(model, trial)["said"]))
    assert sum(share >= 0.5 for share in shares.values()) >= 4
