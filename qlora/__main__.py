"""python -m qlora {train, generate, chat, plan, merge, mix, import, inspect, export, push, check-data, report}.

The same jobs as train.py; a chat; the memory of a run before it is made; merging; adapters of other tools; a look
into an adapter, at data, and at a run; .gguf files; the hub.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from qlora.config import DataConfig, GenerateConfig, ModelConfig, RunConfig, TrainConfig, parse_args, size_in_bytes
from qlora.errors import InputError, run
from qlora.imports import collection_paused, importing_transformers
from qlora.plan_flags import DevicesConfig


@dataclass
class MergeConfig:
    """Merge adapters into their base and save an ordinary Hugging Face model."""

    model: str | None = None
    """The base; by default the one that the (first) adapter names."""
    adapter: tuple[str, ...] = ()
    """Adapter directory, or several, whose updates add up."""
    weights: tuple[float, ...] = ()
    """What the update of each adapter is multiplied by; by default 1."""
    output_dir: str = "merged"
    """Where to write; must not exist."""
    base: Literal["dequantized", "original"] = "dequantized"
    """Merge onto the weights the adapter was trained against, or onto those before quantization."""
    save_4bit: bool = False
    """Go back into 4 bits, the codes chosen so that the update survives; by default bf16 is written."""
    calibration: str | None = None
    """Texts to choose the 4-bit codes for: a data file, best the training data; by default a few built-in ones."""
    max_shard_gb: float = 5.0
    """Largest weights file, in GB."""
    drift: bool = True
    """Measure how far the merged model is from base + adapter."""
    drift_text: str | None = None
    """Measure it on the first tokens of this data file (or .txt) instead of on a few built-in texts."""
    max_drift: float | None = None
    """Fail, with nothing written, if the mean KL is above this many nats per token."""
    debug: bool = False
    """Show the traceback of an error."""


def merge(argv: Sequence[str]) -> None:
    config = parse_args(MergeConfig, "python -m qlora merge", argv)
    if not config.adapter:
        raise InputError("No adapter given; pass --adapter with the output directory of a run.")
    if not config.max_shard_gb > 0:
        raise InputError(f"max_shard_gb is {config.max_shard_gb}; give --max-shard-gb a number above 0.")
    from qlora.merge import GB, base_model_of, merge_adapter

    drift = merge_adapter(
        config.model or base_model_of(config.adapter[0]),
        config.adapter,
        config.output_dir,
        config.base,
        int(config.max_shard_gb * GB),
        config.drift,
        weights=config.weights or None,
        save_4bit=config.save_4bit,
        calibration=config.calibration,
        drift_text=config.drift_text,
        max_drift=config.max_drift,
    )
    how = "in 4 bits" if config.save_4bit else "in 16 bits (--no-4bit)"
    print(f"merged model in {config.output_dir}; load it {how}, see its README.md")
    if drift is not None:
        print(f"drift from base + adapter: {drift}")


@dataclass
class ChatConfig:
    """Chat with a base model and its adapters; /help in the chat lists its commands."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: tuple[str, ...] = ()
    """Adapters, each as DIRECTORY or NAME=DIRECTORY; the first one answers first, and --model is by default the
    base that it names."""
    system: str = ""
    """System message."""
    max_new_tokens: int = GenerateConfig.max_new_tokens
    """Longest answer, in tokens."""
    temperature: float = GenerateConfig.temperature
    """0 = greedy; higher is more random."""
    top_p: float = GenerateConfig.top_p
    """Sample from the smallest set of tokens with this much probability."""
    seed: int = TrainConfig.seed
    """Seeds the sampling; each answer adds 1."""
    history: str | None = None
    """Keep the conversation in this .jsonl file, as training data, and go on with the newest one there."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        self.options = GenerateConfig(
            max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p
        )
        TrainConfig(seed=self.seed)  # the same range


def chat(argv: Sequence[str]) -> None:
    config = parse_args(ChatConfig, "python -m qlora chat", argv)
    if config.model.model is None and not config.adapter:
        raise InputError("Nobody to chat with; pass --model, --adapter or both.")
    with collection_paused(), importing_transformers():
        import transformers.modeling_utils  # noqa: F401  (load_base_model needs it)

        from qlora.chat import Chat, split_adapter
        from qlora.device import best_device
        from qlora.lora_model import LoRAModel
        from qlora.merge import base_model_of
        from qlora.model import load_base_model
        from qlora.quantize import QuantConfig

    m, directories = config.model, [split_adapter(text)[1] for text in config.adapter]
    name = m.model or base_model_of(str(directories[0]), lambda text: print(text, file=sys.stderr))
    quant = QuantConfig(m.quant_type, m.double_quant)
    model = load_base_model(name, m.use_4bit, quant, m.compute_dtype, best_device(), m.cache)
    session = Chat(LoRAModel(model, base_model=name), name, config.options, config.seed, config.system)
    names = [session.load_adapter(text) for text in config.adapter]
    session.model.set_adapter(names[0] if names else None)
    if config.history is not None:
        session.open_history(config.history)
    session.run()


@dataclass
class PlanConfig(RunConfig):
    """Say what a run of train.py with the same flags would take, from the model's config alone: memory, and of
    many devices also what they send each other, and the time of a step."""

    devices: DevicesConfig = field(default_factory=DevicesConfig)
    device: Literal["cuda", "cpu"] | None = None
    """What it would run on; by default what is here."""
    device_memory: Annotated[str | None, tyro.conf.arg(aliases=["--gpu-memory"])] = None
    """Memory of each device, as 24GiB or 24GB: whether the run fits, and if not what would make it."""


def plan(argv: Sequence[str]) -> None:
    config = parse_args(PlanConfig, "python -m qlora plan", argv)
    if config.model.model is None:
        raise InputError("No model given; pass --model with a Hugging Face directory, a hub id or a .gguf file.")
    size = size_in_bytes(config.device_memory or "")
    if config.device_memory is not None and size is None:
        raise InputError(
            f"device_memory is {config.device_memory!r}; give --device-memory a size such as 24GiB or 24GB."
        )
    if config.generate.adapter is not None:
        from qlora.adapter import read_adapter

        config.lora = read_adapter(config.generate.adapter).config
    from qlora.device import best_device
    from qlora.plan import Planner, print_plan

    asked = config.devices.is_given or config.parallel.is_split
    planner = Planner(config.model.model, config.device or best_device().type, size)
    print_plan(planner, config, config.devices if asked else None)


@dataclass
class CheckDataConfig:
    """Say what is in a data file, and what a run would make of it."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """A .jsonl, .json, .csv or .parquet file, or a hub id."""
    model: str | None = None
    """Count in tokens of this model, of which only the tokenizer is loaded."""
    max_length: int = DataConfig.max_length
    """Longest example, in tokens."""
    on_long: Literal["truncate", "drop"] = DataConfig.on_long
    """A longer example keeps its first --max-length tokens, or is dropped."""
    train_on: Literal["completion", "all"] = DataConfig.train_on
    """Learn the assistant's turns only, or every token."""
    parse_special: bool = DataConfig.parse_special
    """Let text that spells a special token inside a message be that token instead of plain text."""
    columns: str = DataConfig.columns
    """Columns that go by another name, as prompt=question,completion=answer."""
    chat_template: str | None = None
    """File of a Jinja chat template to use in the place of the tokenizer's."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        DataConfig(max_length=self.max_length)  # the same range


def check(argv: Sequence[str]) -> None:
    config = parse_args(CheckDataConfig, "python -m qlora check-data", argv)
    if config.chat_template is not None and config.model is None:
        raise InputError("--chat-template needs a tokenizer; pass --model.")
    columns = DataConfig(columns=config.columns).column_names
    from qlora.check_data import check_data, print_check
    from qlora.model import load_tokenizer
    from qlora.tokenize import set_chat_template

    tokenizer = load_tokenizer(config.model) if config.model else None
    if config.chat_template is not None:
        set_chat_template(tokenizer, config.chat_template)
    options = (config.max_length, config.train_on, config.on_long, config.parse_special, columns)
    found = check_data(config.data, tokenizer, *options)
    print_check(found)
    if found.bad_rows:
        raise InputError(
            f"{len(found.bad_rows):,} of {found.num_rows:,} rows of {config.data} cannot be used; mend them, or "
            "train without them by --on-bad-row skip."
        )


@dataclass
class ImportConfig:
    """Turn an adapter of MLX-LM or torchtune into PEFT's format, which this project and others load."""

    adapter: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]
    """What MLX-LM or torchtune wrote."""
    output_dir: str | None = None
    """Where to write; must not exist, or be empty."""
    model: str | None = None
    """The base, to check names and shapes against; torchtune's layout cannot be read without it."""
    debug: bool = False
    """Show the traceback of an error."""


