"""Adapter that runs keifu's models in lm-evaluation-harness (lm-eval), under the name "keifu".

    lm_eval.simple_evaluate(model=KeifuLM("smollm2"), tasks=[...])

Scores of a checkpoint equal those of the harness's transformers backend: texts are tokenized in the same way, and texts
that are too long lose their beginning, with a warning. Shared prefixes of prompts are computed once.
"""

import logging
from dataclasses import replace
from typing import Any

from torch import nn

from keifu.checkpoints import load
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError, install
from keifu.evaluation.text.prompt_runner import PromptRunner
from keifu.inference.text import likelihood
from keifu.inference.text.sampling_params import SETTINGS, SamplingParams, defaults

try:
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as missing:
    raise UserError(f"lm-evaluation-harness is needed ({missing}): {install('evaluation')}.") from missing

SCORING = "lm-eval, scoring"
WRITTEN = 256  # default maximum of new tokens, as in the harness
MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING = {name for name, row in SETTINGS.items() if row.setting.stage}  # the task settings that are used
log = logging.getLogger(__name__)


@register_model("keifu")
class KeifuLM(LM):
    """Causal model with its tokenizer, or the argument with which `keifu.load` loads one.

    batch_size: maximum number of prompts in a pass; unset or "auto": chosen by their length. device: device of the
    model.
    """

    def __init__(
        self, model: str | nn.Module, tokenizer: Tokenizer | None = None, batch_size: int | str | None = None,
        device: str | None = None, max_batch_size: int | None = None,
    ):  # fmt: skip
        super().__init__()
        loaded, reader = load(model) if isinstance(model, str) else (model, tokenizer)
        if (tokenizer := tokenizer or reader) is None:
            raise UserError("This model has no tokenizer, so it cannot read a text: give one with it.")
        self.model = loaded if device is None else loaded.to(device)
        self.tokenizer, self.name = tokenizer, model if isinstance(model, str) else type(model).__name__
        self.batch_size = max_batch_size if batch_size in (None, "auto") else int(batch_size)
        self.runner = PromptRunner(self.model, self.tokenizer, self.batch_size)
        self.context = self.runner.context

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each pair of context and continuation: ln P(continuation | context), and whether greedy decoding
        generates it."""
        texts = [request.args for request in requests]
        pairs = [self._cut(pair) for pair in likelihood.join_tokens(self.tokenizer, texts, allow_special=True)]
        answers = [(score.total, score.greedy) for score in self.runner.likelihoods(pairs, SCORING)]
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return ln P of each whole text. A long text is split into windows of the context length. Each window begins
        with the previous window's last token."""
        texts = [request.args[0] for request in requests]
        front, [begin] = likelihood.first_context(self.tokenizer, texts), likelihood.common_beginning(self.tokenizer)
        windows: list[list[likelihood.ScoredPair]] = []  # for each text
        for ids in self.tokenizer.encode_batch(texts, allow_special=True):
            parts = get_rolling_token_windows(likelihood.open_prefixes(front, ids), begin, self.context, 1)
            windows.append([likelihood.ScoredPair(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, parts)])
        scores = iter(self.runner.likelihoods([pair for window in windows for pair in window], SCORING))
        totals = [sum(next(scores).total for _ in window) for window in windows]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a continuation of each context. It ends before one of the stop strings."""
        arguments = [request.args for request in requests]
        settings = [_sampling(options, seed, self.tokenizer) for seed, (_, options) in enumerate(arguments)]
        texts = [text for text, _ in arguments]
        front = likelihood.first_context(self.tokenizer, texts)
        ids = self.tokenizer.encode_batch(texts, allow_special=True)
        prompts = [
            self._room(likelihood.open_prefixes(front, front_ids), each)
            for front_ids, each in zip(ids, settings, strict=True)
        ]
        done = self.runner.write(prompts, settings, "lm-eval, writing")
        for args, answer in zip(arguments, done, strict=True):
            self.cache_hook.add_partial("generate_until", args, answer.text)
        return [answer.text for answer in done]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the tokenizer's chat template."""
        return self.tokenizer.chat_text(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the chat template if the harness requests it."""
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Name by which the harness distinguishes cached requests."""
        return self.tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """Return facts about the model, which the harness writes next to its results."""
        weights = [*self.model.parameters()]
        return {"model": self.name, "model_num_parameters": sum(weight.numel() for weight in weights)}

    def _cut(self, pair: likelihood.ScoredPair) -> likelihood.ScoredPair:
        """Remove the beginning of a pair that is longer than the context."""
        extra = self.runner.excess(pair)
        if extra <= 0:
            return pair
        if extra >= len(pair.prompt):
            raise UserError(f"A continuation has {len(pair.answer)} tokens, but this model takes {self.context}.")
        log.warning("A prompt and its answer are %d tokens longer than the context: its beginning is cut.", extra)
        return likelihood.ScoredPair(pair.prompt[extra:], pair.answer)

    def _room(self, prompt: list[int], sampling: SamplingParams) -> list[int]:
        """Return the end of a prompt, so short that the continuation fits into the context."""
        room = self.context - (sampling.max_tokens or 0)
        if room < 1:
            raise UserError(f"{sampling.max_tokens} tokens to write leave no room in the context of {self.context}.")
        if len(prompt) > room:
            log.warning("A prompt of %d tokens leaves no room for its answer: its beginning is cut.", len(prompt))
        return prompt[-room:] or likelihood.common_beginning(self.tokenizer)


def _sampling(options: dict[str, Any], seed: int, tokenizer: Tokenizer) -> SamplingParams:
    """Convert a task's settings to `SamplingParams`. Decoding is greedy unless the task samples.

    As in transformers, the repetition penalty is that of the model's generation_config.json unless the task gives one.
    Raises `UserError` for a setting that would change the result and is not supported, such as beams.
    """
    until = options.get("until") or ()
    stop = (until,) if isinstance(until, str) else tuple(text for text in until if text)
    if options.get("num_beams", 1) != 1:
        raise UserError(f"num_beams is {options['num_beams']}, and keifu samples or decodes greedily: leave it out.")
    most = next((options[name] for name in MOST if options.get(name) is not None), WRITTEN)
    penalty = options.get("repetition_penalty", defaults(tokenizer).sampling.repetition_penalty)
    settings = SamplingParams(max_tokens=int(most), temperature=0, repetition_penalty=penalty, stop=stop, seed=seed)
    if not options.get("do_sample", bool(options.get("temperature"))):
        return settings
    return replace(settings, **{"temperature": 1.0, **{name: options[name] for name in SAMPLING & options.keys()}})
