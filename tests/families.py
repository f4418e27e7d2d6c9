"""Tiny random models of many families, from configs alone: name -> (config class, what differs)."""

import shutil
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

TOKENIZER = Path(__file__).resolve().parents[1] / "models" / "tiny"
VOCABULARY, END, PAD = 4096, 1, 0
COMMON = {"vocab_size": VOCABULARY, "eos_token_id": END, "pad_token_id": PAD, "bos_token_id": None}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
WITH_HEAD_DIM = {**SHAPE, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
LATENT |= {"v_head_dim": 12, "num_key_value_heads": 4, "first_k_dense_replace": 1}
LATENT |= {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2}
GROUPS = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8}
LINEAR |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
STATES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "eos_token_id": END}
NEOX = {**SHAPE, "rotary_pct": 0.5}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
OPT = {**SHAPE, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.3}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4}
LONGROPE |= {"long_factor": [3.0] * 4}

FAMILIES = {
    "llama": ("Llama", WITH_HEAD_DIM),
    "mistral": ("Mistral", {**WITH_HEAD_DIM, "sliding_window": 400}),
    "qwen2": ("Qwen2", SHAPE),
    "qwen3": ("Qwen3", WITH_HEAD_DIM),
    "qwen2_moe": ("Qwen2Moe", {**SHAPE, **EXPERTS, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", {**WITH_HEAD_DIM, **EXPERTS}),
    "mixtral": ("Mixtral", {**WITH_HEAD_DIM, **LOCAL_EXPERTS}),
    "gemma": ("Gemma", WITH_HEAD_DIM),
    "gemma2": ("Gemma2", {**WITH_HEAD_DIM, "sliding_window": 400}),
    "gemma3": ("Gemma3Text", {**WITH_HEAD_DIM, "sliding_window": 400}),
    "phi": ("Phi", SHAPE),
    "phi3": ("Phi3", {**SHAPE, "sliding_window": None}),
    "phi3_longrope": ("Phi3", {**SHAPE, "max_position_embeddings": 4096, "original_max_position_embeddings": 400, "rope_parameters": LONGROPE}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gpt_neox_serial": ("GPTNeoX", {**NEOX, "use_parallel_residual": False}),
    "gpt_neo": (
        "GPTNeo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 400,
            "max_position_embeddings": 512,
        },
    ),
    "gptj": ("GPTJ", {**GPT2, "rotary_dim": 4}),
    "opt": ("OPT", OPT),
    "opt_350m": ("OPT", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
    "falcon": ("Falcon", {**SHAPE, "new_decoder_architecture": False}),
    "falcon_alibi": ("Falcon", {**SHAPE, "alibi": True, "multi_query": False}),
    "falcon_new": (
        "Falcon",
        {**SHAPE, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "stablelm": ("StableLm", {**SHAPE, "partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2", SHAPE),
    "olmoe": ("Olmoe", {**SHAPE, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("Cohere", SHAPE),
    "granite": ("Granite", SHAPE),
    "smollm3": ("SmolLM3", SHAPE),
    "starcoder2": ("Starcoder2", {**SHAPE, "sliding_window": 400}),
    "deepseek_v2": ("DeepseekV2", {**SHAPE, **LATENT}),
    "deepseek_v3": ("DeepseekV3", {**SHAPE, **LATENT, **GROUPS}),
    "llama4": (
        "Llama4Text",
        {
            **WITH_HEAD_DIM,
            **LOCAL_EXPERTS,
            "intermediate_size_mlp": 48,
            "attention_chunk_size": 400,
            "no_rope_layers": [1, 0],
            "floor_scale": 400,
        },
    ),
    "gpt_oss": ("GptOss", {**WITH_HEAD_DIM, **LOCAL_EXPERTS, "sliding_window": 400}),
    "glm": ("Glm", {**WITH_HEAD_DIM}),
    "glm4": ("Glm4", {**WITH_HEAD_DIM}),
    "cohere2": ("Cohere2", {**SHAPE, "sliding_window": 400}),
    "phimoe": ("Phimoe", {**SHAPE, **LOCAL_EXPERTS}),
    "mamba": ("Mamba", {**STATES, "state_size": 8}),
    "mamba2": (
        "Mamba2",
        {**STATES, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    ),
    "qwen3_next": ("Qwen3Next", {**WITH_HEAD_DIM, **EXPERTS, **LINEAR, "shared_expert_intermediate_size": 24}),
    "qwen3_5": ("Qwen3_5Text", {**WITH_HEAD_DIM, **LINEAR}),
    "lfm2": ("Lfm2", {**SHAPE, "layer_types": ["conv", "full_attention"]}),
    "falcon_h1": (
        "FalconH1",
        {**WITH_HEAD_DIM, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    ),
    "recurrent_gemma": ("RecurrentGemma", {**SHAPE, "lru_width": 32, "attention_window_size": 400}),
    "rwkv": ("Rwkv", {**STATES, "attention_hidden_size": 32, "context_length": 512}),
    "jamba": ("Jamba", {**SHAPE, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "bert": ("Bert", {**SHAPE, "is_decoder": False}),
}


def make_model(folder: Path, name: str, **changes) -> str:
    """Write a model of a family with large random weights and the tokenizer of models/tiny."""
    config_name, options = FAMILIES[name]
    config_class = getattr(transformers, f"{config_name}Config")
    config = config_class(**{**COMMON, **options, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:  # so large that what a token attends to changes the next one
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = END
    model.save_pretrained(folder)
    for path in TOKENIZER.glob("*token*"):
        shutil.copy(path, folder)
    shutil.copy(TOKENIZER / "chat_template.jinja", folder)
    return str(folder)
