"""Test every variant of LoRA in every stage; `python -m tools.variants` prints the table of docs/adapters.md.

A stage is a function that asserts what the table's column says and returns the words for the cell.
test_variants.py runs each as a test; here they are run for their outcomes. A new variant is a new row of VARIANTS.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora.adapters.load import load_adapter
from qlora.adapters.peft_files import save_adapter
from qlora.config.generate import Sampling
from qlora.config.lora import LoRAConfig
from qlora.config.merge import MergeOptions
from qlora.data.batches import make_batches
from qlora.data.example import Example
from qlora.data.tokenizer_files import add_tokens
from qlora.export.merge import merge_adapter
from qlora.generation import generate
from qlora.lora.adalora_optimizer import build_adapter_optimizer
from qlora.lora.adapter import active_adapter, inject_lora, lora_layers
from qlora.lora.full_parameters import named_base_parameters
from qlora.lora.optimizer import take_gradients
from qlora.lora.state import adapter_state, lora_state_dict
from qlora.lora.svd_start import initialize_adapter
from qlora.lora.trainable import base_parameters, freeze_base, lora_parameters, merge_lora, unmerge_lora
from qlora.model.load import load_base_model
from qlora.model.tokenizer import load_tokenizer
from qlora.system.file_names import CONFIG, WEIGHTS
from qlora.training.step import train_step
from tests.models import save_tiny_llama
from tests.reference import relative_error
from tests.tiny import tiny_tokenizer

IDS = torch.arange(5, 45).view(2, 20)
FP32_TOLERANCE = 1e-5  # two layers of fp32 products of up to 128 terms, summed in another order
BF16_TOLERANCE = 2**-6
NUM_STEPS = 8
YES = "yes"


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        settings: of LoRAConfig.
        peft: of PEFT's LoraConfig for the same; None: PEFT has no such variant.
        peft_class: its other class.
        use_4bit: whether the base is quantized.
        tolerance: of logits against PEFT's, relative; ten times as much of gradients.
        learning_rate: of the steps here.
        from_peft: whether an adapter made by PEFT differs from the plain one; PEFT's LoftQ needs its own base.
    """

    settings: dict[str, Any]
    peft: dict[str, Any] | None = field(default_factory=dict)
    peft_class: str = "LoraConfig"
    use_4bit: bool = True
    tolerance: float = FP32_TOLERANCE
    learning_rate: float = 1e-2
    from_peft: bool = True


