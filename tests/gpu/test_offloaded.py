"""A model that lies on the CPU and runs on the GPU is profiled as one that lies there."""

from accelerate import cpu_offload

import hfsparse
from hfsparse.models.loading import input_device
from hfsparse.models.window import calibration_lengths
from tests import tiny
from tests.gpu.common import DEVICE


def test_an_offloaded_model_gets_the_plan_of_the_same_model_on_the_gpu():
    model = tiny.llama(window=1024)
    cpu_offload(model, execution_device=0)
    assert model.device.type == "meta"
    assert input_device(model).type == "cuda"
    assert calibration_lengths(model) == (512, 1024)
    settings = dict(samples=1, prefill_density=0.9, cache_share=0.9, decode_share=0.9)
    plan, wanted = (
        hfsparse.profile(each, tiny.tokenizer(), verify_samples=1, **settings)
        for each in (model, tiny.llama(window=1024).to(DEVICE))
    )
    assert plan.layers == wanted.layers
