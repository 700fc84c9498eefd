"""What docs/serving.md hands to servers: our commands in it parse, and an adapter has what vLLM and PEFT read."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig
from safetensors import safe_open

from qlora.adapters.model import LoRAModel
from qlora.cli.commands.chat import ChatConfig
from qlora.cli.commands.export import ExportConfig
from qlora.cli.commands.merge import MergeConfig
from qlora.config.lora import LoRAConfig
from qlora.config.parse import parse_args
from qlora.config.run import RunConfig
from qlora.model.load import load_base_model
from tests.models import save_tiny_llama

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
OURS = {
    "python train.py": RunConfig,
    "python -m qlora merge": MergeConfig,
    "python -m qlora export": ExportConfig,
    "python -m qlora chat": ChatConfig,
}


def our_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith(("python train.py", "python -m qlora"))]


def test_the_page_shows_each_of_our_commands() -> None:
    assert {name for name in OURS for line in our_commands() if line.startswith(name)} == set(OURS)


@pytest.mark.parametrize("line", our_commands())
def test_our_commands_parse(line: str) -> None:
    name = next(name for name in OURS if line.startswith(name))
    config: Any = parse_args(OURS[name], name, shlex.split(line.removeprefix(name), comments=True))
    assert json.dumps(vars(config), default=vars) != json.dumps(vars(OURS[name]()), default=vars)


@pytest.mark.parametrize(("settings", "rank"), [({}, 8), ({"rank": 16, "use_rslora": True}, 16)])
def test_an_adapter_has_what_vllm_and_peft_read(tmp_path: Path, settings: dict[str, Any], rank: int) -> None:
    """vLLM's PEFTHelper wants r, lora_alpha and target_modules, and no DoRA, bias or saved modules beside them."""
    base = str(save_tiny_llama(tmp_path / "base"))
    model = LoRAModel(load_base_model(base, cache=False), LoRAConfig(**settings), base_name=base)
    model.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (rank, 16.0, base)
    assert sorted(written["target_modules"]) == ["q_proj", "v_proj"]
    assert (written["peft_type"], written["task_type"]) == ("LORA", "CAUSAL_LM")
    assert (written["use_dora"], written["bias"], written["modules_to_save"]) == (False, "none", None)
    assert written["use_rslora"] is settings.get("use_rslora", False)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        ranks = {file.get_slice(name).get_shape()[0] for name in names if ".lora_A." in name}
    pattern = r"base_model\.model\.model\.layers\.\d+\.self_attn\.[qv]_proj\.lora_[AB]\.weight"
    assert len(names) == 8 and all(re.fullmatch(pattern, name) for name in names) and ranks == {rank}
    read = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert isinstance(read, LoraConfig) and (read.r, read.base_model_name_or_path) == (rank, base)
