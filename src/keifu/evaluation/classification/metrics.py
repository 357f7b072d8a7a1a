"""Classification metrics: accuracy, F1, the confusion matrix, and a picture of misclassified images.

Axes: texts, labels; of the matrix: rows = true labels, columns = predicted labels; of images: picture, height,
width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from keifu.evaluation.intervals import share_figures
from keifu.evaluation.plots.decision_boundary import aligned, canvas, png
from keifu.evaluation.registry import Figures, ResultTable


@dataclass(frozen=True, eq=False)
class Confusion:
    """Confusion matrix: number of texts with the row's true label and the column's predicted label."""

    counts: Int[Tensor, "labels labels"]
    labels: tuple[str, ...]

    @classmethod
    def of(cls, right: Int[Tensor, "texts"], predicted: Int[Tensor, "texts"], labels: Sequence[str]) -> "Confusion":
        """Count pairs of labels. right, predicted: indices of the true and the predicted labels."""
        size = len(labels)
        return cls(torch.bincount(right * size + predicted, minlength=size * size).view(size, size), tuple(labels))

    @property
    def accuracy(self) -> float:
        """Share of texts whose predicted label is the true one."""
        return float(self.counts.trace() / self.counts.sum())

    def accuracy_figures(self, name: str = "accuracy") -> Figures:
        """Return the accuracy and its 95% interval, as figures of an evaluation."""
        return share_figures(name, int(self.counts.trace()), int(self.counts.sum()))

    @property
    def majority(self) -> tuple[str, float]:
        """Most frequent label and its share of the texts, which is the accuracy of always predicting it."""
        rows = self.counts.sum(1)
        return self.labels[int(rows.argmax())], float(rows.max() / rows.sum())

    @cached_property
    def scores(self) -> Float[Tensor, "labels scores"]:
        """Precision, recall and F1 of each label.

        Precision is the share of the texts predicted as a label that have it, recall the share of the texts with a
        label that are predicted as it; both are 0 if there are none. F1 is their harmonic mean.
        """
        precision, recall = (self.counts.diag() / self.counts.sum(axis).clamp_min(1) for axis in (0, 1))
        return torch.stack([precision, recall, 2 * precision * recall / (precision + recall).clamp_min(1e-12)], 1)

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the labels that occur as true or predicted labels."""
        return float(self.scores[(self.counts.sum(0) + self.counts.sum(1)) > 0, 2].mean())

    def verdict(self) -> str:
        """Describe accuracy, the accuracy of the most frequent label, and macro F1 in a sentence."""
        label, share = self.majority
        return (
            f"Accuracy {self.accuracy:.1%} of {int(self.counts.sum()):,} texts (always {label!r}: {share:.1%}), "
            f"macro F1 {self.macro_f1:.3f}."
        )

    def page(self) -> str:
        """Return the verdict, and a text table of precision, recall and F1 of each label."""
        columns, rows = self.result("texts")
        return f"{self.verdict()}\n\n{aligned([columns, *rows])}"

    def result(self, what: str) -> ResultTable:
        """Return precision, recall and F1 of each label as a table of an evaluation. what: name of the data, the
        title of the counts."""
        each = zip(self.labels, self.scores.tolist(), self.counts.sum(1).tolist(), strict=True)
        rows = [(label, *(f"{score:.3f}" for score in scores), f"{count:,}") for label, scores, count in each]
        return ResultTable(("label", "precision", "recall", "F1", what), rows)

    def matrix(self) -> tuple[list[str], list[list[str]]]:
        """Return the counts as a table (columns, rows)."""
        rows = [[label, *map(str, row)] for label, row in zip(self.labels, self.counts.tolist(), strict=True)]
        return ["right \\ given", *self.labels], rows

    def errors(self, most: int) -> list[list[str]]:
        """Return the most frequent pairs of a true and another predicted label, with their counts."""
        counts = self.counts.clone().fill_diagonal_(0)
        order = counts.flatten().sort(descending=True, stable=True).indices[:most].tolist()
        pairs = [divmod(cell, len(self.labels)) for cell in order if counts.flatten()[cell]]
        return [
            [self.labels[right], self.labels[predicted], f"{int(counts[right, predicted]):,}"]
            for right, predicted in pairs
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        majority, share = self.majority
        scores = [dict(zip(("precision", "recall", "f1"), row, strict=True)) for row in self.scores.tolist()]
        by_label = dict(zip(self.labels, scores, strict=True))
        return {
            "texts": int(self.counts.sum()), "accuracy": self.accuracy, "macro_f1": self.macro_f1,
            "majority": {"label": majority, "share": share}, "labels": by_label, "confusion": self.counts.tolist(),
        }  # fmt: skip

    def picture(self) -> bytes:
        """Draw the matrix as PNG. The colour is the share of the row; the numbers are counts."""
        counts, size = self.counts, len(self.labels)
        shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
        figure, (axes,) = canvas(1, 1, max(3.6, 0.5 * size + 1.6))
        axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        if size <= 20:
            for row, column in counts.nonzero().tolist():
                colour = "white" if shares[row, column] > 0.5 else "#222222"
                text = str(int(counts[row, column]))
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(size), self.labels, rotation=90, fontsize=8)
        axes.set_yticks(range(size), self.labels, fontsize=8)
        axes.set_xlabel("given", fontsize=9)
        axes.set_ylabel("right", fontsize=9)
        axes.set_title(f"Accuracy {self.accuracy:.1%}, macro F1 {self.macro_f1:.3f}", fontsize=9)
        return png(figure)


Numbers = Int[Tensor, " rows"]  # of classes
ACROSS, DOWN, GAP = 8, 3, 8  # pictures per line and per column, and pixels between them for their names


def picture(
    pictures: Float[Tensor, "rows height width"], targets: Numbers, predicted: Numbers, classes: Sequence[str]
) -> bytes:
    """Draw the first misclassified images as PNG, dark on white, each with its true and its predicted class."""
    wrong = (predicted != targets).nonzero().flatten()
    truth, predicted_classes = targets.tolist(), predicted.tolist()
    high, wide = (size + GAP for size in pictures.shape[1:])
    sheet = torch.zeros(DOWN * high, ACROSS * wide)
    figure, (axes,) = canvas(1, 1, 5.4)
    figure.set_size_inches(7.4, 3.3)
    for index, row in enumerate(wrong[: ACROSS * DOWN].tolist()):
        top, left = index // ACROSS * high, index % ACROSS * wide
        sheet[top + GAP : top + high, left + GAP // 2 : left + wide - GAP // 2] = pictures[row]
        name = f"{classes[truth[row]]}, taken for {classes[predicted_classes[row]]}"
        axes.text(left + wide / 2, top + GAP - 2, name, fontsize=6.5, ha="center", va="bottom")
    axes.imshow(sheet.numpy(), cmap="gray_r", aspect="equal")
    axes.set_axis_off()
    share = 1 - len(wrong) / len(targets)
    axes.set_title(f"{len(wrong):,} of {len(targets):,} held-out pictures are wrong ({share:.1%} right)", fontsize=9)
    return png(figure)
