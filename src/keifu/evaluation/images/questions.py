"""Evaluation of a vision-language model on questions about pictures: the share of right answers, and blind baselines.

Many questions can be answered without the picture. So three baselines are reported: the same model without the picture,
the most frequent training answer, and the most frequent training answer to each question.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from keifu.data.images import questions as data
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.evaluation.intervals import share_figures
from keifu.evaluation.registry import EvalRequest, EvalResult, Figures, ResultTable
from keifu.inference.chat.prompts import SeeingModel, render
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.sampling_params import SamplingParams

ABOUT = "a model that sees on questions about pictures: accuracy, next to the same model without the picture"
NAMES = data.NAMES
OPTIONS = {"output", "batch_size"}
GREEDY = SamplingParams(temperature=0, max_tokens=16, seed=0)


def takes(model: nn.Module) -> bool:
    """Return whether the model reads pictures."""
    return isinstance(model, SeeingModel)


def accepts(on: str) -> bool:
    """Return whether `on` is a folder of questions."""
    return (Path(on) / data.FILE).is_file()


def evaluate(model: Any, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """Return the accuracy on the test part, or on `limit` evenly spaced questions of it."""
    questions = data.read_questions(request.on)
    tested = list(questions.tested)
    if not tested:
        raise UserError(f'{request.on} has no questions to test on: give some of them "part": "test".')
    if request.limit is not None and request.limit < len(tested):
        tested = [tested[number * len(tested) // request.limit] for number in range(request.limit)]

    def answers(seeing: bool) -> list[str]:
        def prompt(question: data.Question) -> Any:
            images = [questions.picture(question.image)] if seeing else []
            return render(tokenizer, [{"role": "user", "content": question.question, "images": images}], model.config)

        said: list[str] = []
        for first in range(0, len(tested), 256):  # their pictures are in memory
            prompts = [prompt(question) for question in tested[first : first + 256]]
            done = generate_batch(model, tokenizer, prompts, GREEDY, request.batch_size or 32)
            said += [answer.text.strip() for answer in done]
        return said

    def right(name: str, said: Sequence[str], some: Sequence[int]) -> Figures:
        return share_figures(name, sum(said[number] == tested[number].answer for number in some), len(some))

    (most, by_question), with_picture, blind = questions.commonest(), answers(True), answers(False)
    every, left_out = range(len(tested)), {*(request.held_out.get("left_out") or ())}
    figures = right("accuracy", with_picture, every) | right("without the picture", blind, every)
    figures |= right(f"always {most!r}", [most] * len(tested), every)
    commonest_answers = [by_question.get(row.question, most) for row in tested]
    figures |= right("commonest answer to each question", commonest_answers, every)
    new = [number for number, row in enumerate(tested) if left_out <= questions.words[row.image]]
    if left_out and new:
        figures |= right(
            f"accuracy on pictures of {' '.join(sorted(left_out))}, left out of training", with_picture, new
        )
    rows = [(*row, *given_answers) for row, *given_answers in zip(tested, with_picture, blind, strict=True)]
    items = ResultTable((*data.Question._fields, "given", "given without the picture"), rows)
    return EvalResult(figures | {"questions": len(tested)}, items=items)
