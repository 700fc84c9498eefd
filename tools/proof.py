"""Prove that several processes train like one, in every mode: `python -m tools.proof`.

A case is trained by `fit` for some steps, in fp32 and with fp32 adapters, so that nothing but the order of sums
differs, and so is the same training on one process. Compared are every step's loss and whole gradient, the
held-out loss at the end, the base's fingerprint and all its weights, and the parameters counted. Cases that are
`exchanged` save their adapters, which each of the others loads and must find as good.

    python -m tools.proof                                   the whole table
    python -m tools.proof --only "2 processes" --steps 3    cases whose names hold this

The processes are forked once everything is imported, which takes longer than most cases, and compute by gloo.
tests/parallel/test_fsdp.py and tests/parallel/test_tensor_parallel.py check `short_cases`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any, cast

from qlora.system.startup import collection_paused, importing_transformers, limit_spinning

limit_spinning()
with collection_paused(), importing_transformers():
    import torch
    import torch.distributed.fsdp  # load_sharded_model needs it
    import transformers.models.llama.modeling_llama  # load_base_model needs it, or most of it
    from accelerate import Accelerator, InitProcessGroupKwargs
    from safetensors.torch import load_file, save_file
    from torch import Tensor

    from examples.orders import make_orders
    from qlora.adapters.load import load_adapter
    from qlora.adapters.peft_files import save_adapter
    from qlora.config.lora import LoRAConfig
    from qlora.config.parallel import ParallelConfig
    from qlora.data.example import IGNORE_INDEX, Example
    from qlora.lora.adapter import activate, inject_lora, lora_layers
    from qlora.lora.optimizer import MasterOptimizer, build_optimizer
    from qlora.lora.trainable import base_parameters, freeze_base, lora_parameters, parameter_summary
    from qlora.model.base import ranks_of
    from qlora.model.block import decoder_layers
    from qlora.model.tokenizer import load_tokenizer
    from qlora.parallel.check import check_split
    from qlora.parallel.launch import arrange_ranks
    from qlora.parallel.load import load_for_ranks
    from qlora.quant.layers import Linear4bit, dense_weight
    from qlora.quant.library import Params4bit
    from qlora.quant.parts import local, part_of
    from qlora.quant.sharded import ShardedLinear4bit
    from qlora.system.errors import TrainingStopped
    from qlora.training.fingerprint import base_fingerprint
    from qlora.training.held_out import HeldOut, evaluate
    from qlora.training.loop import Limits, Trainer, TrainingData
    from qlora.training.observer import Observer
    from qlora.training.recompute import choose_recomputed_layers
    from tests import fork_server
    from tests.models import save_tiny_llama, smollm2_path, tiny_llama_config
    from tests.processes import run_processes

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-5  # relative: fp32 sums in another order, a step's rounding carried on by the next
LEARNING_RATE = 2e-4
EPS = 1e-4
"""AdamW's. At 1e-8 it moves a weight whose gradient is nothing but rounding by a whole learning rate, either way:
one process that packs and one that does not, whose first gradients agree to 5e-6, then have second ones that agree
to 4e-4. This is above rounding, and below most gradients."""
COLLECTIVE = timedelta(minutes=5)  # that a process waits for another, which may be quantizing

# ---- a case -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One training.

    Attributes:
        model: directory or .gguf; one of MODELS is made in its directory.
        processes: 1 is the reference.
        parallel, lora: of ParallelConfig and LoRAConfig.
        checkpointing, packing, compute_dtype: as the flags.
        rows: examples of a step, however many processes share them.
        batch_size: examples of a micro-batch.
        longest: row, in tokens.
        is_text: rows are text (examples/orders.py), as the real model expects, and not random tokens: with those
            some of its gradients are so badly conditioned that one process differs from itself, with other
            micro-batches, by 4e-5.
        cache: whether the quantized base comes from the cache, where the reference has left it.
        exchanged: its adapter is for all others of its model that are exchanged, and theirs for it.
        damage: exchange two blocks of codes of the second process, which the check at the start should find.
    """

    name: str
    model: str
    processes: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    checkpointing: str = "off"
    packing: bool = True
    compute_dtype: str = "float32"
    rows: int = 16
    batch_size: int = 2
    longest: int = 24
    is_text: bool = False
    cache: bool = True
    exchanged: bool = False
    damage: bool = False

    def alone(self) -> Case:
        """The same training on one process."""
        return replace(self, processes=1, parallel={}, damage=False)

    def examples(self, vocabulary: int) -> list[Example]:
        """Rows of 3 to `longest` tokens, the first third of each without a target.

        The first steps of a longer training have the same ones.
        """
        generator = torch.Generator().manual_seed(7)
        count, examples = max(self.steps, 10) * self.rows, []
        texts = make_orders(count, seed=7) if self.is_text else []
        tokenizer = load_tokenizer(self.model) if self.is_text else None
        for number in range(count):
            length = int(torch.randint(3, self.longest + 1, (1,), generator=generator))
            if tokenizer is not None:
                text = f"{texts[number]['prompt']} {texts[number]['completion']}"
                ids = torch.tensor(tokenizer(text)["input_ids"][: length + 1])
            else:
                ids = torch.randint(5, min(vocabulary, 1000), (length + 1,), generator=generator)
            targets = ids[1:].clone()
            targets[: length // 3] = IGNORE_INDEX
            examples.append(Example(ids[:-1], targets))
        return examples


class _Recorder:
    """Wraps an optimizer's step to record the gradient first."""

    def __init__(self, optimizer: MasterOptimizer) -> None:
        self.gradients: list[Tensor] = []
        self.optimizer, self.step = optimizer, optimizer.step
        optimizer.step = self._step  # type: ignore[method-assign]

    def _step(self, learning_rate: float) -> None:
        self.gradients.append(torch.cat([p.grad.flatten().float() for p in self.optimizer.parameters]))  # type: ignore[union-attr]
        self.step(learning_rate)


def load(case: Case, accelerator: Accelerator) -> Any:
    """The base of a case, split if the case asks for it.

    Raises:
        TrainingStopped: it is damaged.
    """
    ranks = arrange_ranks(ParallelConfig(**case.parallel), accelerator)
    model = load_for_ranks(case.model, ranks, accelerator, compute_dtype=case.compute_dtype, cache=case.cache)
    if case.damage:
        if accelerator.process_index == 1:
            codes = model.model.layers[0].self_attn.o_proj.weight.data
            codes[:64] = codes[:64].roll(32, 0)
        check_split(model)
    return model


def train_case(case: Case, accelerator: Accelerator, adapter: Path) -> dict[str, Tensor]:
    """Train a case on the processes there are, and save its adapter.

    Returns:
        "losses" (steps,), "gradients" (steps, values); "held_out" (2,): see `held_out_losses`; "evaluated" (1,):
        the second of these as `fit` found it; "bytes" (1,) of the frozen weights with their statistics on this
        process, "block_bytes" (1,) of the first block's codes and 8-bit scales where it is not sharded;
        "fingerprint" of the base and of all its dequantized weights; "parameters" (2,): as counted, in all and
        those that train. Or "refused", where the check at the start failed.
    """
    try:
        model = load(case, accelerator)
    except TrainingStopped:
        return {"refused": torch.ones(1)}
    ranks = ranks_of(model, accelerator)
    fingerprint = base_fingerprint(model) + weights_digest(model)
    lora = LoRAConfig(**{"rank": 4, "adapter_dtype": case.compute_dtype, **case.lora})
    inject_lora(model, lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    for layer in lora_layers(model).values():  # a B of zeros would leave A without a gradient
        layer.weights.lora_B.data.copy_(torch.randn(layer.weights.lora_B.shape, generator=generator) * 0.02)
    freeze_base(model)
    choose_recomputed_layers(
        model, case.checkpointing, case.longest * case.batch_size, None, accelerator, lambda line: None
    )
    optimizer = build_optimizer(lora_parameters(model), "adamw")
    for group in optimizer.inner.param_groups:
        group["eps"] = EPS
    recorder = _Recorder(optimizer)
    lines: list[dict[str, Any]] = []
    examples = case.examples(model.config.vocab_size)
    grad_accum, rest = divmod(case.rows, case.batch_size * ranks.data_size)
    assert grad_accum and not rest, f"{case.name}: {case.rows} rows do not divide"

    class Lines(Observer):
        def after_step(self, trainer: Trainer, line: dict[str, Any]) -> None:
            lines.append(line)

        def after_evaluation(self, trainer: Trainer, line: dict[str, Any], is_best: bool) -> None:
            lines.append(line)

    data = TrainingData(examples, case.batch_size, grad_accum, case.longest, case.packing, held_out=examples[:1])
    Trainer(
        model, optimizer, lambda step: LEARNING_RATE, data, accelerator, Limits(case.steps),
        [HeldOut(case.steps), Lines()], say=lambda line: None,
    ).fit()  # fmt: skip
    if accelerator.is_main_process:
        save_adapter(model, adapter, lora, case.model)
    summary = parameter_summary(model)
    return {
        "losses": torch.tensor([line["loss"] for line in lines if "loss" in line], dtype=torch.float64),
        "gradients": torch.stack(recorder.gradients),
        "held_out": held_out_losses(model, case, accelerator),
        "evaluated": torch.tensor([line["eval_loss"] for line in lines if "eval_loss" in line][-1:]).double(),
        "bytes": torch.tensor([base_bytes(model)]),
        "block_bytes": torch.tensor([block_bytes(model)]),
        "parameters": torch.tensor([summary.total, summary.trainable]),
        "fingerprint": torch.tensor(list(fingerprint.encode()), dtype=torch.uint8),
    }


def held_out_losses(model: Any, case: Case, accelerator: Accelerator) -> Tensor:
    """(2,): of up to five rows, and of a single one, so that other micro-batches are empty."""
    examples, budget = case.examples(model.config.vocab_size)[:5], case.batch_size * case.longest
    losses = [evaluate(model, rows, accelerator, budget, case.packing) for rows in (examples, examples[:1])]
    return torch.tensor(losses, dtype=torch.float64)


def load_adapters(case: Case, others: Sequence[Case], folder: Path, accelerator: Accelerator) -> Tensor:
    """(others, 2): the held-out losses of the adapter that each of them saved, on the base as `case` splits it."""
    losses, model = [], load(case, accelerator)
    for other in others:
        activate(model, None)
        load_adapter(model, folder / other.name, case.model)
        losses.append(held_out_losses(model, other, accelerator))
    return torch.stack(losses)


def weights_digest(model: Any) -> str:
    """Digest of all dequantized 4-bit weights, gathered if they are sharded or split."""
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, (Linear4bit, ShardedLinear4bit)):
            weight, part = dense_weight(module, torch.float32), part_of(module)
            if part is not None:
                parts = [torch.empty_like(weight) for _ in range(part.count)]
                torch.distributed.all_gather(parts, weight.contiguous(), group=ranks_of(model, None).tensor_group)
                weight = torch.cat(parts, part.dim)
            digest.update(weight.contiguous().numpy().data)
    return digest.hexdigest()


def base_bytes(model: Any) -> int:
    """Bytes of the frozen parameters, scales and tables in this process."""
    held = sum(local(p).numel() * p.itemsize for p in base_parameters(model))
    for module in model.modules():
        if isinstance(module, ShardedLinear4bit):
            held += module.table.nbytes + module.nested_table.nbytes
        elif isinstance(module, Linear4bit):
            state = cast(Any, module.weight).quant_state
            held += sum(
                tensor.nbytes for tensor in (state.absmax, state.code, state.state2.absmax, state.state2.code)
            )
    return held


def block_bytes(model: Any) -> int:
    """Bytes of codes and 8-bit scales in the model's first block, unless it is sharded."""
    weights: Any = (p for p in decoder_layers(model)[0].parameters() if isinstance(p, Params4bit))
    return sum(weight.nbytes + weight.quant_state.absmax.nbytes for weight in weights)


# ---- processes --------------------------------------------------------------------------------------------


def _accelerator() -> Accelerator:
    return Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=COLLECTIVE)])