def import_adapter(argv: Sequence[str]) -> None:
    config = parse_args(ImportConfig, "python -m qlora import", argv)
    if config.output_dir is None:
        raise InputError("No output directory given; pass --output-dir.")
    from qlora.adapter import PREFIX, AdapterSnapshot, check_adapter, read_adapter, write_adapter
    from qlora.files import new_directory
    from qlora.foreign import read_foreign_adapter
    from qlora.model import empty_model, load_config

    target = Path(config.output_dir)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"--output-dir {target} exists already; remove it or choose another.")
    model_config = load_config(config.model) if config.model else None
    tensors, description = read_foreign_adapter(config.adapter, config.model, model_config)
    snapshot = AdapterSnapshot({PREFIX + key: t for key, t in tensors.items()}, description, {"format": "pt"})
    with new_directory(target) as staging:
        write_adapter(snapshot, staging)
        saved = replace(read_adapter(staging), directory=Path(config.adapter))  # the name for messages
        if config.model:
            check_adapter(saved, empty_model(config.model))
    variant = "DoRA" if saved.config.use_dora else "LoRA"
    print(f"{variant} of rank {saved.config.rank} in {len(saved.adapted_layers)} layers, written to {target}")


@dataclass
class InspectConfig:
    """Say what is in an adapter, and how large its update is by layer and module."""

    adapter: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ADAPTER")]
    """Adapter directory."""
    picture: str | None = None
    """Draw the sizes of the updates into this .png file."""
    model: str | None = None
    """The base: sizes are then relative to its weights, and a DoRA update is measured whole."""
    debug: bool = False
    """Show the traceback of an error."""


