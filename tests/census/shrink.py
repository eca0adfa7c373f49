"""Any config of transformers, made tiny: its fields are walked by name, its sub-configs too.

    config = shrink(CONFIG_MAPPING["qwen3_vl"])                        # all by the rules
    config = shrink(cls, {"text_config": {"num_hidden_layers": 6}})    # and what they can't know

What a config works out itself (a kind for each layer, rope) it works out again for its new sizes.
"""

from __future__ import annotations

import copy
from dataclasses import MISSING, Field, fields
from typing import Any

from transformers import PreTrainedConfig

VOCAB = 512
FIRST_MARK = 480  # tokens from here on stand for images and the like: no prompt has one
WINDOW = 40
LAYERS = range(4, 8)  # as many as show every kind of layer
BLOCKS = "layer_types", "layers_block_type", "block_types"

BY_VALUE = {  # a field's new value: the fields' names
    64: """hidden_size d_model n_embd embed_dim emb_dim embedding_size embedding_dim
        intermediate_size ffn_dim d_ff n_inner dff d_inner dim_ff encoder_ffn_dim
        decoder_ffn_dim ffn_hidden_size out_hidden_size output_dim projection_dim
        word_embed_proj_dim text_hidden_size encoder_hidden_size decoder_hidden_size
        projector_hidden_size projection_hidden_size projection_hidden_dim projector_input_dim
        projector_output_dim vision_output_dim vision_hidden_size image_text_hidden_size
        hidden_size_global mlp_dim projection_intermediate_size alignment_intermediate_size
        intermediate_size_mlp dense_intermediate_size moe_hidden_size adapter_out_dim
        adapter_input_size adapter_in_dim downsample_hidden_size backbone_hidden_size input_size
        lru_width pooler_output_size feed_forward_size ext_pw_out_channel
        depthwise_separable_out_channel nemo_conv_channels image_token_embed_dim
        vector_quantization_hidden_dimension router_hidden_size input_embedding_size
        output_embedding_size prompt_mid_dim patch_embed_hidden_size cross_attention_hidden_size
        posemb_grid_size output_channels dim_model_base decoder_intermediate_size
        pronunciation_embed_dim shape_embed_dim local_attention_window_len""",
    32: """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size
        expert_ffn_hidden_size share_expert_dim prefix_dense_intermediate_size codebook_dim
        num_embeddings base_channels mamba_chunk_size num_filters image_size resolution
        max_image_size index_head_dim""",
    16: """head_dim kv_channels d_kv d_head dim_head q_lora_rank kv_lora_rank qk_nope_head_dim
        qk_rope_head_dim v_head_dim swa_head_dim linear_key_head_dim linear_value_head_dim
        linear_head_dim mamba_d_state ssm_state_size state_size mamba_d_head mamba_head_dim
        mamba_dt_rank time_step_rank hidden_size_per_layer_input laurel_rank adapter_rank
        gated_norm_rank loop_gate_rank hc_lowrank o_lora_rank num_patches num_query_tokens
        image_seq_length num_image_tokens resampler_n_latents resampler_head_dim
        resampler_dim_head rotary_dim ple_embed_dim attention_head_size num_centroids
        heads_per_ngram codebook_size attention_head_dim""",
    8: """mamba_n_heads mamba_num_heads n_mamba_heads index_topk latent_query_num patch_size
        num_pos_feats index_block_size linear_num_heads""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        swa_num_attention_heads conf_num_attention_heads linear_num_value_heads num_experts
        n_routed_experts num_local_experts moe_num_experts resampler_n_heads resampler_heads
        num_sliding_attention_heads zero_expert_num hc_mult resampler_depth encoder_layers
        num_encoder_layers index_kpool""",
    2: """num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads
        num_experts_per_tok moe_topk moe_k top_k_experts moe_top_k index_n_heads depth
        conf_num_hidden_layers num_blocks num_global_layers decoder_num_layers num_codebooks
        num_quantizers n_groups mamba_n_groups mamba_ngroups index_topk_blocks o_groups
        num_lstm_layers n_shared_experts moe_num_shared_experts""",
    1: """n_group topk_group first_k_dense_replace num_dense_layers num_nextn_predict_layers""",
    WINDOW: "sliding_window sliding_window_size attention_window_size local_attention",
    1024: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions",
    VOCAB: """vocab_size vocab_size_per_layer_input audio_vocab_size decoder_vocab_size
        encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size
        unpadded_vocab_size ngram_vocab_size_base""",
}
RULES = {name: int(value) for value, names in BY_VALUE.items() for name in names.split()}
TEXT_LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers layers"
)
ALWAYS = "head_dim", "num_key_value_heads", "num_experts_per_tok"  # where None means another number
MARKS = "_token_id", "_token_index", "_start_id", "_end_id", "newline_id", "patch_id"
PLAIN = {"pad_token_id": 0, "bos_token_id": 1, "decoder_start_token_id": 1}
TOWERS = "vision", "audio", "encoder", "vq", "qformer", "sam", "perceiver", "dac", "speech"