def _train(cases: Sequence[Case], folder: Path) -> None:
    accelerator = _accelerator()
    for case in cases:
        result = train_case(case, accelerator, folder / case.name)
        save_file(result, _result_file(folder, case, accelerator.process_index))


def _exchange(pairs: Sequence[tuple[Case, list[Case]]], folder: Path) -> None:
    accelerator = _accelerator()
    for case, others in pairs:
        losses = load_adapters(case, others, folder, accelerator)
        if accelerator.is_main_process:
            save_file({"losses": losses}, folder / f"{case.name}.exchange.safetensors")


def _result_file(folder: Path, case: Case, rank: int) -> Path:
    return folder / f"{case.name}.{rank}.safetensors"


# ---- a proof ----------------------------------------------------------------------------------------------


class Proof:
    """Cases, each trained once in its mode and once on one process, and their comparison.

    Attributes:
        folder: of the models, adapters and results.
        cases: by name, without the references.
    """

    def __init__(self, folder: Path, cases: Iterable[Case]) -> None:
        self.folder = folder
        self.cases = {case.name: case for case in cases}
        alone: dict[str, Case] = {}
        self._alone: dict[str, str] = {}
        for case in self.cases.values():
            if case.damage:
                continue
            key = json.dumps(asdict(replace(case.alone(), name="", exchanged=False)))
            first = alone.setdefault(key, replace(case.alone(), name=f"{case.name}, alone"))
            alone[key] = replace(first, exchanged=first.exchanged or case.exchanged)
            self._alone[case.name] = first.name
        self._everything = {case.name: case for case in (*alone.values(), *self.cases.values())}

    def run(self, report: Callable[[list[str]], object] = lambda names: None) -> None:
        """Make the models, train all cases, those on one process first, and exchange the adapters.

        Args:
            report: receives the names of the trained cases after each launch.
        """
        models = {Path(case.model) for case in self.cases.values()}
        run_processes(1, _save_models, [path for path in models if path.name in MODELS and not path.exists()])
        for size in self.sizes:
            chosen = [case for case in self._everything.values() if case.processes == size]
            run_processes(size, _train, chosen, self.folder)
            report([case.name for case in chosen if case.name in self.cases])
        for size in self.sizes:
            pairs = [(case, self.exchanged(case)) for case in self._everything.values() if case.processes == size]
            pairs = [(case, others) for case, others in pairs if others]
            if pairs:
                run_processes(size, _exchange, pairs, self.folder)

    def run_apart(self) -> None:
        """Call `run` in a process of its own, for one that has threads.

        Raises:
            RuntimeError: it failed; includes its output.
        """
        plan = self.folder / "cases.json"
        plan.write_text(json.dumps([asdict(case) for case in self.cases.values()]))
        command = [sys.executable, "-m", "tools.proof", "--run", str(plan)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = fork_server.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-6000:])

    @property
    def sizes(self) -> list[int]:
        return sorted({case.processes for case in self._everything.values()})

    def exchanged(self, case: Case) -> list[Case]:
        """The cases whose adapters a case loads: all that have its model."""
        others = [other for other in self._everything.values() if other.exchanged and other.model == case.model]
        return others if case.exchanged else []

    def found(self, name: str) -> list[dict[str, Tensor]]:
        """The results of a case on each of its processes."""
        case = self._everything[name]
        return [load_file(_result_file(self.folder, case, rank)) for rank in range(case.processes)]

    def expected(self, name: str) -> dict[str, Tensor]:
        """The result of one process for a case."""
        return self.found(self._alone[name])[0]

    def check(self, name: str) -> dict[str, float]:
        """Assert that every process got the numbers of one process; returns the largest errors."""
        case, expected = self.cases[name], self.expected(name)
        errors = []
        for result in self.found(name):
            assert "refused" not in result, f"{name}: the base was found damaged"
            assert result["losses"].shape == expected["losses"].shape == (case.steps,)
            assert len(result["gradients"]) == case.steps
            errors.append(worst_errors(result, expected))
            for kind in ("fingerprint", "parameters"):
                assert torch.equal(result[kind], expected[kind]), f"{name}: another {kind}"
            if "tensor_parallel" in case.parallel:
                parts = case.parallel["tensor_parallel"]
                assert parts * result["block_bytes"] == expected["block_bytes"], f"{name}: more than its part"
        worst = {kind: max(error[kind] for error in errors) for kind in errors[0]}
        assert all(value <= TOLERANCE for value in worst.values()), f"{name}: {worst}"
        return worst

    def check_exchange(self) -> dict[str, tuple[int, float]]:
        """Assert that adapters are as good on every other base as on the one that they were trained on.

        Returns:
            case's name -> how many adapters it loaded, and the worst relative error of their held-out losses.
        """
        worst = {}
        for case in self._everything.values():
            others = self.exchanged(case)
            if not others:
                continue
            losses = load_file(self.folder / f"{case.name}.exchange.safetensors")["losses"]
            right = torch.stack([self.found(other.name)[0]["held_out"] for other in others])
            error = ((losses - right) / right).abs().max().item()
            assert losses.shape == right.shape and error <= TOLERANCE, f"{case.name}: {losses}, not {right}"
            worst[case.name] = len(others), error
        return worst


