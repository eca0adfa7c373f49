"""What the census asks: every pair of model type and class of two mappings, and variants.

A variant mirrors a well-known checkpoint where its config differs from the class's defaults in
what attention sees: other kinds of layers, head counts by layer, rope, no window.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.census.shrink import FIRST_MARK, WINDOW, shrink

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
MAPPINGS = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}

KEPT = "A_log", "dt_bias", ".D", "a_param"

EXPERTS = dict(num_experts=4, top_k_experts=2, moe_intermediate_size=32)
HYBRID = dict(layers_block_type=[LINEAR, LINEAR, "hybrid", LINEAR, "hybrid", LINEAR, "hybrid"])
CONVS = dict(layer_types=["conv", FULL, "conv", FULL])
MLPS = ["dense", *["sparse"] * 3]
DECODER = dict(is_decoder=True)
IMAGE_WORDS = dict(vocabulary_map={"<image>": FIRST_MARK})
MROPE = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 3, 3])
HALF_MROPE = dict(MROPE, mrope_section=[1, 1, 2], partial_rotary_factor=0.5)
GLOBAL = dict(global_head_dim=32)
NO_EXTRA = dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0)
ASSISTANT = dict(
    given=dict(text_config=NO_EXTRA),
    text_config=dict(GLOBAL, **NO_EXTRA),
)
MARKS = dict(vision_start_token_id=FIRST_MARK + 20, vision_end_token_id=FIRST_MARK + 21)
INDEXER = dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8,
    indexer_compress_ratio=4,
)  # fmt: skip
SHARED = dict(
    GLOBAL, num_kv_shared_layers=2,
    layer_types=[SLIDING, SLIDING, FULL, FULL, SLIDING, FULL],
)  # fmt: skip
MORE = {  # what the rules of `shrink` can't know, by model type
    "apertus1p5": dict(
        audio_config=dict(codebook_dim=64), image_token_offset=440, audio_token_offset=456
    ),
    "chameleon": IMAGE_WORDS,
    "cohere_compass": dict(text_config=dict(rope_parameters={FULL: MROPE, SLIDING: MROPE})),
    "cohere_compass_text": dict(rope_parameters={FULL: MROPE, SLIDING: MROPE}),
    "cosmos3_edge": dict(text_config=dict(rope_parameters=MROPE)),
    "dbrx": dict(attn_config=dict(rope_theta=10000.0, clip_qkv=8.0)),
    "deepseek_ocr2": dict(text_config=dict(num_experts_per_tok=2, mlp_layer_types=MLPS)),
    "diffusion_gemma": dict(text_config=dict(GLOBAL, **EXPERTS)),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1),
    "dory": dict(
        n_input_layers=1,
        n_recurrent_layers=2,
        n_output_layers=1,
        sliding_window=WINDOW,
        layer_types=[SLIDING, FULL, FULL, FULL],
    ),
    "dots3_note": dict(vision_config=dict(mlp_layer_types=["dense"] * 2)),
    "emu3": IMAGE_WORDS,
    "ernie4_5_vl_moe": dict(text_config=dict(rope_parameters=dict(MROPE, mrope_section=[3, 3, 2]))),
    "falcon_h1": dict(mamba_d_ssm=128),
    "gemma3n_text": dict(SHARED, intermediate_size=64),
    "gemma4": dict(text_config=GLOBAL),
    "gemma4_assistant": ASSISTANT,
    "gemma4_text": GLOBAL,
    "gemma4_unified": dict(text_config=GLOBAL),
    "gemma4_unified_assistant": ASSISTANT,
    "gemma4_unified_text": GLOBAL,
    "glm46v": dict(text_config=dict(rope_parameters=MROPE)),
    "glm4v": dict(text_config=dict(rope_parameters=MROPE)),
    "glm4v_moe": dict(text_config=dict(rope_parameters=HALF_MROPE)),
    "glm5_next": dict(text_config=dict(qk_rope_head_dim=0)),
    "glm_ocr": dict(text_config=dict(rope_parameters=MROPE)),
    "glmga": dict(text_config=dict(rope_parameters=MROPE)),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granite4_vision": dict(deepstack_layer_map=[[-1, 0]], downsample_rate="1/2"),
    "hunyuan_vl": dict(text_config=dict(rope_parameters=MROPE)),
    "hy_v4_vl": dict(text_config=dict(rope_parameters=MROPE)),
    "lfm2": CONVS,
    "lfm2_moe": CONVS,
    "lfm2_vl": dict(text_config=CONVS),
    "mamba2": dict(num_heads=8),
    "molmo2": dict(adapter_config=dict(vision_feature_layer=[1, 0])),
    "muse_spark": dict(audio_config=dict(num_hidden_layers=4, hidden_sizes=(64,) * 4)),
    "nemotron_h_omni": dict(vision_config=dict(video_temporal_patch_size=2)),
    "paddleocr_vl": dict(text_config=dict(rope_parameters=MROPE)),
    "qwen2_5_omni_thinker": dict(MARKS, text_config=dict(rope_parameters=MROPE)),
    "qwen2_5_vl": dict(text_config=dict(rope_parameters=MROPE)),
    "qwen2_vl": dict(text_config=dict(rope_parameters=MROPE)),
    "qwen3_omni_moe_thinker": MARKS,
    "qwen4_exp": dict(text_config=INDEXER),
    "qwen4_exp_text": INDEXER,
    "reformer": dict(DECODER, axial_pos_embds_dim=(16, 48)),
    "step3p7": dict(text_config=dict(sliding_window=WINDOW)),
    "zamba": dict(HYBRID, attention_hidden_size=128, attention_head_dim=32),
    "zamba2": HYBRID,
    "zaya": dict(num_experts_per_tok=1),
}


@dataclass(frozen=True)
class Entry:
    """One question of the census: how its model is built, and under which name it is kept."""

    name: str
    model_type: str
    mapping: str
    more: dict = field(default_factory=dict, compare=False)
    variant: bool = False

    @property
    def cls(self) -> type[PreTrainedModel]:
        return getattr(transformers, MAPPINGS[self.mapping][self.model_type])


CAUSAL, IMAGE = MAPPINGS
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=128,
)  # fmt: skip
LONGROPE = dict(
    rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 8, long_factor=[4.0] * 8,
    original_max_position_embeddings=256,
)  # fmt: skip
GEMMA4 = dict(GLOBAL, **NO_EXTRA)
GEMMA4_26B = dict(GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=1, num_hidden_layers=6)
GEMMA4_MOE = dict(enable_moe_block=True, **EXPERTS)
GRANITE4_H = dict(layer_types=[LINEAR, LINEAR, FULL, LINEAR, FULL])
NEMOTRON_H = [LINEAR, "mlp", FULL, "mlp", LINEAR, FULL]
NEMOTRON_3 = [LINEAR, "moe", FULL, "moe", LINEAR, FULL]
MINIMAX_M3 = dict(layer_types=[FULL, FULL, "minimax_m3_sparse", "minimax_m3_sparse"])
MIXED = [FULL, SLIDING, SLIDING, SLIDING, FULL]
BY_LAYER = dict(layer_types=MIXED, num_attention_heads_per_layer=[4, 6, 6, 6, 4])
VARIANTS: dict[str, tuple[str, str, dict]] = {  # name: mapping, model type, more
    "bamba-9b": (CAUSAL, "bamba", dict(attn_layer_indices=[1, 3])),
    "bert-decoder": (CAUSAL, "bert", DECODER),
    "command-a": (CAUSAL, "cohere2", dict(logit_scale=0.25)),
    "deepseek-r1": (CAUSAL, "deepseek_v3", dict(rope_parameters=YARN)),
    "deepseek-v2-lite": (CAUSAL, "deepseek_v2", dict(q_lora_rank=None)),
    "dory-last-loop": (CAUSAL, "dory", dict(recurrent_kv_cache_mode="last_loop")),
    "exaone-4-1.2b": (CAUSAL, "exaone4", dict(sliding_window=None, layer_types=[FULL] * 4)),
    "falcon-40b": (CAUSAL, "falcon", dict(new_decoder_architecture=True, alibi=False)),
    "gemma-3-1b": (CAUSAL, "gemma3_text", dict(num_key_value_heads=1)),
    "gemma-4-26b-a4b": (CAUSAL, "gemma4_text", dict(GEMMA4_26B, **GEMMA4_MOE)),
    "gemma-4-31b": (IMAGE, "gemma4", dict(text_config=GEMMA4_26B)),
    "gemma-4-12b": (IMAGE, "gemma4_unified", dict(text_config=GEMMA4_26B)),
    "gemma-4-e2b": (CAUSAL, "gemma4_text", dict(SHARED, use_double_wide_mlp=True)),
    "gemma-4-e4b": (IMAGE, "gemma4", dict(text_config=SHARED)),
    "glm-4-9b-1m": (CAUSAL, "glm", dict(num_key_value_heads=1, rope_parameters=YARN)),
    "granite-4.0-h": (CAUSAL, "granitemoehybrid", GRANITE4_H),
    "granite-4.0-micro": (
        CAUSAL, "granitemoehybrid", dict(layer_types=[FULL] * 4, position_embedding_type="rope")
    ),
    "laguna-xs.2": (CAUSAL, "laguna", BY_LAYER),
    "llama-3.1-8b": (CAUSAL, "llama", dict(rope_parameters=LLAMA3)),
    "llama-4-full": (CAUSAL, "llama4_text", dict(layer_types=[FULL] * 4)),
    "mimo-v2-flash": (
        CAUSAL, "mimo_v2_flash", dict(layer_types=MIXED, num_key_value_heads=1)
    ),
    "minimax-m3": (IMAGE, "minimax_m3_vl", dict(text_config=MINIMAX_M3)),
    "minimax-m3-text": (CAUSAL, "minimax_m3_vl_text", MINIMAX_M3),
    "minimax-m3-full": (CAUSAL, "minimax_m3_vl_text", dict(layer_types=[FULL] * 4)),
    "ministral-3-8b": (IMAGE, "mistral3", dict(text_config=dict(sliding_window=None))),
    "ministral-8b": (
        CAUSAL, "ministral", dict(layer_types=[FULL, SLIDING] * 2)
    ),
    "mistral-7b-v0.3": (CAUSAL, "mistral", dict(sliding_window=None)),
    "mixtral-8x7b-window": (CAUSAL, "mixtral", dict(sliding_window=WINDOW)),
    "santacoder-mha": (CAUSAL, "gpt_bigcode", dict(multi_query=False)),
    "nemotron-3-nano": (CAUSAL, "nemotron_h", dict(layers_block_type=NEMOTRON_3)),
    "nemotron-h-8b": (CAUSAL, "nemotron_h", dict(layers_block_type=NEMOTRON_H)),
    "olmo-3-32b": (CAUSAL, "olmo3", dict(rope_parameters=YARN)),
    "phi-3-mini-128k": (CAUSAL, "phi3", dict(rope_parameters=LONGROPE, sliding_window=None)),
    "phi-4-mini": (
        CAUSAL, "phi3", dict(rope_parameters=dict(LONGROPE, partial_rotary_factor=0.75,
        short_factor=[1.0] * 6, long_factor=[4.0] * 6), sliding_window=None)
    ),
    "qwen2-7b-window": (
        CAUSAL, "qwen2", dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2)
    ),
    "qwen3-32b-yarn": (CAUSAL, "qwen3", dict(rope_parameters=YARN)),
    "qwen3.5-mha": (CAUSAL, "qwen3_5_text", dict(num_key_value_heads=4, num_hidden_layers=4)),
    "roberta-decoder": (CAUSAL, "roberta", DECODER),
    "smollm3-3b": (CAUSAL, "smollm3", dict(no_rope_layers=[1, 1, 0, 1])),
    "starcoder2-7b": (CAUSAL, "starcoder2", dict(sliding_window=WINDOW)),
    "step-3.7-flash": (
        IMAGE, "step3p7",
        dict(text_config=dict(layer_types=MIXED, sliding_window=WINDOW,
        num_sliding_attention_heads=6)),
    ),
}  # fmt: skip


@cache
def entries() -> tuple[Entry, ...]:
    """All pairs of the mappings of the transformers that is here, then the variants."""
    found: dict[tuple[str, str], Entry] = {}
    for mapping, names in MAPPINGS.items():
        for kind, name in names.items():
            entry = Entry(f"{kind}/{name}", kind, mapping, MORE.get(kind, {}))
            found.setdefault((kind, name), entry)
    made = [
        Entry(name, kind, mapping, {**MORE.get(kind, {}), **more}, variant=True)
        for name, (mapping, kind, more) in VARIANTS.items()
    ]
    return *found.values(), *made


def build(entry: Entry) -> PreTrainedModel:
    """Its tiny random model: sharp attention and noisy norms, so that what is left out shows."""
    torch.manual_seed(0)
    config, cls = shrink(CONFIG_MAPPING[entry.model_type], entry.more), entry.cls
    parts = (config, *(getattr(config, name) for name in config.sub_configs))
    fitting = next((part for part in parts if type(part) is cls.config_class), config)
    return roughen(cls(fitting).float().eval())


def roughen(model: PreTrainedModel) -> PreTrainedModel:
    """Matrices of 0.12, all else moved by a tenth; what states decay by stays as it is."""
    for name, parameter in model.named_parameters():
        if name.endswith(KEPT):
            continue
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.12)
        elif "sink" in name:
            parameter.data.normal_(0, 2)
        else:
            size = torch.where(parameter == 0, 1, parameter.data.abs())
            parameter.data += size * torch.randn_like(parameter) * 0.1
    ours = model.generation_config  # special tokens end nothing
    ours.eos_token_id = ours.forced_eos_token_id = ours.forced_bos_token_id = None
    ours.pad_token_id, ours.bos_token_id = 0, 1
    return model
