"""Models of transformers' architectures, tiny and with random weights."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def tiny_of(architecture: str, width: int = 32, heads: int = 4, **settings):
    """Two layers with grouped heads; a head that has a bias gets one that matters."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": width // heads,
        "query_pre_attn_scalar": width // heads,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "initializer_range": 0.3,
        "attn_implementation": "eager",
    }
    config = getattr(transformers, f"{architecture}Config")(**sizes | settings)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


KINDS = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# The transformers whose kinds these are. An older one lacks some of them, and has faults in others (docs/versions.md).
IS_CURRENT = Version(transformers.__version__) >= Version("5.24")
needs_current = pytest.mark.skipif(not IS_CURRENT, reason=f"transformers {transformers.__version__} is wrong here")

# The settings that make a model of any kind small, by the names that configs have for them. `index_topk` is not small:
# a tiny indexer's scores tie at 0, and which of them are taken depends on how wide a row is.
SIZES = {
    name: value
    for value, names in (
        (64, "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions n_ctx max_seq_len "
             "context_length max_target_positions max_source_positions pronunciation_vocab_size shape_vocab_size "
             "mamba_d_ssm index_topk"),
        (48, "intermediate_size ffn_dim d_inner n_inner dim_ff dff mlp_dim decoder_ffn_dim encoder_ffn_dim "
             "feed_forward_size"),
        (32, "hidden_size d_model n_embd emb_dim word_embed_proj_dim embedding_size decoder_hidden_size lru_width "
             "input_embedding_size output_embedding_size"),
        (16, "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size q_lora_rank "
             "shared_intermediate_size expert_hidden_size expert_ffn_hidden_size kv_lora_rank mamba_d_head "
             "mamba_head_dim mamba_headdim"),
        (8, "head_dim d_head dim_head kv_channels query_pre_attn_scalar attention_head_size state_size mamba_d_state "
            "ssm_state_size mamba_chunk_size chunk_size qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim "
            "linear_key_head_dim linear_value_head_dim linear_head_dim pronunciation_embed_dim shape_embed_dim "
            "global_head_dim swa_head_dim"),
        (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
            "sliding_window num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts "
            "n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads n_mamba_heads mamba_dt_rank time_step_rank "
            "linear_num_value_heads linear_num_heads logits_scaling rotary_dim attention_window_size window_size "
            "attention_chunk_size"),
        (3.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
        (2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
            "num_encoder_layers num_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk "
            "bos_token_id decoder_start_token_id linear_num_key_heads index_n_heads depth"),
        (1, "eos_token_id n_group topk_group n_shared_experts mamba_n_groups n_groups num_expert_group "
            "num_dense_layers"),
        (0, "pad_token_id num_kv_shared_layers hidden_size_per_layer_input"),
        (0.3, "initializer_range init_std"),
        (0.25, "logit_scale"),
        (0.5, "lm_head_multiplier"),
        (True, "is_decoder causal"),
    )
    for name in names.split()
}  # fmt: skip
VISION = SIZES | {"image_size": 16, "patch_size": 8, "out_hidden_size": 32, "spatial_merge_size": 1}

LAYERS = ("layer_types", "layers_block_type")
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
ROPE = {"rope_theta": 1e4, "rope_type": "default"}
IDS = {"image_token_id": 55, "boi_token_id": 56, "eoi_token_id": 57, "audio_token_id": 58, "video_token_id": 54}
NO_TOWERS = IDS | {"vision_config": None, "audio_config": None}

# What a kind wants beside that.
SPECIAL = {
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 1, "n_output_layers": 0},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "gemma3": {"image_token_index": 55, "boi_token_index": 56, "eoi_token_index": 57, "mm_tokens_per_image": 4},
    "gemma3n_text": WINDOWED | {"hidden_size_per_layer_input": 8, "laurel_rank": 8,
                                "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4": NO_TOWERS | {"text_config": WINDOWED},
    "gemma4_text": WINDOWED,
    "gemma4_unified": NO_TOWERS | {"text_config": WINDOWED},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": MIXED | {"mamba_n_heads": 8, "mamba_d_head": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": MIXED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "qwen2_5_vl": {"text_config": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh"],
                 "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": 2 * ["linear_attention", "hybrid"], "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_kind(kind: str, **settings):
    """A causal model of transformers' kind: layers of all its types, windows of 4 tokens, logits that are scaled."""
    if kind not in KINDS and not IS_CURRENT:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    config = tiny_config(type(AutoConfig.for_model(kind)), SPECIAL.get(kind, {}) | settings)
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None  # transformers 5.0 has sdpa drop that
    return AutoModelForCausalLM.from_config(config, **{"attn_implementation": "eager"} if is_capped else {}).eval()


def tiny_config(kind: type[PreTrainedConfig], given: dict, sizes: dict = SIZES) -> PreTrainedConfig:
    default = kind()
    known = {*default.to_dict(), *default.attribute_map}
    values = {name: value for name, value in sizes.items() if name in known}
    if "qk_rope_head_dim" in known:  # its heads are of two parts, and not grouped
        values.pop("head_dim", None)
        values["num_key_value_heads"] = 4
    for name in LAYERS if given.keys().isdisjoint(LAYERS) else ():
        types = list(dict.fromkeys(getattr(default, name, None) or ()))
        target = default.attribute_map.get(name, name)
        if types and name in known and not isinstance(getattr(kind, target, None), property):
            values[name] = types * (2 // len(types) or 1)
            values["num_hidden_layers"] = len(values[name])
    if "mlp_layer_types" in known:
        types = list(dict.fromkeys(default.mlp_layer_types or ("dense", "sparse")))
        values["mlp_layer_types"] = (types * values["num_hidden_layers"])[: values["num_hidden_layers"]]
    for name in kind.sub_configs:
        part, wanted = getattr(default, name, None), given.get(name, {})
        if isinstance(part, PreTrainedConfig) and wanted is not None:
            values[name] = tiny_config(type(part), wanted, VISION if "vision" in name else SIZES).to_dict()
    return kind(
        **values | {name: value for name, value in given.items() if name not in kind.sub_configs or value is None}
    )