def worst_errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative error over the steps of losses, gradients (as vectors) and the held-out losses."""
    loss = ((found["losses"] - right["losses"]) / right["losses"]).abs().max().item()
    gradients = (found["gradients"] - right["gradients"]).norm(dim=1) / right["gradients"].norm(dim=1)
    evaluated, expected = (torch.cat([result["held_out"], result["evaluated"]]) for result in (found, right))
    held_out = ((evaluated - expected) / expected).abs().max().item()
    return {"loss": loss, "gradient": gradients.max().item(), "held-out": held_out}


# ---- models and cases -------------------------------------------------------------------------------------

DIVISIBLE = dict(hidden_size=256, intermediate_size=512, num_attention_heads=8, num_key_value_heads=4)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("", {"num_hidden_layers": 3, **DIVISIBLE}),
    "tied": ("", {"tie_word_embeddings": True, "hidden_size": 128, "intermediate_size": 192}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral": ("Mistral", {"sliding_window": 30}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 32}),  # with norms of q and k
}


def save_model(directory: Path) -> str:
    """Save the random model of MODELS that the directory is named after."""
    kind, settings = MODELS[directory.name]
    if not kind:
        return str(save_tiny_llama(directory, **settings))
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**tiny_llama_config(**DIVISIBLE).to_dict(), **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in model.named_parameters():  # biases and norms that are no zeros and ones
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.save_pretrained(directory)
    return str(directory)


def _save_models(directories: Sequence[Path]) -> None:
    transformers.utils.logging.disable_progress_bar()
    for directory in directories:
        save_model(directory)


EVERYTHING = {"target_modules": "all-linear"}
FSDP = {"shard": "fsdp"}
TP = {"tensor_parallel": 2}
SEQUENCE = {"tensor_parallel": 2, "sequence_parallel": True}


def short_cases(folder: Path) -> list[Case]:
    """The cases of the tests, on two processes."""

    def model(name: str) -> str:
        return str(folder / name)

    together: dict[str, Any] = {"steps": 2, "rows": 4, "batch_size": 4, "longest": 40}
    dropout = {"lora": {**EVERYTHING, "dropout": 0.1}, "packing": False, "checkpointing": "on", **together}
    return [
        Case("ddp", model("tiny"), 2, {}, EVERYTHING),
        Case("fsdp", model("tiny"), 2, FSDP, EVERYTHING, checkpointing="on", cache=False, exchanged=True),
        Case("fsdp tied", model("tied"), 2, FSDP, {"use_dora": True}, packing=False, batch_size=1),
        Case("hsdp", model("tiny"), 2, {"shard": "hsdp", "shard_size": 1}),
        Case("TP", model("tiny"), 2, TP, exchanged=True, **together),
        Case("TP, Qwen3, sequence parallel", model("Qwen3"), 2, SEQUENCE, EVERYTHING, **together),
        Case("TP, biases", model("biases"), 2, TP, **dropout),
        Case("TP, biases, sequence parallel", model("biases"), 2, SEQUENCE, **dropout),
        Case("damaged", model("tiny"), 2, TP, damage=True),
    ]


def all_cases(folder: Path, steps: int) -> list[Case]:
    """The cases of the table."""
    return [*_sharded_cases(folder, steps), *_tensor_parallel_cases(folder, steps), *_real_cases(steps)]


SHARDED: list[tuple[str, int, dict[str, Any]]] = [
    ("ddp", 2, {}), ("ddp", 4, {}), ("fsdp", 2, FSDP), ("fsdp", 4, FSDP),
    ("hsdp 2x2", 4, {"shard": "hsdp", "shard_size": 2}),
]  # fmt: skip


def _sharded_cases(folder: Path, steps: int) -> list[Case]:
    tiny, tied = str(folder / "tiny"), str(folder / "tied")
    cases = []
    for mode, processes, parallel in SHARDED:
        name = f"{mode}, {processes} processes"
        cases += [
            Case(f"{name}, tiny, q and v, recomputed", tiny, processes, parallel, {}, steps, "on"),
            Case(
                f"{name}, tiny, all linear", tiny, processes, parallel, EVERYTHING, steps, batch_size=1,
                exchanged=True,
            ),
            Case(f"{name}, tied, q and v, unpacked", tied, processes, parallel, {}, steps, packing=False),
        ]  # fmt: skip
    return cases


def _tensor_parallel_cases(folder: Path, steps: int) -> list[Case]:
    """Every way of exchanging, and data parallel groups of two where there are four processes; other families."""
    tiny, settings = str(folder / "tiny"), cast(dict[str, Any], {"steps": steps, "rows": 4, "longest": 40})
    modes = (("TP 2", 2, 2), ("TP 2 x DP 2", 4, 2), ("TP 4", 4, 4))
    targets: tuple[tuple[str, dict[str, Any]], ...] = (("q and v", {}), ("all linear", EVERYTHING))
    cases = []
    for (mode, processes, count), sequence, (label, lora) in product(modes, (False, True), targets):
        parallel = {"tensor_parallel": count, "sequence_parallel": sequence}
        name = f"{mode}, {processes} processes, tiny, {label}" + ", sequence parallel" * sequence
        chosen: dict[str, Any] = {"lora": lora, "exchanged": label == "all linear", **settings}
        cases.append(Case(name, tiny, processes, parallel, **chosen))
        chosen["exchanged"] = False
        for words, more in VARIANTS.items():
            cases.append(Case(f"{name}, {words}", tiny, processes, parallel, **chosen, **more))
        if not sequence:
            chosen["lora"] = {**lora, "use_rslora": True, "rank_pattern": {"q_proj": 8}}
            cases.append(Case(f"{name}, rslora", tiny, processes, parallel, **chosen))
    for family, (label, parallel) in product(("Mistral", "Qwen2", "Qwen3"), (("", TP), (", sequence", SEQUENCE))):
        name = f"TP 2, 2 processes, {family}, all linear{label and label + ' parallel'}"
        cases.append(Case(name, str(folder / family), 2, parallel, EVERYTHING, **settings))
    return cases


VARIANTS: dict[str, dict[str, Any]] = {
    "unpacked": {"packing": False},
    "recomputed": {"checkpointing": "on"},
    "unpacked, recomputed": {"packing": False, "checkpointing": "on"},
}


def _real_cases(steps: int) -> list[Case]:
    """SmolLM2-135M, with 9 heads and 3 key-value heads; none where it is not installed."""
    path = smollm2_path()
    if path is None:
        return []
    settings: dict[str, Any] = {"steps": steps, "longest": 48, "is_text": True}
    cases = [
        Case(f"{mode}, {processes} processes, SmolLM2, q and v", str(path), processes, parallel, **settings)
        for mode, processes, parallel in SHARDED
    ]
    name, settings = "TP 3, 3 processes, SmolLM2", {**settings, "rows": 4, "batch_size": 4}
    parallel = {"tensor_parallel": 3}
    cases.append(Case(f"{name}, q and v", str(path), 3, parallel, **settings))
    name, parallel = f"{name}, all linear, sequence parallel, recomputed", {**parallel, "sequence_parallel": True}
    cases.append(Case(name, str(path), 3, parallel, EVERYTHING, checkpointing="on", **settings))
    return cases


# ---- the command ------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose names hold this")
    parser.add_argument("--run", type=Path, metavar="FILE", help="train the cases of the file, for a test")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.run:
        cases = [Case(**entry) for entry in json.loads(options.run.read_text())]
        return Proof(options.run.parent, cases).run()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QLORA_CACHE"] = str(Path(folder, "cache"))
        chosen = [case for case in all_cases(Path(folder), options.steps) if options.only in case.name]
        if not chosen:
            parser.error(f"no case's name holds {options.only!r}")
        print_table(Proof(Path(folder), chosen))


WIDTH = 84


def print_table(proof: Proof) -> None:
    """Train all cases and print how far each is from one process.

    Raises:
        AssertionError: some differ too much; raised after all are printed.
    """
    steps = next(iter(proof.cases.values())).steps
    print(f"{f'largest relative error over {steps} steps':{WIDTH}}{'loss':>10}{'gradient':>10}{'held-out':>10}")
    found: list[dict[str, float]] = []
    problems: list[str] = []

    def report(names: list[str]) -> None:
        for name in names:
            try:
                found.append(proof.check(name))
            except AssertionError as error:
                problems.append(str(error))
                print(f"{name:{WIDTH}}    WRONG", flush=True)
            else:
                show(name, found[-1])

    def show(name: str, errors: dict[str, float]) -> None:
        print(f"{name:{WIDTH}}" + "".join(f"{value:10.1e}" for value in errors.values()), flush=True)

    proof.run(report)
    assert not problems, "\n".join(problems)
    show("the largest", {kind: max(errors[kind] for errors in found) for kind in found[0]})
    exchanged = proof.check_exchange()
    if exchanged:
        title = "all of their adapters, loaded in each (alone: on one process)"
        print(f"\n{title:{WIDTH}}{'adapters':>20}{'held-out':>10}")
    for name, (count, error) in exchanged.items():
        print(f"{name:{WIDTH}}{count:20}{error:10.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])
