"""Tiny random models: families that hfsparse supports, and some that it must refuse."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import transformers

from tests import latents
from tests.patcher import families
from tests.patcher.families import FAMILIES as DEEP
from tests.patcher.families import SIZES, WINDOW

WINDOWED = dict(
    sliding_window=WINDOW,
    layer_types=["sliding_attention", "full_attention", "full_attention"],
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
GATED = dict(  # Qwen3-Next's linear layers
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16,
    linear_value_head_dim=16, shared_expert_intermediate_size=32,
    layer_types=["linear_attention", "full_attention", "full_attention"],
)  # fmt: skip
GLOBAL = dict(  # Gemma 4: full layers have other heads than windowed ones
    WINDOWED, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True,
    num_kv_shared_layers=0, hidden_size_per_layer_input=0, vocab_size_per_layer_input=100,
)  # fmt: skip
SHARED = dict(  # Gemma 4 E2B: the last layers read the keys of layers 0 and 2
    num_hidden_layers=5, sliding_window=WINDOW, num_kv_shared_layers=2, global_head_dim=32,
    layer_types=["sliding_attention"] + ["full_attention"] * 2
    + ["sliding_attention", "full_attention"],
    hidden_size_per_layer_input=16, vocab_size_per_layer_input=100, use_double_wide_mlp=True,
)  # fmt: skip
ALTUP = dict(  # Gemma 3n, as E2B
    num_hidden_layers=5, sliding_window=WINDOW, num_kv_shared_layers=2, intermediate_size=64,
    layer_types=SHARED["layer_types"], hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=100, activation_sparsity_pattern=None,
)  # fmt: skip
STATES = dict(  # Nemotron-H: layers are attention, a state, or neither
    layers_block_type=["linear_attention", "full_attention", "moe", "full_attention"],
    mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=16, n_groups=2, chunk_size=16,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=32,
)  # fmt: skip
CHUNKED = dict(  # Llama 4: most layers see the tokens of a chunk alone, and have rope
    attention_chunk_size=WINDOW, no_rope_layers=[1, 1, 0], num_local_experts=2,
    intermediate_size_mlp=64, layer_types=["chunked_attention"] * 2 + ["full_attention"],
)  # fmt: skip
BESIDE = dict(  # Falcon-H1: each layer has attention and a state
    mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
    mamba_chunk_size=16,
)  # fmt: skip
TIED = dict(  # Zamba2: layers share their weights, not what a small adapter adds to them
    layers_block_type=["hybrid", "mamba", "hybrid"], use_mem_rope=True, num_mem_blocks=1,
    use_shared_attention_adapter=True, adapter_rank=8, head_dim=32, mamba_d_state=16,
    n_mamba_heads=4, chunk_size=16, initializer_range=0.09,  # of twice the hidden size: as sharp
)  # fmt: skip
VISION = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
IMAGE = 98  # the token that stands for a piece of an image

LATENT = {**latents.DIMS, **latents.MOE}
INDEXED = dict(LATENT, index_n_heads=2, index_head_dim=16, index_topk=8)

TEXT = {  # name: prefix of the classes, q heads, kv heads, more
    "qwen3_moe": ("Qwen3Moe", 4, 2, MOE),
    "gemma2": ("Gemma2", 4, 2, dict(WINDOWED, query_pre_attn_scalar=16)),
    "phi3": ("Phi3", 4, 2, dict(sliding_window=None)),
    "glm4": ("Glm4", 4, 2, {}),
    "gpt_oss": ("GptOss", 4, 2, dict(WINDOWED, num_local_experts=4, num_experts_per_tok=2)),
    "olmo2": ("Olmo2", 4, 2, {}),
    "olmo3": ("Olmo3", 4, 2, WINDOWED),
    "granite": ("Granite", 4, 2, dict(attention_multiplier=0.3, residual_multiplier=0.5)),
    "smollm3": ("SmolLM3", 4, 2, dict(no_rope_layers=[1, 1, 0])),
    "cohere2": ("Cohere2", 4, 2, dict(WINDOWED, logit_scale=1.0)),
    "qwen3_next": ("Qwen3Next", 4, 2, dict(MOE, **GATED)),
    "lfm2": ("Lfm2", 4, 2, dict(layer_types=["conv", "full_attention", "full_attention"])),
    "gemma4": ("Gemma4", 4, 2, GLOBAL),
    "gemma4_shared": ("Gemma4", 4, 2, SHARED),
    "gemma3n": ("Gemma3n", 4, 2, ALTUP),
    "nemotron_h": ("NemotronH", 4, 2, STATES),
    "falcon_h1": ("FalconH1", 4, 2, BESIDE),
    "zamba2": ("Zamba2", 4, 4, TIED),
    "deepseek_v3": ("DeepseekV3", 4, 4, LATENT),
    "llama4": ("Llama4", 4, 2, CHUNKED),
}
VISUAL = ("llava", "qwen2_5_vl", "gemma3_vl")
FAMILIES = (*DEEP, *TEXT, *VISUAL)


@cache
def tiny(family: str):
    """A family's tiny model, eager where it is dense. Shared: leave it as you found it."""
    return fresh(family)


