#!/usr/bin/env bash
# transformers 5.23.0 with bitsandbytes 0.50.2: `from_pretrained(dtype=torch.bfloat16)` of a checkpoint that is stored in
# 4 bits leaves its other weights in the dtype of the file, where the same call converts them for an ordinary checkpoint.
# With norms stored in fp32 the 4-bit model loads without a message and cannot compute: the head's product gets fp32
# activations and bf16 weights.
#
# Seen: "ordinary: norm torch.bfloat16, logits torch.bfloat16" and "4bit: norm torch.float32, RuntimeError: expected m1
# and m2 to have the same dtype, but got: float != c10::BFloat16". A writer of such checkpoints has to store one dtype.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0 transformers==5.23.0 bitsandbytes==0.50.2 accelerate==1.15.0 \
    safetensors==0.8.0
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python - 2> errors <<'PY' || { cat errors; exit 1; }
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained("ordinary")
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
quantized = AutoModelForCausalLM.from_pretrained("ordinary", quantization_config=quantization, device_map="cpu")
quantized.save_pretrained("4bit")

seen = {}
for name in ("ordinary", "4bit"):
    file = f"{name}/model.safetensors"
    weights = {key: value.float() if "norm" in key else value for key, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, device_map="cpu")
    try:
        result = f"logits {model(torch.tensor([[1, 2]])).logits.dtype}"
    except RuntimeError as error:
        result = f"RuntimeError: {error}"
    seen[name] = f"norm {model.model.norm.weight.dtype}, {result}"
    print(f"{name}: {seen[name]}")

expected = {
    "ordinary": "norm torch.bfloat16, logits torch.bfloat16",
    "4bit": "norm torch.float32, RuntimeError: expected m1 and m2 to have the same dtype, but got: "
    "float != c10::BFloat16",
}
if seen != expected:
    sys.exit("This is no longer so.")
PY
