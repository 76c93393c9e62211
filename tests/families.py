"""The one list of model families for tests: tiny configurations, with random weights.

Lethe trains and evaluates `FAMILIES` as the plain model does (docs/guides/model-and-data.md). It refuses `OTHERS`, either
with adapters or always. All have hidden size 32, four blocks, four heads and a window of 64 tokens.
"""

from __future__ import annotations

from typing import Any

WINDOW = 64
LOCAL = 8
"""Tokens that local attention sees, in families that have it."""

NAMED_IN_GPT2S_WORDS = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": WINDOW}
NEOX = {"rotary_pct": 0.5, "hidden_dropout": 0.0}
GROUPED = {"num_key_value_heads": 2}
EACH = {"num_key_value_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {"shared_expert_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEADS_OF_8 = {"head_dim": 8}
MIXED = {"sliding_window": LOCAL, "layer_types": ["sliding_attention", "full_attention"] * 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8} | EACH
DEEPSEEK = LATENT | {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "head_dim": 8,
}  # fmt: skip
FALCON = {"ffn_hidden_size": 64, "alibi": False}
STATE = {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}
HYBRID = {"mamba_d_state": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4}),
    "cohere": ("cohere", GROUPED),
    "cohere2": ("cohere2", GROUPED | {"sliding_window": LOCAL, "sliding_window_pattern": 2}),
    "deepseek_v2": ("deepseek_v2", DEEPSEEK),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "falcon": ("falcon", FALCON | {"multi_query": True, "parallel_attn": True}),
    "falcon_alibi": ("falcon", FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "falcon_new": ("falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma": ("gemma", GROUPED | HEADS_OF_8),
    "gemma2": ("gemma2", GROUPED | HEADS_OF_8 | MIXED),
    "gemma3_text": ("gemma3_text", GROUPED | HEADS_OF_8 | MIXED),
    "glm4": ("glm4", GROUPED | HEADS_OF_8),
    "gpt2": ("gpt2", NAMED_IN_GPT2S_WORDS),
    "gpt_bigcode": ("gpt_bigcode", NAMED_IN_GPT2S_WORDS),
    "gpt_neo": (
        "gpt_neo",
        {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "intermediate_size": 64, "max_position_embeddings": WINDOW,
         "window_size": LOCAL, "attention_types": [[["global", "local"], 2]]},
    ),
    "gpt_neox": ("gpt_neox", NEOX | {"use_parallel_residual": True}),
    "gpt_neox_sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False}),
    "gpt_oss": ("gpt_oss", GROUPED | HEADS_OF_8 | LOCAL_EXPERTS | MIXED),
    "gptj": ("gptj", NAMED_IN_GPT2S_WORDS | {"rotary_dim": 4}),
    "granite": ("granite", GROUPED),
    "granitemoehybrid": (
        "granitemoehybrid",
        GROUPED | LOCAL_EXPERTS | HYBRID | {"shared_intermediate_size": 16, "layer_types": ["mamba", "attention"] * 2},
    ),
    "lfm2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8}),
    "llama": ("llama", GROUPED),
    "llama4_text": (
        "llama4_text",
        GROUPED | LOCAL_EXPERTS | HEADS_OF_8 | {"intermediate_size_mlp": 64, "num_experts_per_tok": 1},
    ),
    "mistral": ("mistral", GROUPED | {"sliding_window": LOCAL}),
    "mixtral": ("mixtral", GROUPED | LOCAL_EXPERTS),
    "nemotron": ("nemotron", GROUPED),
    "olmo": ("olmo", EACH),
    "olmo2": ("olmo2", EACH),
    "olmoe": ("olmoe", EACH | {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "phi": ("phi", EACH | {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", GROUPED | {"sliding_window": LOCAL}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2_moe": ("qwen2_moe", GROUPED | EXPERTS | SHARED),
    "qwen3": ("qwen3", GROUPED | HEADS_OF_8),
    "qwen3_moe": ("qwen3_moe", GROUPED | HEADS_OF_8 | EXPERTS),
    "qwen3_next": (
        "qwen3_next",
        GROUPED | HEADS_OF_8 | EXPERTS | SHARED | {"linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    ),
    "smollm3": ("smollm3", GROUPED),
    "stablelm": ("stablelm", EACH | {"partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", GROUPED),
}  # fmt: skip
"""By name: the model type of transformers, and what its tiny configuration has beside `_common`."""

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"hidden_dropout_prob": 0.0}),
    "falcon_h1": ("falcon_h1", GROUPED | HYBRID | {"head_dim": 8, "mamba_d_ssm": 64}),
    "gemma3n_text": (
        "gemma3n_text",
        GROUPED | HEADS_OF_8 | MIXED | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 400, "laurel_rank": 4,
            "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "jamba": ("jamba", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}),
    "mamba": ("mamba", STATE | {"intermediate_size": 64, "time_step_rank": 4}),
    "mamba2": ("mamba2", STATE | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": WINDOW, "expansion_ratio": 2}),
    "phimoe": ("phimoe", GROUPED | LOCAL_EXPERTS | {"sliding_window": LOCAL}),
}  # fmt: skip


PLAIN = ["gpt2", "llama", "qwen2", "olmo2", "gpt_neox", "gpt_neox_sequential"]
"""Architectures for tests that need several kinds of blocks, but not every family."""
WITHOUT_LORA = ["falcon_h1", "mamba", "mamba2"]
"""Families that PEFT does not adapt."""
EXPERTS = ["deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoehybrid", "llama4_text", "mixtral", "olmoe", "qwen2_moe",
           "qwen3_moe", "qwen3_next"]  # fmt: skip
"""Families with mixtures of experts."""


def configuration(family: str, tokenizer: Any, **overrides: Any) -> Any:
    """The transformers configuration of a tiny model of a family, for the vocabulary of `tokenizer`."""
    from transformers import AutoConfig

    kind, settings = (FAMILIES | OTHERS)[family]
    fields = _common(tokenizer) if "d_model" in settings or {"hidden_size", "n_embd"} & set(settings) else _usual(tokenizer)
    return AutoConfig.for_model(kind, **(fields | settings | overrides))


def _common(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "initializer_range": 0.2,
        "bos_token_id": tokenizer.bos_token_id if tokenizer.bos_token else tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _usual(tokenizer: Any) -> dict[str, Any]:
    return _common(tokenizer) | {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": WINDOW,
    }
