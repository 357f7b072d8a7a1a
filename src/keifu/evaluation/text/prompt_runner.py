"""Runner of evaluations by prompts: computes likelihoods of given answers or generates answers, with a progress bar."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from keifu.data.progress import counting
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.inference.text.generate import Completion, generate_batch
from keifu.inference.text.likelihood import Likelihood, ScoredPair, likelihoods
from keifu.inference.text.model import text_model
from keifu.inference.text.sampling_params import SamplingParams


class PromptRunner(NamedTuple):
    """Model with its tokenizer. batch_size: maximal prompts in a pass; None: chosen by their length."""

    model: nn.Module
    tokenizer: Tokenizer
    batch_size: int | None = None

    @property
    def context(self) -> int:
        """Context length of the model in tokens."""
        return text_model(self.model).config.context_length

    def excess(self, pair: ScoredPair) -> int:
        """Return the number of tokens by which a prompt with its answer exceeds the context."""
        return len(pair.prompt) + len(pair.answer) - 1 - self.context

    def likelihoods(self, pairs: Sequence[ScoredPair], label: str) -> list[Likelihood]:
        """Return the likelihood of each pair."""
        with counting(label, len({pair.prompt for pair in pairs}), "prompts") as progress:
            return likelihoods(self.model, pairs, self.batch_size, progress)

    def write(
        self, prompts: Sequence[str | Sequence[int]], settings: Sequence[SamplingParams], label: str
    ) -> list[Completion]:
        """Return the completion of each prompt."""
        with counting(label, len(prompts), "prompts") as progress:
            return generate_batch(self.model, self.tokenizer, prompts, settings, self.batch_size or 32, progress)
