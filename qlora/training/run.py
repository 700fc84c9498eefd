"""A training run, from its settings to its adapter, in six stages.

    open          the processes, the output directory, the trackers
    read_data     rows -> token ids and targets, held-out rows, sample prompts
    load_base     the frozen base, quantized, on this process's device
    add_adapter   LoRA on it (or an adapter to continue with), optimizer, and a resumed run's state
    fit           the loop and its observers
    save          waits for the last checkpoint, draws the last page and the curve

The command line and the Python API both use it. Errors are `InputError` before the loop, `TrainingStopped` or
`StoppedOnRequest` in it. Leaving the `with` block releases what the run holds: lock, threads, signal handlers,
trackers. The launcher keeps the process group.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import date
from typing import Any

import transformers.modeling_utils  # noqa: F401  (load_base_model needs it)

from qlora.adapters.load import check_before_loading, continued_config, load_adapter
from qlora.adapters.peft_files import read_adapter
from qlora.adapters.provenance import calibration_of
from qlora.config.data import DataConfig
from qlora.config.fields import to_text
from qlora.config.lora import LoRAConfig
from qlora.config.run import RunConfig
from qlora.data.answers import make_matcher
from qlora.data.batches import largest_micro_batch, lengths_of
from qlora.data.chat_template import prints_date, today
from qlora.data.dataset import Encoder, Sources, load_examples
from qlora.data.order import WindowOrder
from qlora.data.preferences import kind_of
from qlora.data.prompts import choose_prompts
from qlora.data.python_rows import PythonRows
from qlora.data.row_encoder import set_chat_template
from qlora.data.tokenizer_files import add_tokens
from qlora.lora.adalora_optimizer import build_adapter_optimizer
from qlora.lora.adapter import inject_lora, set_tokenizer, wrap_layers
from qlora.lora.optimizer import MasterOptimizer
from qlora.lora.svd_start import initialize_adapter
from qlora.lora.targets import resolve_targets
from qlora.lora.trainable import freeze_base, parameter_summary
from qlora.model.tokenizer import load_tokenizer
from qlora.parallel.launch import arrange_ranks
from qlora.parallel.load import load_for_ranks
from qlora.planning.memory import MemoryPlan
from qlora.quant.weight import QuantConfig
from qlora.system.device import choose_optimizer
from qlora.system.errors import InputError, TrainingStopped
from qlora.system.files import whole_lines
from qlora.system.memory import GIB
from qlora.system.signals import StopRequest
from qlora.training.calibration import calibrated
from qlora.training.checkpoint import load_checkpoint
from qlora.training.display import Display
from qlora.training.fingerprint import run_settings
from qlora.training.held_out import HeldOut
from qlora.training.lines import LinesFile, Metrics, is_sampled
from qlora.training.loop import Limits, Trainer, TrainingData
from qlora.training.observer import Observer, Stop
from qlora.training.offload import activation_store
from qlora.training.outcome import check_outcome, doubts
from qlora.training.page import Page
from qlora.training.progress import Progress
from qlora.training.recompute import choose_recomputed_layers
from qlora.training.reference import prepare_preferences
from qlora.training.rows import check_lora, check_rows
from qlora.training.run_directory import RunDirectory
from qlora.training.run_facts import gather_facts
from qlora.training.samples import AnswerScore, Sampler, Samples
from qlora.training.saver import CheckpointWriter, Saver, TrainedState
from qlora.training.schedule import build_schedule, choose_warmup
from qlora.training.trackers import Trackers, start_accelerator, start_trackers

MANY_ROWS = 1000  # their answers are not all empty


class TrainingRun:
    """One training run, as a context manager.

        with TrainingRun.from_config(config, observers=[Mine()]) as run:
            run.train()

    Args:
        config: its settings; `from_config` checks that they fit together.
        call: the command line's arguments, or Python's call as text, for run.json.
        observers: added to the run's own, called after evaluations and before saving.
        started: time.monotonic() from which --stop-after counts.
        rows: name -> rows, for names in the data that are neither files nor hub ids.
        ends_process: what a second signal does (`StopRequest`).
    Attributes:
        model, tokenizer, examples, held_out, optimizer, progress, trainer: set by the stage that makes them.
    """

    def __init__(
        self,
        config: RunConfig,
        call: Sequence[str] | str = (),
        observers: Sequence[Observer] = (),
        started: float | None = None,
        rows: Mapping[str, PythonRows] | None = None,
        ends_process: bool = True,
    ) -> None:
        self.config, self.call, self.observers = config, call, list(observers)
        self.rows, self.ends_process = rows or {}, ends_process
        self.started = time.monotonic() if started is None else started
        self.progress = Progress()
        self._taken, self._writing = ExitStack(), ExitStack()

    @classmethod
    def from_config(
        cls,
        config: RunConfig,
        call: Sequence[str] | str = (),
        observers: Sequence[Observer] = (),
        started: float | None = None,
        rows: Mapping[str, PythonRows] | None = None,
        ends_process: bool = True,
    ) -> TrainingRun:
        """Check the settings and make a run of them; arguments as for the class.

        Raises:
            InputError: a setting is missing, or settings conflict.
        """
        if config.model.model is None:
            raise InputError(
                "No model given; pass --model with a Hugging Face directory, a hub id or a .gguf file."
            )
        if not config.data.data:
            raise InputError("Nothing to do; pass --data FILE to train, or --prompt TEXT to get an answer.")
        config.check_training()
        if config.generate.adapter is not None:  # run.json tells what trains
            check_before_loading([config.generate.adapter], config.model.model)
            saved = read_adapter(config.generate.adapter)
            config = replace(config, lora=continued_config(config.lora, saved, config.model.model))
        return cls(config, call, observers, started, rows, ends_process)

    def __enter__(self) -> TrainingRun:
        try:
            self.open()
        except BaseException:
            self._taken.close()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._writing.__exit__(*error)
        finally:
            self._taken.close()

    def train(self) -> TrainingRun:
        """Run all stages in order."""
        self.read_data()
        self.load_base()
        self.add_adapter()
        self.fit()
        self.save()
        return self

    # ---- stages -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Connect to the other processes, claim the output directory, start the trackers."""
        w, s = self.config.watching, self.config.saving
        self.accelerator = start_accelerator(w.report_to, s.output_dir)
        self.say = self.accelerator.print
        self.ranks = arrange_ranks(self.config.parallel, self.accelerator)
        self.directory = RunDirectory(s.output_dir, s.resume, self.accelerator, self.config.saved())
        self._taken.callback(self.directory.release)
        self.trackers = Trackers([])
        if self.directory.is_main:
            run = w.run_name or self.directory.path.resolve().name
            start_trackers(self.accelerator, w.project_name, run, self.directory.settings, self.directory.done)
            self.trackers = Trackers(self.accelerator.trackers, self.say)
        self._taken.callback(self.trackers.finish)

    def read_data(self) -> None:
        """Load the tokenizer, examples, held-out examples and sample prompts."""
        config, d, w = self.config, self.config.data, self.config.watching
        self.tokenizer = load_tokenizer(self._base, config.generate.adapter)
        add_tokens(self.tokenizer, config.lora.new_tokens)
        if d.chat_template is not None:
            set_chat_template(self.tokenizer, d.chat_template)
        if prints_date(self.tokenizer):
            day = self.tokenizer.template_date = date.fromisoformat(self.directory.kept("date") or str(today()))
            self.say(f"the chat template prints the date; this run keeps {day:%d %B %Y}, also when it is resumed")
        if config.generate.adapter is None:
            check_lora(self._base, config.lora, self.tokenizer)
        sources = Sources(
            [self.rows.get(name, name) for name in d.data],
            d.data_weights,
            None if d.eval_data is None else self.rows.get(d.eval_data, d.eval_data),
            d.eval_split,
            config.loop.seed,
        )
        self.examples, self.held_out = load_examples(
            sources, encoder_of(d, self.tokenizer, config.preference.objective), self.say,
            on_bad_row=d.on_bad_row, bad_rows_file=self.directory.bad_rows, show_sample=d.show_sample,
        )  # fmt: skip
        if config.generate.adapter is None:  # an adapter may bring a larger embedding
            for examples in (self.examples, self.held_out):
                check_rows(self._base, self.tokenizer, config.lora.new_tokens, examples)
        # A single process cannot answer with a split base.
        num_samples = 0 if self.ranks.is_split else w.num_samples
        rows = self.held_out or self.examples
        self.prompts = choose_prompts(rows, self.tokenizer, num_samples, w.sample_prompts, d.parse_special)

    def load_base(self) -> None:
        """Load the frozen base, and let it judge the answers that preferences are measured against."""
        m, c, adapter = self.config.model, self.config.calibration, self.config.generate.adapter
        dtype = self.directory.compute_dtype(m.compute_dtype)
        quant = calibration_of([] if adapter is None else [adapter], QuantConfig(m.quant_type, m.double_quant))
        if c.calibrate != "off":
            with self.accelerator.main_process_first():  # the others find it in the cache
                quant = calibrated(
                    self._base, quant, c.calibrate, c.calibrate_tokens, self.examples,
                    encoder_of(self.config.data, self.tokenizer), dtype, self.accelerator.device, self.say,
                )  # fmt: skip
        self.model = load_for_ranks(self._base, self.ranks, self.accelerator, m.use_4bit, quant, dtype, m.cache)
        self.preferences = prepare_preferences(
            self.config, self.model, self.accelerator, [self.examples, self.held_out], self.say
        )

    def add_adapter(self) -> None:
        """Make LoRA, memory plan and optimizer, or restore them from a resumed run's checkpoint."""
        config, t, lora, o = self.config, self.config.loop, self.config.lora, self.config.optimizer
        if config.generate.adapter is not None:
            lora = load_adapter(self.model, config.generate.adapter, self._base, self.say)
            lora = replace(lora, lora_plus_ratio=config.lora.lora_plus_ratio)
            own = f"rank {lora.rank}, alpha {lora.alpha:g}, {to_text(lora.target_modules) or 'no layers'}"
            own += f", whole {to_text(lora.modules_to_save)}" if lora.modules_to_save else ""
            self.say(f"continuing adapter {config.generate.adapter}: {own}")
        else:
            inject_lora(self.model, lora, t.seed, self.tokenizer, self.say)
            lora.target_modules = resolve_targets(self.model, lora.target_modules)  # as run.json shows them
            freeze_base(self.model)
        if config.data.chat_template is not None:
            set_tokenizer(self.model, self.tokenizer)
        if self.preferences is not None and self.preferences.reference is not None:
            wrap_layers(self.model, self.preferences.reference.layers)
        self.say(parameter_summary(self.model))
        optim = choose_optimizer(o.optim, self.accelerator.device, self.say)
        self.plan = self._plan_memory(optim)
        window = t.batch_size * t.grad_accum * self.ranks.data_size
        steps_per_epoch = WindowOrder(self.examples.sources, window, t.seed).steps_per_epoch
        self.total_steps = t.max_steps or t.epochs * steps_per_epoch
        warmup = choose_warmup(o.warmup_steps, self.directory.kept("warmup_steps"), self.total_steps)
        config = self.config = replace(config, optimizer=replace(o, warmup_steps=warmup))
        self.directory.settings["train"]["warmup_steps"] = warmup  # as run.json shows it
        self.settings = run_settings(
            self.model, lora, config, self.examples, window, self.total_steps, optim, self.tokenizer.chat_template,
        )  # fmt: skip
        self.settings |= {} if self.preferences is None else self.preferences.settings
        if prints_date(self.tokenizer):
            self.settings["date"] = str(self.tokenizer.template_date)
        if config.generate.adapter is None and self.directory.checkpoint is None:
            initialize_adapter(self.model, lora)  # may change the base; settings hold the original's fingerprint
        self.optimizer = self._optimizer(lora, optim)
        self.state = TrainedState(self.model, lora, self.optimizer, self._base)

    def fit(self) -> None:
        """Train to the last step."""
        t, d, o = self.config.loop, self.config.data, self.config.optimizer
        observers = self._observers()
        data = TrainingData(
            self.examples, t.batch_size, t.grad_accum, self.config.row_tokens, d.packing, t.seed, self.held_out,
            self.preferences,
        )  # fmt: skip
        skipped, warmup = self.directory.path / "skipped", o.warmup_steps or 0
        self.trainer = Trainer(
            self.model, self.optimizer,
            build_schedule(o.schedule, o.learning_rate, warmup, self.total_steps), data, self.accelerator,
            Limits(self.total_steps, o.max_grad_norm, t.max_skipped, skipped), observers, self.say,
        )  # fmt: skip
        self.trainer.fit(self.progress)
        check_outcome(self.progress)

    def save(self) -> None:
        """Wait for pending writes."""
        self._writing.close()
        self.say = self.accelerator.print
        path = self.directory.path
        if self.directory.is_main:
            losses = [line["loss"] for line in whole_lines(path / "metrics.jsonl") if line.get("loss") is not None]
            counts = [example.num_targets for example in self.examples] if len(self.examples) < MANY_ROWS else []
            warmup = self.config.optimizer.warmup_steps
            for doubt in doubts(losses, counts, self.model.config.get_text_config().vocab_size, warmup or 0):
                self.say(doubt)
            missing = self.directory.missing_files()
            if missing:
                raise TrainingStopped(
                    f"{', '.join(missing)} of this run is missing in {path}: something deleted or moved it during "
                    "the run. --resume auto goes on from a checkpoint that is left."
                )
        drawn = {"Loss curve": path / "loss.png", "Full report": path / "report.html"}
        listed = [f" {name}: {file}." for name, file in drawn.items() if file.is_file()]
        self.say(f"Adapter saved to {path}/.{''.join(listed)}".removesuffix("."))

    # ---- parts of the stages ------------------------------------------------------------------------------

    @property
    def _base(self) -> str:
        assert self.config.model.model is not None
        return self.config.model.model

    def _plan_memory(self, optim: str) -> MemoryPlan:
        """Choose the layers that are recomputed."""
        t, d, device = self.config.loop, self.config.data, self.accelerator.device
        longest = max(lengths_of(self.examples))
        longest = longest if d.packing or self.preferences is None else 2 * min(longest, d.max_length)
        num_tokens = largest_micro_batch(t.batch_size, self.config.row_tokens, longest, d.packing, device.type)
        num_tokens = min(num_tokens, t.batch_size * self.config.trained_tokens)
        mode, budget = t.gradient_checkpointing, t.memory_budget_bytes
        store = activation_store(device, self.directory.path) if t.offload_activations else None
        return choose_recomputed_layers(
            self.model, mode, num_tokens, budget, self.accelerator, self.say, optim, store
        )[1]  # fmt: skip

    def _optimizer(self, lora: LoRAConfig, optim: str) -> MasterOptimizer:
        """A fresh optimizer, or the checkpoint's, whose adapter and progress are restored with it."""
        o, checkpoint = self.config.optimizer, self.directory.checkpoint

        def make() -> MasterOptimizer:
            return build_adapter_optimizer(self.model, lora, optim, o.weight_decay, self.total_steps)

        if checkpoint is None:
            return make()
        self.progress, optimizer = load_checkpoint(
            checkpoint, self.model, make, self.settings, self.config.saving.force_resume, self.say
        )
        self.say(f"resumed from {checkpoint}, {self.progress.step} steps done")
        return optimizer

    def _observers(self) -> list[Observer]:
        """All observers, in calling order. Every process evaluates and saves; only the main one writes."""
        w, s = self.config.watching, self.config.saving
        directory, writing = self.directory, self._writing
        is_main, planned = directory.is_main, sum(vars(self.plan).values()) / GIB
        deadline = None if w.stop_after_seconds is None else self.started + w.stop_after_seconds
        self.stop = stop = writing.enter_context(StopRequest(deadline, self.ends_process))
        writing.callback(self.trackers.finish)
        display = Display(self.total_steps, self.progress.step, quiet=not is_main, planned_gib=planned)
        writing.callback(display.close)  # even if something below fails
        self.say = display.say
        page = [writing.enter_context(Page(directory.path, self.say))] if is_main else []
        directory.set_aside_later(self.progress.step)
        writer = writing.enter_context(
            CheckpointWriter(
                directory, self.state, self.settings, self.progress, s.keep_last, s.load_best, self.say
            )
        )
        writing.callback(display.close)  # again, so that it closes first
        writer.lines = self._open_lines() if is_main else []
        return [
            self._held_out_observer(stop),
            *self.observers,
            Stop(stop),
            *([Samples(self._sampler(display, writer.lines), w.sample_every)] if self.prompts else []),
            Saver(writer.save, self.progress, s.save_every, self.config.keeps_best),
            *([Metrics(writer.lines[0])] if is_main else []),
            display,
            self.trackers,
            *page,
        ]

    def _held_out_observer(self, stop: StopRequest) -> HeldOut:
        w = self.config.watching
        metric = "eval_accuracy" if w.best_metric == "accuracy" else None
        patience, min_delta = w.early_stopping_patience, w.early_stopping_min_delta
        return HeldOut(w.eval_every, self._score(), patience, min_delta, stop, metric)

    def _open_lines(self) -> list[LinesFile]:
        """Write run.json, and open metrics.jsonl and samples.jsonl where the run continues."""
        path, examples = self.directory.path, self.examples
        self.directory.write_run(
            gather_facts(self.call, self.accelerator, self.model, self.plan, examples, len(self.held_out))
        )
        restore = self.directory.restore
        metrics = LinesFile(path / "metrics.jsonl", self.progress, restore=restore)
        samples = LinesFile(path / "samples.jsonl", self.progress, is_sampled, is_lazy=True, restore=restore)
        return [metrics, samples]

    def _sampler(self, display: Display, lines: list[LinesFile]) -> Sampler:
        """A sampler for the sample prompts; the main process writes, shows and tracks the answers."""

        def keep(samples: Sequence[dict[str, Any]]) -> None:
            for sample in samples:
                lines[1].write(sample)
            display.show_samples(samples)
            self.trackers.log_samples(samples)

        return Sampler(
            self.model, self.tokenizer, self.prompts, self.config.watching.sample_tokens, self.accelerator, keep,
            self.say,
        )  # fmt: skip

    def _score(self) -> AnswerScore | None:
        """The exact-match score for evaluations, if requested."""
        w = self.config.watching
        number = (w.score_examples or len(self.held_out)) if w.best_metric == "exact_match" else 0
        asked = choose_prompts(self.held_out, self.tokenizer, number)
        if not asked:
            return None
        is_match, length = make_matcher(w.score_match).same, self.config.generate.max_new_tokens
        return AnswerScore(self.model, self.tokenizer, asked, is_match, length, self.accelerator)


def encoder_of(d: DataConfig, tokenizer: Any, objective: str = "sft") -> Encoder:
    """The encoder from rows to examples for these settings."""
    return Encoder(
        tokenizer, d.max_length, d.train_on, d.on_long, d.parse_special, d.num_workers, d.columns, d.token_cache,
        kind_of(objective),
    )  # fmt: skip