PATTERNS: dict[str, Any] = {
    "rank_pattern": {"0.self_attn.q_proj": 2, r"mlp\..*": 6},
    "alpha_pattern": {"v_proj": 3.0, "model.layers.1.mlp.up_proj": 20.0},
}
VARIANTS = {
    "LoRA": Variant({}),
    "all linear layers": Variant({"target_modules": "all-linear"}, {"target_modules": "all-linear"}),
    "dropout": Variant({"dropout": 0.1}, {"lora_dropout": 0.1}),
    "rsLoRA": Variant({"use_rslora": True}, {"use_rslora": True}),
    "DoRA": Variant({"use_dora": True}, {"use_dora": True}),
    "DoRA + rsLoRA": Variant({"use_dora": True, "use_rslora": True}, {"use_dora": True, "use_rslora": True}),
    "bias all": Variant({"bias": "all"}, {"bias": "all"}),
    "bias lora_only": Variant({"bias": "lora_only"}, {"bias": "lora_only"}),
    "rank and alpha patterns": Variant(PATTERNS, PATTERNS),
    "layer range": Variant({"layers": "1"}, {"layers_to_transform": [1]}),
    "LoRA+": Variant({"lora_plus_ratio": 4.0}),
    "AdaLoRA": Variant(
        {"use_adalora": True, "adalora_target_rank": 2},
        {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 8},
        "AdaLoraConfig",
        learning_rate=0.1,  # its singular values start at zero, and A and B as large as they stay
    ),
    # PEFT keeps the residual in fp32 where ours is rounded to bf16; test_initialize.py compares without rounding.
    "PiSSA, 16-bit base": Variant(
        {"init": "pissa"}, {"init_lora_weights": "pissa"}, use_4bit=False, tolerance=2e-2
    ),
    "PiSSA, 4-bit base": Variant({"init": "pissa"}, None),
    "LoftQ": Variant({"init": "loftq"}, from_peft=False),
    "LoftQ, 2 rounds": Variant({"init": "loftq", "loftq_iterations": 2}, None),
    "lm_head whole": Variant({"modules_to_save": "lm_head"}, {"modules_to_save": ["lm_head"]}),
    "LoRA on lm_head": Variant({"target_modules": "q_proj,lm_head"}, {"target_modules": ["q_proj", "lm_head"]}),
    "new tokens": Variant({"new_tokens": "<red>,<blue>"}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
}


class Bench:
    """A tiny 4-bit base with biases, and one trained adapter per variant, made on first use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._trained: dict[str, tuple[Any, list[float]]] = {}
        # The MLP is 128 wide, because bitsandbytes' own CPU kernel is wrong for the usual 160.
        sizes = dict(intermediate_size=128, attention_bias=True, mlp_bias=True)
        self.base = save_tiny_llama(directory / "base", tokenizer=tiny_tokenizer(), **sizes)
        # Of bf16 numbers, so that a 16-bit base is the file's, to the last bit; but in fp32, since bitsandbytes
        # dequantizes into the dtype that a weight had in its file.
        file = self.base / "model.safetensors"
        rounded = {key: tensor.bfloat16().float() for key, tensor in load_file(file).items()}
        save_file(rounded, file, {"format": "pt"})

    def load(self, name: str) -> Any:
        """The base for the variant."""
        return load_base_model(str(self.base), VARIANTS[name].use_4bit, compute_dtype="float32", cache=False)

    def config(self, name: str) -> LoRAConfig:
        own = {"rank": 4, "alpha": 8.0, "target_modules": "q_proj,v_proj,up_proj"}
        return LoRAConfig(**own | VARIANTS[name].settings)

    def peft_config(self, name: str) -> Any:
        import peft

        own = {"lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"], "task_type": "CAUSAL_LM"}
        rank = {"r": 4} if VARIANTS[name].peft_class == "LoraConfig" else {}
        return getattr(peft, VARIANTS[name].peft_class)(**own | rank | (VARIANTS[name].peft or {}))

    def fresh(self, name: str) -> Any:
        """The base with a new adapter."""
        model, config, tokenizer = self.load(name), self.config(name), load_tokenizer(str(self.base))
        add_tokens(tokenizer, config.new_tokens)
        inject_lora(model, config, 1, tokenizer)
        freeze_base(model)
        initialize_adapter(model, config)
        return model

    def trained(self, name: str) -> tuple[Any, list[float]]:
        """(the same after a few real steps, their losses); made once, so leave it as it is."""
        if name not in self._trained:
            model = self.fresh(name).train()
            optimizer = build_adapter_optimizer(model, self.config(name), "adamw", 0.0, NUM_STEPS)
            generator = torch.Generator().manual_seed(0)
            rows = [torch.randint(5, 271, (25,), generator=generator) for _ in range(4)]
            batches = make_batches([Example(row[:-1], row[1:]) for row in rows], 4, 24, packing=True)
            torch.manual_seed(0)
            rate = VARIANTS[name].learning_rate
            losses = [train_step(model, optimizer, batches, Accelerator(), rate).loss for _ in range(NUM_STEPS)]
            self._trained[name] = model.eval(), losses
        return self._trained[name]

    def adapter(self, name: str) -> Path:
        """Directory of the trained adapter."""
        directory = self.directory / name.replace(" ", "-")
        if not directory.exists():
            save_adapter(self.trained(name)[0], directory, self.config(name), str(self.base))
        return directory

    def adapted(self, name: str) -> Any:
        """The base with the trained adapter."""
        model = self.load(name)
        load_adapter(model, self.adapter(name))
        return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


# ---- the stages -------------------------------------------------------------------------------------------


def check_train(bench: Bench, name: str) -> str:
    """A few steps lower the loss, change everything that trains, and leave the base unchanged to the bit."""
    start = lora_state_dict(bench.fresh(name))
    model, losses = bench.trained(name)
    assert losses[-1] < 0.9 * losses[0], losses
    learned = lora_state_dict(model)
    assert learned.keys() == start.keys()
    unmoved = [key for key, value in learned.items() if torch.equal(value, start[key])]
    assert all(key.endswith(".lora_E") for key in unmoved), "AdaLoRA may leave a layer without a rank"
    base = dict(named_base_parameters(bench.fresh(name)))
    after = dict(named_base_parameters(model))
    assert base and all(torch.equal(after[key], value) for key, value in base.items())
    return YES


def check_save(bench: Bench, name: str) -> str:
    """Loaded again: the same logits to the bit. Saved again: the same files to the byte."""
    expected, directory = logits(bench.trained(name)[0]), bench.adapter(name)
    loaded = bench.load(name)
    config = load_adapter(loaded, directory)
    assert torch.equal(logits(loaded.eval()), expected)
    again = bench.directory / "again" / name.replace(" ", "-")
    save_adapter(loaded, again, config, str(bench.base))
    for file in (CONFIG, WEIGHTS):
        assert (again / file).read_bytes() == (directory / file).read_bytes(), file
    other = bench.fresh(name)  # a model that has an adapter already takes over the values
    assert load_adapter(other, directory) == config == active_adapter(other).config
    assert torch.equal(logits(other.eval()), expected)
    return YES


def check_load_in_peft(bench: Bench, name: str) -> str:
    """PEFT on transformers' own model, dense and in bitsandbytes' layers: equal logits and adapter gradients."""
    from peft import PeftModel

    from tests.adapters.test_peft_files import dense_twin
    from tests.lora.test_layer import bitsandbytes_twin

    ours = bench.adapted(name)
    assert torch.equal(logits(ours), logits(bench.trained(name)[0])), "the file, not its reader, is what is tried"
    expected, gradients = logits_and_gradients(ours, lambda key: key)
    assert relative_error(logits(bench.load(name)), expected) > 0.01, "the adapter does something"
    variant = VARIANTS[name]
    for twin in (dense_twin, bitsandbytes_twin) if variant.use_4bit else (dense_twin,):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # missing or unexpected keys are warnings there
            warnings.filterwarnings("ignore", message=".*(inference|is_gradient_checkpointing)")
            theirs = PeftModel.from_pretrained(
                twin(bench.load(name)), bench.adapter(name), is_trainable=True
            ).eval()
        actual, their_gradients = logits_and_gradients(theirs, our_key)
        assert relative_error(actual, expected) < variant.tolerance
        assert their_gradients.keys() == gradients.keys()
        for key, gradient in gradients.items():
            if their_gradients[key].shape == gradient.shape:  # AdaLoRA's files are without the zeroed triplets
                assert relative_error(gradient, their_gradients[key]) < 10 * variant.tolerance, key
    return YES


def check_load_from_peft(bench: Bench, name: str) -> str:
    """An adapter that PEFT made and saved: equal logits here."""
    from peft import get_peft_model

    from tests.adapters.test_peft_files import dense_twin

    theirs = get_peft_model(dense_twin(bench.load(name)), bench.peft_config(name)).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    directory = bench.directory / "peft" / name.replace(" ", "-")
    theirs.save_pretrained(directory)
    ours = bench.load(name)
    load_adapter(ours, directory)
    assert relative_error(logits(ours.eval()), logits(theirs)) < VARIANTS[name].tolerance
    assert relative_error(logits(bench.load(name)), logits(theirs)) > 0.01
    return YES


def check_merge(bench: Bench, name: str) -> str:
    """In memory: a dense weight a layer computes the same, and unmerging returns every bit. On disk: a bf16 model
    computes the same to bf16's rounding, without the adapter."""
    model = bench.adapted(name)
    expected = logits(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    merge_lora(model)
    assert all(layer.merged_weight is not None for layer in lora_layers(model).values())
    # A 16-bit weight (a base's, or the head's) stays in 16 bits: each is rounded by 2^-9, and two layers add some.
    rounded = any(layer.base_layer.weight.is_floating_point() for layer in lora_layers(model).values())
    tolerance = BF16_TOLERANCE if rounded else FP32_TOLERANCE
    assert relative_error(logits(model), expected) < tolerance
    unmerge_lora(model)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    merged = bench.directory / "merged" / name.replace(" ", "-")
    merge_adapter(str(bench.base), str(bench.adapter(name)), str(merged), MergeOptions(drift=False))
    alone = load_base_model(str(merged), use_4bit=False, compute_dtype="float32")
    assert relative_error(logits(alone), expected) < BF16_TOLERANCE
    return YES


def check_generate(bench: Bench, name: str) -> str:
    """Cached, batched decoding gives the tokens of a loop without a cache, and leaves no state."""
    from tests.test_generation import chats, greedy_reference

    model, tokenizer = bench.adapted(name), load_tokenizer(str(bench.base))
    texts = ["Hi", "What is the capital of France?"]
    expected = [greedy_reference(model, tokenizer, text, 8) for text in texts]
    before = logits(model)
    assert generate(model, tokenizer, chats(texts), Sampling(8)) == expected
    assert torch.equal(logits(model), before)
    return YES


STAGES: dict[str, Callable[[Bench, str], str]] = {
    "train": check_train,
    "save": check_save,
    "load in PEFT": check_load_in_peft,
    "load from PEFT": check_load_from_peft,
    "merge": check_merge,
    "generate": check_generate,
}


def has_stage(name: str, stage: str) -> bool:
    """Whether there is anything to check: PEFT lacks some variants."""
    variant = VARIANTS[name]
    return "PEFT" not in stage or (variant.peft is not None and (stage != "load from PEFT" or variant.from_peft))


# ---- helpers ----------------------------------------------------------------------------------------------


def logits_and_gradients(model: Any, key_of: Callable[[str], str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of IDS, and the gradients of a next-token loss by our keys."""
    take_gradients(lora_parameters(model), torch.float32)  # no parameter where the model is PEFT's
    output = model(input_ids=IDS).logits
    torch.nn.functional.cross_entropy(output[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    gradients = {key_of(n): p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    adapter = active_adapter(model)
    if adapter is not None:
        gradients = {key: p.grad for key, p in adapter_state(adapter).items()}
        assert all(p.grad is None for p in base_parameters(model))
    return output.detach(), gradients


def our_key(name: str) -> str:
    """A parameter's name in `lora_state_dict` from its name in a PeftModel."""
    for part in (".default", ".modules_to_save", ".base_layer"):
        name = name.replace(part, "")
    name = name.removeprefix("base_model.model.").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    return f"{name}.weight" if name.endswith((".lora_A", ".lora_B")) else name


def table(bench: Bench) -> tuple[str, bool]:
    """(Markdown from outcomes, whether every stage passed)."""
    lines = ["| variant | " + " | ".join(STAGES) + " |", "| --- " * (1 + len(STAGES)) + "|"]
    all_passed = True
    for name in VARIANTS:
        cells = []
        for stage, check in STAGES.items():
            try:
                cells.append(check(bench, name) if has_stage(name, stage) else "—")
            except (AssertionError, RuntimeError, ValueError) as error:
                cells.append("**no**")
                all_passed = False
                print(f"{name}, {stage}: {error}", file=sys.stderr)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines), all_passed


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        markdown, passed = table(Bench(Path(directory)))
    print(markdown)
    sys.exit(not passed)
