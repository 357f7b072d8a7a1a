"""Classification from few labels: logistic regression on a frozen encoder's embeddings.

With a few hundred labels this is better than fine-tuning, and it takes seconds (docs/results/sentences.md). The saved
model is the encoder with the regression as its head, for `keifu classify` and `keifu embed`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from keifu import checkpoints
from keifu.data.classification.tables import Examples
from keifu.evaluation.classification import classifiers, embeddings, metrics
from keifu.models import bert
from keifu.recipes.classification.logistic_regression import Regression, fit_best
from keifu.recipes.classification.table_runs import LEAST_CUT, TableOptions, check_cut
from keifu.training.run.report import write_page


def learn(recipe: TableOptions, training: Examples, unseen: Examples, out: Path) -> metrics.Confusion | None:
    """Fit the regression, save the model into `out` with a report, and print the figures. Return the confusion matrix
    of held-out rows, if there are any."""
    model, tokenizer = checkpoints.load(recipe.model, torch.float32)
    config = embeddings.encoder(model).config
    check_cut(recipe.cut, LEAST_CUT, config.context_length)
    limit = recipe.cut or config.context_length
    rows, shortened = embeddings.encode_texts(tokenizer, training.texts, limit, recipe.cut is not None)
    print(f"Computing the embeddings of {len(training):,} texts ...", flush=True)
    inputs = embeddings.embed_rows(model, rows, tokenizer.pad_id or 0).cpu()
    labels = training.classes
    numbers = {label: number for number, label in enumerate(labels)}
    targets = torch.tensor([numbers[label] for label in training.labels])
    regression = fit_best(inputs, targets, len(labels))
    classifier = with_regression(model, config, labels, regression)
    checkpoints.save(classifier, tokenizer, out)
    tested = confusion(classifier, tokenizer, unseen, recipe) if len(unseen) else None
    text = sentence(len(training), regression, tested)
    facts = {
        "encoder": recipe.model, "data": recipe.data, "rows": len(training), "held out": len(unseen), "cut": shortened,
        "strength C": regression.strength, "cross-validated accuracy": regression.accuracy,
    }  # fmt: skip
    pictures = {} if tested is None else {"confusion": tested.picture()}
    title = f"Logistic regression on frozen embeddings learns “{Path(recipe.data).stem}”"
    write_page(out, title, text, facts, pictures, "" if tested is None else tested.page())
    print(text)
    return tested


def with_regression(model: Any, config: bert.Config, labels: tuple[str, ...], regression: Regression) -> bert.Bert:
    """Return the encoder with the regression as its classification head."""
    without = replace(config, labels=(), sentence_head=False)
    heads: dict[str, Any] = {"labels": labels, "sentence_head": True, "words": False, "next_sentence": False}
    classifier = bert.with_heads(model, without, pooled=False, **heads)
    assert classifier.sentence_head is not None
    with torch.no_grad():
        classifier.sentence_head.project.weight.copy_(regression.weight)
        classifier.sentence_head.project.bias.copy_(regression.bias)
    return classifier


def confusion(model: bert.Bert, tokenizer: Any, validation: Examples, recipe: TableOptions) -> metrics.Confusion:
    """Return the confusion matrix of held-out rows, computed like `keifu classify --on`."""
    judge = classifiers.text_classifier(model, tokenizer)
    rows, _ = judge.read(validation, recipe.cut or judge.limit, recipe.cut is not None)
    return judge.confusion(validation, judge.predict_proba(rows))


def sentence(rows: int, regression: Regression, tested: metrics.Confusion | None) -> str:
    """Describe the accuracy in cross-validation, and on held-out rows if there are any, in a sentence."""
    first = (
        f"Cross-validation on the {rows:,} training rows: accuracy {regression.accuracy:.1%} (strength C = "
        f"{regression.strength:g}, chosen there)."
    )
    return first if tested is None else f"{first}\nOn held-out texts: {tested.verdict()}"
