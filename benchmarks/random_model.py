#!/usr/bin/env python3
"""Writes a Hugging Face folder with random bf16 weights of a known shape, for timing.

Speed does not depend on what the weights are, so nothing has to be downloaded. Needs torch and safetensors.
    benchmarks/random_model.py FOLDER qwen2.5-0.5b
"""
import argparse
import json
import pathlib

import torch
from safetensors.torch import save_file

# hidden, layers, query heads, kv heads, head width, MLP width, vocabulary, tied embeddings, and the family: Qwen2 has biases on
# q, k and v, Qwen3 norms of the heads of q and k
SHAPES = {
    "qwen2.5-0.5b": (896, 24, 14, 2, 64, 4864, 151936, True, "Qwen2"),
    "qwen3-0.6b": (1024, 28, 16, 8, 128, 3072, 151936, True, "Qwen3"),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 128, 8960, 151936, True, "Qwen2"),
    "llama-3.2-3b": (3072, 28, 24, 8, 128, 8192, 128256, True, "Llama"),
    "qwen2.5-7b": (3584, 28, 28, 4, 128, 18944, 152064, False, "Qwen2"),
}


def config_of(shape):
    hidden, layers, heads, kv_heads, width, mlp, vocabulary, tied, family = shape
    config = {
        "architectures": [family + "ForCausalLM"], "model_type": family.lower(),
        "hidden_act": "silu", "hidden_size": hidden, "intermediate_size": mlp, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "vocab_size": vocabulary, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family != "Qwen2":
        config["head_dim"] = width
    return config


def tensors_of(shape):
    hidden, layers, heads, kv_heads, width, mlp, vocabulary, tied, family = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(1)

    def random(*size):
        return (torch.randn(*size, generator=generator, device=device) * 0.02).to(torch.bfloat16).cpu()

    ones = torch.ones(hidden, dtype=torch.bfloat16)
    tensors = {"model.embed_tokens.weight": random(vocabulary, hidden), "model.norm.weight": ones}
    if not tied:
        tensors["lm_head.weight"] = random(vocabulary, hidden)
    matrices = {
        "self_attn.q_proj": (heads * width, hidden), "self_attn.k_proj": (kv_heads * width, hidden),
        "self_attn.v_proj": (kv_heads * width, hidden), "self_attn.o_proj": (hidden, heads * width),
        "mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns) in matrices.items():
            tensors[prefix + name + ".weight"] = random(rows, columns)
            if family == "Qwen2" and name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                tensors[prefix + name + ".bias"] = random(rows)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[prefix + name + ".weight"] = ones.clone()
        if family == "Qwen3":
            for name in ("self_attn.q_norm", "self_attn.k_norm"):
                tensors[prefix + name + ".weight"] = torch.ones(width, dtype=torch.bfloat16)
    return tensors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("shape", choices=SHAPES)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "config.json").write_text(json.dumps(config_of(shape), indent=1))
    save_file(tensors_of(shape), arguments.folder / "model.safetensors")


if __name__ == "__main__":
    main()
