"""Fine-tune a 4-bit model with LoRA, or answer a prompt with one."""

from __future__ import annotations

import time
from collections.abc import Sequence

from qlora.config.parse import parse_args
from qlora.config.run import RunConfig
from qlora.system.errors import InputError
from qlora.system.startup import collection_paused, importing_transformers


def main(argv: Sequence[str]) -> None:
    config = parse_args(RunConfig, "train.py", argv)
    if config.model.model is None:
        raise InputError("No model given; pass --model with a Hugging Face directory, a hub id or a .gguf file.")
    if config.generate.prompt is not None:
        if config.parallel.is_split:
            raise InputError(f"{config.parallel.flag} is for training; leave it out to answer a --prompt.")
        answer(config, config.model.model)
    elif config.data.data:
        train(config, config.model.model, config.data.data, argv)
    else:
        raise InputError("Nothing to do; pass --data FILE to train, or --prompt TEXT to get an answer.")


def answer(config: RunConfig, name: str) -> None:
    with collection_paused(), importing_transformers():
        import transformers.modeling_utils  # noqa: F401  (load_base_model needs it)

        from qlora.adapters.load import load_adapter
        from qlora.data.row_encoder import set_chat_template
        from qlora.generation import stream_answer
        from qlora.model.load import load_base_model
        from qlora.model.tokenizer import load_tokenizer
        from qlora.quant.weight import QuantConfig
        from qlora.system.device import best_device

    m, gen = config.model, config.generate
    quant = QuantConfig(m.quant_type, m.double_quant)
    model = load_base_model(name, m.use_4bit, quant, m.compute_dtype, best_device(), m.cache)
    if gen.adapter is not None:
        load_adapter(model, gen.adapter, name)
    tokenizer = load_tokenizer(name, gen.adapter)
    if config.data.chat_template is not None:
        set_chat_template(tokenizer, config.data.chat_template)
    stream_answer(model, tokenizer, gen.prompt or "", gen.sampling(config.loop.seed))


