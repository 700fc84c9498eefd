#!/usr/bin/env bash
# A LLaMA saved by transformers 5.23.0 and opened by transformers 4.57.6.
#
#   config      5.23.0 writes the rotary base inside "rope_parameters" alone. 4.57.6 does not know that key, keeps its
#               default of 10000 and says nothing: a model with a base of 500000 computes other logits.
#   tokenizer   5.23.0 writes "tokenizer_class": "TokenizersBackend". 4.57.6 has no such class and raises ValueError.
#
# Output seen:
#   5.23.0 wrote rope_theta=None rope_parameters={'rope_theta': 500000.0, 'rope_type': 'default'}
#   5.23.0 wrote tokenizer_class=TokenizersBackend
#   4.57.6 read rope_theta=10000.0
#   4.57.6 tokenizer: ValueError Tokenizer class TokenizersBackend does not exist or is not currently imported.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m pip install -q --target new transformers==5.23.0
python3 -m pip install -q --target old transformers==4.57.6
PYTHONPATH=new python3 - 2> /dev/null <<'PYTHON'
import json

from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}).save_pretrained("model")
tokenizer = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained("model")
config, saved = (json.load(open(f"model/{name}.json")) for name in ("config", "tokenizer_config"))
print(f"5.23.0 wrote rope_theta={config.get('rope_theta')} rope_parameters={config['rope_parameters']}")
print(f"5.23.0 wrote tokenizer_class={saved['tokenizer_class']}")
assert "rope_theta" not in config and saved["tokenizer_class"] == "TokenizersBackend"
PYTHON
PYTHONPATH=old python3 - 2> /dev/null <<'PYTHON'
from transformers import AutoConfig, AutoTokenizer

theta = AutoConfig.from_pretrained("model").rope_theta
print(f"4.57.6 read rope_theta={theta}")
assert theta == 10000.0
try:
    AutoTokenizer.from_pretrained("model")
    raise SystemExit("4.57.6 opens the tokenizer")
except ValueError as error:
    print(f"4.57.6 tokenizer: {type(error).__name__} {error}")
    assert "TokenizersBackend" in str(error)
PYTHON