def shrink(cls: type[PreTrainedConfig], more: dict | None = None) -> PreTrainedConfig:
    """A tiny config of this class; `more` overrules the rules, nested as the config is."""
    more = copy.deepcopy(more or {})  # configs change what they are given
    return _shrunk(cls(**more.pop("given", {})), more, {}, tower=False)


def _shrunk(of: PreTrainedConfig, more: dict, marks: dict, tower: bool) -> PreTrainedConfig:
    values: dict[str, Any] = {}
    parts = _parts(of)
    for each in fields(of):
        name, now = each.name, _value(of, each)
        if name in parts:
            inner = tower or any(word in name for word in TOWERS)
            values[name] = _shrunk(now, more.get(name, {}), marks, inner)
        elif name in more:
            continue
        elif isinstance(now, list | tuple) and each.default is not None:
            values[name] = now
        elif (new := _ruled(name, now, marks, tower)) is not None:
            values[name] = new
    if any(f.name == "kv_lora_rank" and _value(of, f) for f in fields(of)):  # MLA: no groups
        values["num_key_value_heads"] = RULES["num_attention_heads"]
    values |= {name: value for name, value in more.items() if name not in parts}
    return _with_every_kind(of, values, more)


def _parts(of: PreTrainedConfig) -> set[str]:
    return {name for name, value in vars(of).items() if isinstance(value, PreTrainedConfig)}


def _value(of: PreTrainedConfig, field: Field) -> Any:
    """A field's value; of one that differs by layer its default."""
    try:
        return getattr(of, field.name, None)
    except RuntimeError:
        return None if field.default is MISSING else field.default


def _ruled(name: str, now: Any, marks: dict, tower: bool) -> int | None:
    """A field's new value; None where it stays as it is by default."""
    if name in ALWAYS:
        return RULES[name]
    if type(now) is not int:
        return None
    if name in TEXT_LAYERS.split():
        return 2 if tower else LAYERS[0]
    if name in PLAIN:
        return PLAIN[name]
    if name.endswith(MARKS):
        return marks.setdefault(name, FIRST_MARK + len(marks))
    return RULES.get(name)


def _with_every_kind(of: PreTrainedConfig, values: dict, more: dict) -> PreTrainedConfig:
    """The config of so many layers that each kind of the original's is among them."""
    layers = next((name for name in TEXT_LAYERS.split() if name in values), None)
    if layers is None:
        return type(of)(**values)
    counts = (len(more[name]) for name in BLOCKS if name in more)
    given, config = more.get(layers, next(counts, None)), None
    if given is None and not _kinds(of):
        given = values[layers]
    for count in LAYERS if given is None else (given,):
        config = type(of)(**_cut(of, {**values, layers: count}, count))
        if _kinds(config) >= _kinds(of):
            break
    return config


def _kinds(config: PreTrainedConfig) -> set:
    found = (getattr(config, name, None) for name in BLOCKS)
    return {kind for kinds in found if kinds for kind in kinds}


def _cut(of: PreTrainedConfig, values: dict, layers: int) -> dict:
    """The values, with lists of an item a layer cut to the layers there are."""
    was = getattr(of, "num_hidden_layers", None)
    return {
        name: value[:layers]
        if isinstance(value, list | tuple) and len(value) == was and was > layers
        else value
        for name, value in values.items()
    }
