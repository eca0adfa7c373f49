"""Tiny random models of multi-head latent attention (MLA), no two dims of theirs alike."""

from __future__ import annotations

from functools import cache

import torch
import transformers

from tests.patcher.families import SIZES

DIMS = dict(
    q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    head_dim=8,
)  # fmt: skip
MOE = dict(
    n_routed_experts=4, num_local_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    moe_intermediate_size=32, first_k_dense_replace=1, n_shared_experts=1,
)  # fmt: skip
LINEAR = dict(
    layer_types=["linear_attention", "full_attention", "full_attention"],
    linear_head_dim=16, linear_num_heads=4, head_dim=16, q_lora_rank=None,
)  # fmt: skip
HEADS = dict(num_attention_heads=4, num_key_value_heads=4)
FAMILIES = {  # name: prefix of its class, more
    "deepseek_v3": ("DeepseekV3", {}),
    "deepseek_v2": ("DeepseekV2", dict(q_lora_rank=None)),
    "glm4_moe_lite": ("Glm4MoeLite", {}),
    "mistral4": ("Mistral4", {}),
    "minicpm3": ("MiniCPM3", {}),
    "youtu": ("Youtu", {}),
    "axk1": ("AXK1", {}),
    "longcat_flash": (  # two attentions a layer, with a scale for latents
        "LongcatFlash",
        dict(num_hidden_layers=4, ffn_hidden_size=64, expert_ffn_hidden_size=32, moe_topk=2),
    ),
    "kimi_linear": ("KimiLinear", LINEAR),
    "bailing_hybrid": ("BailingHybrid", LINEAR),
}


def exists(family: str) -> bool:
    """Whether this transformers has it, and caches latents."""
    model = getattr(transformers, f"{FAMILIES[family][0]}ForCausalLM", None)
    return model is not None and any(hasattr(m, "expand_kv") for m in tiny(family).modules())


@cache
def tiny(family: str = "deepseek_v3"):
    """A family's tiny model, eager where it is dense. Shared: leave it as you found it."""
    return fresh(family)


def fresh(family: str = "deepseek_v3", **more):
    """A new tiny model with the weights of one seed."""
    prefix, own = FAMILIES[family]
    model = getattr(transformers, f"{prefix}ForCausalLM")
    torch.manual_seed(0)
    built = model(model.config_class(**{**SIZES, **HEADS, **DIMS, **MOE, **own, **more})).eval()
    for name, parameter in built.named_parameters():
        if "norm" in name and parameter.ndim == 1:
            parameter.data.normal_(1, 0.1)
    built.set_attn_implementation("eager")
    return built
