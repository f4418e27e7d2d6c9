"""Tiny random models of many families, from configs alone, and a chat for them to play."""

import shutil
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

import envs

TOKENIZER = Path(__file__).resolve().parents[1] / "models" / "tiny"
LONGEST = 128  # tokens that the models read: their positions, windows and chunks
IDS = {"vocab_size": 4096, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
PLAIN = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LONGEST,
}
LLAMA = {**PLAIN, "head_dim": 8}
SLIDING = {**LLAMA, "max_position_embeddings": 512, "sliding_window": LONGEST}
SHORT = {"sliding_window": 16}  # histories are longer
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 24}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
STATES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LONGEST}
OPT = {**PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.3}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
}

LLAMA4 = {
    **LLAMA,
    **LOCAL_EXPERTS,
    "max_position_embeddings": 512,
    "intermediate_size_mlp": 48,
    "attention_chunk_size": LONGEST,
    "no_rope_layers": [1, 0],
    "floor_scale": 2 * LONGEST,
}
GPT_NEO = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 2 * LONGEST,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

# name: (class of its config, what it is given)
TRAINED = {
    "llama": ("Llama", LLAMA),
    "mistral": ("Mistral", SLIDING),
    "qwen2": ("Qwen2", PLAIN),
    "qwen2_sliding": (
        "Qwen2",
        {**SLIDING, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", LLAMA),
    "qwen2_moe": ("Qwen2Moe", {**PLAIN, **SHARED_EXPERT}),
    "qwen3_moe": ("Qwen3Moe", {**LLAMA, **EXPERTS}),
    "mixtral": ("Mixtral", {**LLAMA, **LOCAL_EXPERTS}),
    "gemma": ("Gemma", LLAMA),
    "gemma2": ("Gemma2", SLIDING),
    "gemma3": ("Gemma3Text", SLIDING),
    "phi": ("Phi", PLAIN),
    "phi3": ("Phi3", {**SLIDING, "original_max_position_embeddings": 512}),
    "phi3_longrope": (
        "Phi3",
        {
            **PLAIN,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": LONGEST,
            "rope_parameters": LONGROPE,
        },
    ),
    "phimoe": ("Phimoe", {**PLAIN, **LOCAL_EXPERTS}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neo": ("GPTNeo", GPT_NEO),
    "gpt_neo_window": ("GPTNeo", {**GPT_NEO, "window_size": 16}),
    "gpt_neox": ("GPTNeoX", {**PLAIN, "rotary_pct": 0.5}),
    "gptj": ("GPTJ", {**GPT2, "rotary_dim": 4}),
    "gpt_bigcode": ("GPTBigCode", GPT2),
    "opt": ("OPT", OPT),
    "opt_350m": ("OPT", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {**PLAIN, "new_decoder_architecture": False}),
    "falcon_alibi": ("Falcon", {**PLAIN, "alibi": True, "multi_query": False}),
    "falcon_new": (
        "Falcon",
        {**PLAIN, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "stablelm": ("StableLm", {**PLAIN, "partial_rotary_factor": 0.5}),
    "olmo2": ("Olmo2", PLAIN),
    "olmoe": ("Olmoe", {**PLAIN, "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("Cohere", {**PLAIN, "logit_scale": 1.0}),
    "cohere2": ("Cohere2", {**SLIDING, "logit_scale": 1.0}),
    "granite": ("Granite", PLAIN),
    "smollm3": ("SmolLM3", PLAIN),
    "starcoder2": ("Starcoder2", SLIDING),
    "deepseek_v2": ("DeepseekV2", {**PLAIN, **LATENT}),
    "deepseek_v3": (
        "DeepseekV3",
        {**PLAIN, **LATENT, "n_group": 2, "topk_group": 1, "n_shared_experts": 1},
    ),
    "llama4": ("Llama4Text", LLAMA4),
    "gpt_oss": ("GptOss", {**SLIDING, **LOCAL_EXPERTS}),
    "glm": ("Glm", LLAMA),
    "glm4": ("Glm4", LLAMA),
    "gemma3_vision": ("Gemma3", {"text_config": {**SLIDING, **IDS}, "vision_config": VISION}),
    "mistral_window": ("Mistral", {**SLIDING, **SHORT}),
    "gemma2_window": ("Gemma2", {**SLIDING, **SHORT}),
    "gemma3_window": ("Gemma3Text", {**SLIDING, **SHORT}),
    "gpt_oss_window": ("GptOss", {**SLIDING, **LOCAL_EXPERTS, **SHORT}),
    "llama4_chunk": ("Llama4Text", {**LLAMA4, "attention_chunk_size": 16}),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512}),
    "llama4_vision": ("Llama4", {"text_config": {**LLAMA4, **IDS}, "vision_config": VISION}),
}

# name: (class of its config, what it is given, why it can not be trained)
REFUSED = {
    "mamba": ("Mamba", STATES, "keep a state"),
    "mamba2": (
        "Mamba2",
        {**STATES, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
        "keep a state",
    ),
    "qwen3_next": ("Qwen3Next", {**LLAMA, **LINEAR, **SHARED_EXPERT}, "keep a state"),
    "qwen3_5": ("Qwen3_5Text", {**LLAMA, **LINEAR}, "keep a state"),
    "lfm2": ("Lfm2", {**PLAIN, "layer_types": ["conv", "full_attention"]}, "keep a state"),
    "falcon_h1": (
        "FalconH1",
        {
            **LLAMA,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
        "keep a state",
    ),
    "recurrent_gemma": ("RecurrentGemma", {**PLAIN, "lru_width": 32}, "keep a state"),
    "rwkv": (
        "Rwkv",
        {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
        "keep a state",
    ),
    "jamba": (
        "Jamba",
        {
            **PLAIN,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        "keep a state",
    ),
    "gpt_neo_short": ("GPTNeo", {**GPT_NEO, "max_position_embeddings": 64}, "reads 32"),
    "bert": ("Bert", {**PLAIN, "is_decoder": False}, "not causal"),
    "gemma3_encoder": (
        "Gemma3Text",
        {**SLIDING, "use_bidirectional_attention": True},
        "not causal",
    ),
    "llama4_scale": ("Llama4Text", {**LLAMA4, "floor_scale": 64}, "reads 32"),
    "phi3_short": (
        "Phi3",
        {**TRAINED["phi3_longrope"][1], "original_max_position_embeddings": 64},
        "reads 64",
    ),
    "gemma3_longrope": (
        "Gemma3Text",
        {
            **SLIDING,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {**LONGROPE, "original_max_position_embeddings": 64},
            },
        },
        "reads 64",
    ),
    "gpt2_short": ("GPT2", {**GPT2, "n_positions": 64}, "reads 64"),
}


def make_model(folder: Path, name: str, **changes) -> str:
    """Write a model of a family, with large random weights, and the tokenizer of models/tiny."""
    config_name, options, *_ = (TRAINED | REFUSED)[name]
    config = getattr(transformers, f"{config_name}Config")(**{**IDS, **options, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:  # so large that what a token attends to changes the next one
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = IDS["eos_token_id"]
    model.save_pretrained(folder)
    for path in [*TOKENIZER.glob("*token*"), TOKENIZER / "chat_template.jinja"]:
        shutil.copy(path, folder)
    return str(folder)


class Uneven(envs.Task):
    """What is long in one episode's first turn is short in its second, the other way in another's.

    So the columns of a batch's cache are more than any of its histories has tokens.
    """

    name, num_turns, success, reward_shift = "uneven", 2, 4.0, -1.0

    def items(self):
        shapes = [{"first": 26, "second": 2}, {"first": 4, "second": 26}]
        items = [{**shape, "ends": k == 1} for shape in shapes for k in range(4)]
        return items, items

    def observe(self, item):
        return [f"agent {i}: " + "word " * item["first"] for i in range(self.num_agents)]

    def score(self, item, actions):
        reward = 5 if item["ends"] else sum(map(len, actions)) % 4
        return float(reward), {"success": float(reward >= 4)}

    def feedback(self, item, actions, info, turn):
        return [f"turn {turn}: " + "word " * item["second"] for _ in range(self.num_agents)]

    def render(self, item, actions):
        return " | ".join(actions)
