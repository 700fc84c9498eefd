"""A merged model in the oldest reader that the documentation names: transformers 4.57.

    pip install --no-deps --target T transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2
    python -m tools.oldest_readers T

It merges tiny LLaMAs, reads each with this transformers and with the one in T, and prints both. It exits 1 if they
differ in the rotary base, a token id, the end tokens, or a logit by more than TOLERANCE.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

TEXT = "a<tool>b and the rest<fact>"
SPREAD = [place * 7 % 300 for place in range(200)]  # far enough apart for the rotary base to matter
TOLERANCE = 1e-4  # in fp32; a rotary base of 10,000 for 500,000 moves these logits by 6
READ = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype=torch.float32).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
config = model.config.to_dict()
rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
with torch.no_grad():
    logits = model(torch.tensor([json.loads(sys.argv[2])])).logits[0]
print(json.dumps({
    "version": transformers.__version__, "theta": rope["rope_theta"], "ids": tokenizer(sys.argv[3])["input_ids"],
    "stops": model.generation_config.eos_token_id, "logits": logits[::20].tolist(),
}))
"""


def read(directory: Path, packages: str | None) -> dict[str, Any]:
    """What transformers makes of a model: the one in the directory `packages`, or this one."""
    paths = [packages] if packages else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ, str(directory), json.dumps(SPREAD), TEXT]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def merged_models(folder: Path) -> dict[str, Path]:
    """Merged models by name: a rotary base, LLaMA 3's scaling, extra special tokens, new tokens."""
    from tests.export.test_metadata import LLAMA3, merged
    from tests.models import save_tiny_llama
    from tests.tiny import tiny_tokenizer

    models = {}
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": 500000.0}
    for name, rope, new_tokens in (
        ("base 500,000", plain, []),
        ("LLaMA 3's scaling", LLAMA3, []),
        ("new tokens", plain, ["<fact>"]),
    ):
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
        base = save_tiny_llama(folder / name / "base", tokenizer=tokenizer, rope_parameters=rope)
        models[name] = merged(base, folder / name, new_tokens=new_tokens)
    return models


def main(packages: str) -> int:
    different = 0
    with tempfile.TemporaryDirectory() as folder:
        for name, directory in merged_models(Path(folder)).items():
            new, old = read(directory, None), read(directory, packages)
            both = zip(chain(*new["logits"]), chain(*old["logits"]), strict=True)
            largest = max(abs(one - other) for one, other in both)
            same = largest <= TOLERANCE and all(new[key] == old[key] for key in ("theta", "ids", "stops"))
            different += not same
            print(
                f"{name}: transformers {new['version']} and {old['version']}: rotary base {new['theta']:,.0f} and "
                f"{old['theta']:,.0f}, ends {new['stops']} and {old['stops']}, ids "
                f"{'equal' if new['ids'] == old['ids'] else 'DIFFER'}, logits differ by {largest:.1e} at most"
            )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