def train(config: RunConfig, name: str, data: list[str], argv: Sequence[str]) -> None:
    started = time.monotonic()
    with collection_paused(), importing_transformers():
        import transformers.modeling_utils  # noqa: F401  (load_base_model needs it)

        from qlora.adapters.load import load_adapter
        from qlora.data.answers import make_matcher
        from qlora.data.batches import largest_micro_batch, lengths_of
        from qlora.data.dataset import load_examples
        from qlora.data.order import WindowOrder
        from qlora.data.prompts import choose_prompts
        from qlora.data.row_encoder import set_chat_template
        from qlora.data.tokenizer_files import add_tokens
        from qlora.export.hub import check_destination, push_to_hub
        from qlora.lora.adapter import inject_lora, set_tokenizer
        from qlora.lora.svd_start import initialize_adapter
        from qlora.lora.trainable import freeze_base, parameter_summary
        from qlora.model.tokenizer import load_tokenizer
        from qlora.parallel.launch import arrange_ranks
        from qlora.parallel.load import load_for_ranks
        from qlora.quant.weight import QuantConfig
        from qlora.system.device import choose_optimizer
        from qlora.system.signals import StopRequest
        from qlora.training.adalora_optimizer import build_adapter_optimizer
        from qlora.training.fingerprint import run_settings
        from qlora.training.loop import fit
        from qlora.training.output import RunOutput
        from qlora.training.recompute import choose_recomputed_layers
        from qlora.training.run_facts import gather_facts
        from qlora.training.samples import AnswerScore, Sampler
        from qlora.training.schedule import build_schedule
        from qlora.training.trackers import start_accelerator

    m, d, lora, o = config.model, config.data, config.lora, config.optimizer
    t, w, s = config.loop, config.watching, config.saving
    config.check_training()
    if s.push_to_hub is not None:
        check_destination(s.push_to_hub)
    accelerator = start_accelerator(w.report_to, s.output_dir)
    say, device = accelerator.print, accelerator.device
    ranks = arrange_ranks(config.parallel, accelerator)
    output = RunOutput(s.output_dir, name, s.resume, accelerator, config.saved(), s.keep_last, s.load_best)
    output.start_trackers(w.project_name, w.run_name)

    tokenizer = load_tokenizer(name, config.generate.adapter)
    add_tokens(tokenizer, lora.new_tokens)
    if d.chat_template is not None:
        set_chat_template(tokenizer, d.chat_template)
    examples, held_out = load_examples(
        data, tokenizer, d.max_length, d.train_on, d.on_long, eval_source=d.eval_data, eval_split=d.eval_split,
        seed=t.seed, say=say, show_sample=d.show_sample, on_bad_row=d.on_bad_row, bad_rows_file=output.bad_rows,
        parse_special=d.parse_special, num_workers=d.num_workers, weights=d.data_weights, columns=d.columns,
        cache=d.token_cache,
    )  # fmt: skip
    num_samples = 0 if ranks.is_split else w.num_samples  # one process alone cannot answer with a split base
    prompts = choose_prompts(held_out or examples, tokenizer, num_samples, w.sample_prompts, d.parse_special)
    quant, dtype = QuantConfig(m.quant_type, m.double_quant), output.compute_dtype(m.compute_dtype)
    model = load_for_ranks(name, ranks, accelerator, m.use_4bit, quant, dtype, m.cache)
    if config.generate.adapter is not None:
        lora = load_adapter(model, config.generate.adapter, name, say)
    else:
        inject_lora(model, lora, t.seed, tokenizer)
        freeze_base(model)
    if d.chat_template is not None:
        set_tokenizer(model, tokenizer)
    say(parameter_summary(model))
    longest = max(lengths_of(examples))
    num_tokens = largest_micro_batch(t.batch_size, d.max_length, longest, d.packing, device.type)
    optim, budget = choose_optimizer(o.optim, device, say), t.memory_budget_bytes
    _, plan = choose_recomputed_layers(
        model, t.gradient_checkpointing, num_tokens, budget, accelerator, say, optim
    )

    window = t.batch_size * t.grad_accum * ranks.data_size
    total_steps = t.max_steps or t.epochs * WindowOrder(examples.sources, window, t.seed).steps_per_epoch
    settings = run_settings(model, lora, config, examples, window, total_steps, optim, tokenizer.chat_template)
    if config.generate.adapter is None and output.checkpoint is None:
        initialize_adapter(model, lora)  # may change the base, of which settings hold the original's fingerprint
    optimizer = output.begin(
        model, lora, lambda: build_adapter_optimizer(model, lora, optim, o.weight_decay, total_steps), settings,
        total_steps, s.force_resume, gather_facts(argv, accelerator, model, plan, examples, len(held_out)),
    )  # fmt: skip
    sample = Sampler(model, tokenizer, prompts, w.sample_tokens, accelerator, output.write_samples, output.say)
    num_scored = (w.score_examples or len(held_out)) if w.best_metric == "exact_match" else 0
    asked, is_match = choose_prompts(held_out, tokenizer, num_scored), make_matcher(w.score_match).same
    score = AnswerScore(model, tokenizer, asked, is_match, config.generate.max_new_tokens, accelerator)
    limit = w.stop_after_seconds
    with StopRequest(None if limit is None else started + limit) as stop, output:
        fit(
            model, optimizer, build_schedule(o.schedule, o.learning_rate, o.warmup_steps, total_steps),
            examples, accelerator, progress=output.progress, total_steps=total_steps,
            batch_size=t.batch_size, grad_accum=t.grad_accum, max_length=d.max_length, packing=d.packing,
            max_grad_norm=o.max_grad_norm, seed=t.seed, eval_examples=held_out, eval_every=w.eval_every,
            patience=w.early_stopping_patience, min_delta=w.early_stopping_min_delta,
            score=score if asked else None, sample=sample if prompts else None, sample_every=w.sample_every,
            save_every=s.save_every, keep_best=config.keeps_best, max_skipped=t.max_skipped, save=output.save,
            log=output.log, keep_batch=output.keep_batch, stop=stop, say=output.say,
        )  # fmt: skip
    say(f"adapter in {output.directory}, loss curve in loss.png, all about the run in report.html there")
    if s.push_to_hub is not None and accelerator.is_main_process:
        say(f"uploaded to {push_to_hub(output.directory, s.push_to_hub)}")