def fresh(family: str):
    """A new one, with the weights of one seed."""
    built = families.fresh(family) if family in DEEP else random(shapeless(family))
    built.set_attn_implementation("eager")  # sdpa forgets Gemma 2's softcap before 5.24
    return built


def exists(family: str) -> bool:
    """Whether this transformers has the family."""
    return family not in TEXT or hasattr(transformers, f"{TEXT[family][0]}ForCausalLM")


def shapeless(family: str):
    """A model of random weights, norms not yet random."""
    torch.manual_seed(0)
    if family in TEXT:
        prefix, q_heads, kv_heads, more = TEXT[family]
        return causal(prefix, num_attention_heads=q_heads, num_key_value_heads=kv_heads, **more)
    return globals()[family]()


def random(model):
    """Norms and sinks get random weights, too: one left out shows."""
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            from_zero = model.config.model_type.startswith(("gemma", "qwen3_next"))
            parameter.data.normal_(0 if from_zero else 1, 0.1)
        if name.endswith("sinks"):
            parameter.data.normal_(0, 2)
    return model.eval()


def causal(prefix: str, **more):
    """`prefix`ForCausalLM of the common sizes."""
    model = getattr(transformers, f"{prefix}ForCausalLM")
    return model(model.config_class(**{**SIZES, **more}))


def texts(**more) -> dict:
    """A text tower's config values."""
    return {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, **more}


def llava():
    vision = dict(VISION, model_type="clip_vision_model", image_size=16, patch_size=8)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=texts(model_type="llama"),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_5_vl():
    vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=64)
    config = transformers.Qwen2_5_VLConfig(
        vision_config=dict(vision, patch_size=4, spatial_merge_size=2, window_size=16),
        text_config=texts(
            model_type="qwen2_5_vl_text",
            rope_scaling={"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]},
        ),
        image_token_id=IMAGE,
        vision_start_token_id=97,
        vision_end_token_id=96,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def gemma3_vl():
    config = transformers.Gemma3Config(
        vision_config=dict(VISION, image_size=16, patch_size=8),
        text_config=texts(**WINDOWED, model_type="gemma3_text", query_pre_attn_scalar=20),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


@dataclass(frozen=True)
class Refused:
    """A model that hfsparse can't follow: how it is built, and what patch must say."""

    model: str
    reason: str
    more: dict


SMALL = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
REFUSED = {
    "deepseek_v32": Refused("DeepseekV32ForCausalLM", "an indexer of its own", INDEXED),
    "glm_moe_dsa": Refused("GlmMoeDsaForCausalLM", "an indexer of its own", INDEXED),
    "minimax_m3": Refused(
        "MiniMaxM3VLForCausalLM",
        "an indexer of its own",
        dict(layer_types=["full_attention", "full_attention", "minimax_m3_sparse"]),
    ),
    "mllama": Refused(
        "MllamaForCausalLM",
        "can't be patched",
        dict(cross_attention_layers=[1], rope_scaling={"rope_type": "default"}),
    ),
    "diffllama": Refused("DiffLlamaForCausalLM", "can't be patched", {}),
    "t5": Refused(
        "T5ForConditionalGeneration",
        "encoder-decoder",
        dict(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2),
    ),
    "bart": Refused("BartForConditionalGeneration", "encoder-decoder", SMALL),
    "bloom": Refused("BloomForCausalLM", "can't be", dict(n_layer=2, n_head=4)),
    "falcon": Refused("FalconForCausalLM", "can't be", {}),
    "mpt": Refused("MptForCausalLM", "can't be", dict(d_model=64, n_heads=4)),
    "mamba": Refused("MambaForCausalLM", "can't be patched", dict(state_size=8)),
    "bert": Refused("BertForMaskedLM", "can't be patched", dict(num_attention_heads=4)),
}


def build_refused(name: str):
    """The model, or None where this transformers has no such class."""
    wanted = REFUSED[name]
    if not hasattr(transformers, wanted.model):
        return None
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    sizes = {k: v for k, v in SIZES.items() if name != "falcon" or k != "head_dim"}
    model = getattr(transformers, wanted.model)
    return model(model.config_class(**{**sizes, **heads, **wanted.more})).eval()