def inspect(argv: Sequence[str]) -> None:
    config = parse_args(InspectConfig, "python -m qlora inspect", argv)
    from qlora.inspection import draw_inspection, inspect_adapter, print_inspection

    found = inspect_adapter(config.adapter, config.model)
    print_inspection(found)
    if config.picture:
        draw_inspection(found, config.picture)


@dataclass
class ExportConfig:
    """Write a model, or an adapter alone, as a .gguf file for llama.cpp, Ollama and LM Studio."""

    model: str | None = None
    """The base or a merged model; by default the base that the adapter names."""
    adapter: str | None = None
    """Adapter directory, to be merged on the way."""
    adapter_only: bool = False
    """Write the adapter alone, to be loaded beside a .gguf of its base."""
    output: str = "model.gguf"
    """Where to write; must not exist."""
    type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "f16"
    """Encoding of the matrices; of an adapter alone f32, f16, bf16 or q8_0."""
    pre_tokenizer: str | None = None
    """llama.cpp's name of the tokenizer's splitter, where it is not recognised."""
    modelfile: bool = False
    """Write an Ollama Modelfile beside it."""
    debug: bool = False
    """Show the traceback of an error."""


def export(argv: Sequence[str]) -> None:
    config = parse_args(ExportConfig, "python -m qlora export", argv)
    if config.model is None and config.adapter is None:
        raise InputError("Nothing to export; pass --model, --adapter or both.")
    if config.adapter_only and config.adapter is None:
        raise InputError("--adapter-only needs an adapter; pass --adapter with the output directory of a run.")
    from qlora.export import export_adapter, export_model
    from qlora.merge import base_model_of
    from qlora.model import load_tokenizer
    from qlora.modelfile import check_modelfile, write_modelfile

    model, output = config.model or base_model_of(str(config.adapter)), Path(config.output)
    if config.modelfile:
        check_modelfile(output)
    if config.adapter_only:
        export_adapter(model, str(config.adapter), output, config.type)
        print(f"adapter in {output}; load it beside a .gguf of its base: llama-cli -m BASE.gguf --lora {output}")
    else:
        export_model(model, output, config.type, config.adapter, config.pre_tokenizer)
        print(f"model in {output}, {output.stat().st_size / 1e6:,.1f} MB")
    if config.modelfile:
        base = f"{Path(model).stem}.gguf" if config.adapter_only else None
        name = write_modelfile(output, load_tokenizer(model, config.adapter), base)
        print("Modelfile beside it, " + (f"TEMPLATE from {name}" if name else "the template is in the .gguf"))
        if base is not None:
            print(f"it expects the base beside it as {base}")


