"""The model for lm-eval's tasks: our base, in 4 or 16 bits, with or without an adapter.

Importing this module registers it with lm-eval as "qlora" (in a checkout it is eval.lm_eval_model),

    import qlora.evaluation.lm_eval_model, lm_eval
    lm_eval.simple_evaluate("qlora", model_args="model=M,adapter=A", tasks=["arc_easy"])

and `qlora eval harness` does the same with flags. eval/likelihood.py and qlora/generation.py compute the requests,
each process its share; lm-eval sees a single process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from qlora.config.generate import Sampling
from qlora.generation import continue_prompts
from qlora.system.errors import InputError

from .likelihood import (
    encode_pairs,
    log_likelihoods,
    longest_window,
    prefix_token,
    rolling_windows,
    score_passages,
    text_ids,
)
from .model import EvalConfig, load_evaluated, share_out

Likelihood = tuple[float, bool]


@register_model("qlora")
class TaskModel(LM):
    """Answers lm-eval's three kinds of request.

    Args:
        model: its name, or a model from `load_base_model`, which needs `tokenizer` and `accelerator` too.
        adapter: adapter directory.
        max_length: longest window in tokens, at most the model's limit.
        batch_size: number of max_length windows per row, and of answers decoded together.
        flags: other fields of `EvalConfig`, such as use_4bit.
    """

    def __init__(
        self,
        model: Any,
        adapter: str | None = None,
        tokenizer: Any = None,
        accelerator: Any = None,
        max_length: int = 2048,
        batch_size: int | str = 16,
        seed: int = 42,
        device: str | None = None,  # passed by lm-eval; unused, the model is on the best device
        max_batch_size: int | None = None,
        **flags: Any,
    ) -> None:
        super().__init__()
        if isinstance(model, str):
            config = EvalConfig(model=model, adapter=adapter, **flags)
            model, tokenizer, accelerator = load_evaluated(config)
        self.model, self.tokenizer, self.accelerator = model, tokenizer, accelerator
        self.max_length = longest_window(model, int(max_length))
        if not str(batch_size).isdigit():
            raise InputError(f"batch_size is {batch_size!r}; give a whole number.")
        self.batch_size, self.seed = int(batch_size), seed

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        return str(self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: Any = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Likelihood]:
        """Log-likelihoods; requests with the same context, such as a question's choices, are computed together."""
        texts: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            texts.setdefault(request.args[0], []).append(index)
        groups = list(texts.items())

        def compute(mine: list[tuple[str, list[int]]]) -> list[list[Likelihood]]:
            pairs = [
                encode_pairs(context, [requests[i].args[1] for i in places], self.tokenizer)
                for context, places in mine
            ]
            budget = self.batch_size * self.max_length
            return log_likelihoods(self.model, pairs, self.max_length, budget, self.accelerator.is_main_process)

        found = share_out(self.accelerator, groups, compute, [len(context) for context, _ in groups])
        by_place = {
            place: value
            for (_, places), values in zip(groups, found, strict=True)
            for place, value in zip(places, values, strict=True)
        }
        return [by_place[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        def compute(mine: list[str]) -> list[float]:
            passages, places = [], []
            for place, text in enumerate(mine):
                ids = [prefix_token(self.tokenizer), *text_ids(text, self.tokenizer)]
                windows = rolling_windows(ids, [True] * len(ids), self.max_length, self.max_length)
                passages += windows
                places += [place] * len(windows)
            budget, totals = self.batch_size * self.max_length, [0.0] * len(mine)
            sums = score_passages(self.model, passages, budget, self.accelerator.is_main_process)
            for place, found in zip(places, sums, strict=True):
                totals[place] += found[0][0]
            return totals

        texts = [request.args[0] for request in requests]
        return share_out(self.accelerator, texts, compute, [len(text) for text in texts])

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Greedy, or sampled with temperature and top_p; a prompt that is too long loses its beginning."""
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        answers: dict[int, str] = {}
        for places in kinds.values():
            answers |= zip(places, self._generate(requests, places), strict=True)
        return [answers[place] for place in range(len(requests))]

    def _generate(self, requests: Sequence[Instance], places: list[int]) -> list[str]:
        """The answers to requests with the same settings."""
        settings = normalize_gen_kwargs(requests[places[0]].args[1])
        limit = settings["max_gen_toks"]
        if limit >= self.max_length:
            raise InputError(
                f"The task generates up to {limit} tokens, which leaves no room in --max-length {self.max_length}."
            )
        temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
        sampling = Sampling(limit, temperature, settings.get("top_p", 1.0), self.seed, settings["until"])

        def compute(mine: list[int]) -> list[str]:
            prompts = [text_ids(requests[i].args[0], self.tokenizer)[limit - self.max_length :] for i in mine]
            prompts = [ids or [prefix_token(self.tokenizer)] for ids in prompts]
            found = continue_prompts(
                self.model, self.tokenizer, prompts, 1, sampling, self.batch_size, numbers=mine
            )
            return [texts[0] for texts in found]

        return share_out(self.accelerator, places, compute, [len(requests[i].args[0]) for i in places])
