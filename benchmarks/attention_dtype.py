"""Compare attention over one causal sequence in bf16, and in fp32 cast from bf16 and back, forward and backward.

Decides `UPCAST_BELOW` in qlora/model/attention.py. The two alternate; the result is the median of their ratios.

    python benchmarks/attention_dtype.py
"""

import statistics
import time

import torch
from torch.nn import functional as F

HEADS, KV_HEADS, HEAD_DIM, RUNS = 9, 3, 64, 15  # SmolLM2-135M's


def seconds(dtype: torch.dtype, tensors: list[torch.Tensor]) -> float:
    start = time.perf_counter()
    q, k, v = (x.to(dtype) for x in tensors)
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    output.to(torch.bfloat16).sum().backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    print("tokens  bf16 ms  fp32 ms  bf16 / fp32")
    for tokens in (64, 100, 190, 256, 400, 1024):
        heads = (HEADS, KV_HEADS, KV_HEADS)
        tensors = [torch.randn(1, n, tokens, HEAD_DIM, dtype=torch.bfloat16, requires_grad=True) for n in heads]
        pairs = [(seconds(torch.bfloat16, tensors), seconds(torch.float32, tensors)) for _ in range(RUNS + 1)][1:]
        half, full = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{tokens:6}  {half:7.2f}  {full:7.2f}  {ratio:11.2f}")