@dataclass
class PushConfig:
    """Upload an adapter, a merged model or a .gguf file to the Hugging Face hub, with a model card."""

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]
    """Output directory of a run, merge or export."""
    repo: str | None = None
    """Name on the hub, as owner/name; made if it is not there."""
    private: bool = False
    """Make a new repository private."""
    exact_match: str | None = None
    """What python -m eval exact_match --output wrote, for the model card."""
    debug: bool = False
    """Show the traceback of an error."""


def push(argv: Sequence[str]) -> None:
    config = parse_args(PushConfig, "python -m qlora push", argv)
    if config.repo is None:
        raise InputError("No repository given; pass --repo owner/name.")
    from qlora.hub import push_to_hub

    print(push_to_hub(config.directory, config.repo, config.private, exact_match=config.exact_match))


@dataclass
class MixConfig:
    """Mix adapters of one base into a new one, without loading the base."""

    adapters: tuple[str, ...] = ()
    """Adapter directories."""
    weights: tuple[float, ...] = ()
    """One number for each adapter, negative ones subtract; by default all 1."""
    method: Literal["cat", "svd", "linear"] = "cat"
    """cat: exactly the weighted sum, the ranks add up; svd: the nearest to that of --rank; linear: as in PEFT."""
    rank: int | None = None
    """Rank under svd; by default the largest one among the adapters."""
    output_dir: str = "mixed"
    """Where to write; must not exist."""
    debug: bool = False
    """Show the traceback of an error."""


def mix(argv: Sequence[str]) -> None:
    config = parse_args(MixConfig, "python -m qlora mix", argv)
    if not config.adapters:
        raise InputError("No adapters given; pass --adapters with the directories to mix.")
    from qlora.mixing import mix_adapters

    weights = config.weights or (1.0,) * len(config.adapters)
    error = mix_adapters(config.adapters, weights, config.output_dir, config.method, config.rank)
    accuracy = {
        "cat": "exactly the weighted sum",
        "svd": f"{math.sqrt(max(0.0, 1 - error**2)):.2%} of the norm of the weighted sum kept",
        "linear": f"PEFT's linear mix, which differs from the weighted sum by {error:.0%} of its norm",
    }
    print(f"mixed adapter in {config.output_dir}: {accuracy[config.method]}")


@dataclass
class ReportConfig:
    """Make the page of a run, finished or not: curves, samples, settings, in one file."""

    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT_DIR")]
    """Output directory of a run."""
    output: str | None = None
    """Where to write; by default OUTPUT_DIR/report.html."""
    debug: bool = False
    """Show the traceback of an error."""


def report(argv: Sequence[str]) -> None:
    config = parse_args(ReportConfig, "python -m qlora report", argv)
    from qlora.run_report import write_report

    print(write_report(config.directory, config.output))


def main(argv: Sequence[str]) -> None:
    import train

    commands = {
        "train": train.main,
        "generate": train.main,
        "chat": chat,
        "plan": plan,
        "merge": merge,
        "mix": mix,
        "check-data": check,
        "import": import_adapter,
        "inspect": inspect,
        "export": export,
        "push": push,
        "report": report,
    }
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    elif list(argv[:1]) in ([], ["-h"], ["--help"]):
        print(f"{__doc__}\n\nusage: python -m qlora COMMAND [--help] [OPTIONS]")
    else:
        raise InputError(f"Unknown command {argv[0]!r}; choose {', '.join(commands)}.")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
