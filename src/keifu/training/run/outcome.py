"""Sentences about the result of a run, from its metrics: what was learned, and whether the model learns by heart."""

import math
from collections.abc import Mapping, Sequence

from keifu.training.run.report_words import say, sentence

Lines = Sequence[Mapping[str, float | int]]
ACCURACIES = {"validation_accuracy": "data", "validation_word_accuracy": "words"}
OPPONENT = "validation_discriminator_loss"  # a run with it has two networks whose losses depend on each other
FAR = 0.01  # a loss that falls by a smaller part of itself has not fallen


def learned(lines: Lines, figures: Mapping[str, float | int], language: str | None = None) -> str:
    """Return a sentence that compares the first validation with the result, or "" without a validation before the
    training.

    figures: the results, of the best weights if those were kept. language: "en", or None for the language of reports.
    """
    first = next((line for line in lines if "validation_loss" in line), {})
    if first.get("step") != 0 or "validation_loss" not in figures or not math.isfinite(figures["validation_loss"]):
        return ""
    if OPPONENT in first:
        return sentence("opponents", language)
    before, after = first["validation_loss"], figures["validation_loss"]
    if not after < before - FAR * abs(before):
        return sentence("nothing", language, first=before, last=after)
    for figure, name in ACCURACIES.items():
        if figure in first and figure in figures:
            name = name if language == "en" else say(name)
            return sentence("share", language, first=first[figure], last=figures[figure], name=name)
    if "bits_per_byte" in figures:  # the loss is of tokens, in nats
        return sentence("probability", language, first=math.exp(-before), last=math.exp(-after))
    return sentence("loss", language, first=before, last=after)


def rising(lines: Lines) -> list[str]:
    """Return sentences with the likely cause if the validation loss rose while the training loss fell, else []."""
    losses = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    training = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if len(losses) < 2 or not training or any(OPPONENT in line for line in lines):
        return []
    lowest_step, lowest = min(losses, key=lambda point: point[1])
    step, last = losses[-1]
    before = next((loss for at, loss in training if at >= lowest_step), training[0][1])
    if not (last > lowest + max(0.02 * abs(lowest), 0.01) and training[-1][1] < before):
        return []
    rose = sentence("rose", lowest=lowest, lowest_step=lowest_step, last=last, step=step)
    return [f"{rose} {sentence('never fell' if lowest_step == losses[0][0] else 'by heart')}"]
