"""Evaluation of a masked language model: the share of masked words that it finds, and of sentence pairs it tells apart.

Masked as in its pretraining (Devlin et al., 2018, appendix A.2), on the documents that keifu holds out of a text.
"""

import math
from collections import defaultdict
from typing import Any, cast

import torch
from torch import nn

from keifu.data.progress import counting
from keifu.data.text.documents import TextFormat
from keifu.data.text.masked_lm import MaskedText, MaskingScheme, MaskingVocabulary
from keifu.data.text.sentence_shards import prepare_sentences
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.evaluation.registry import EvalRequest, EvalResult
from keifu.evaluation.text.perplexity import accepts, names
from keifu.generation.text.model import Encoder, device_of, evaluation_mode
from keifu.generation.text.translation import sentences
from keifu.training.objectives.language_modeling import masked_language_modeling

__all__ = ["ABOUT", "OPTIONS", "accepts", "evaluate", "names", "takes"]
ABOUT = "a masked language model on a text: words and sentence pairs that it tells"
OPTIONS = {"batch_size", "text_field", "encoding"}
ROWS = 1024


def takes(model: nn.Module) -> bool:
    """Whether it fills in masked words."""
    return isinstance(model, Encoder) and model.config.words


@torch.inference_mode()
def evaluate(model: nn.Module, tokenizer: Tokenizer, request: EvalRequest) -> EvalResult:
    """The figures on rows spread over the held-out documents, with masks that are always the same."""
    config, device = cast(Any, model).config, device_of(model)
    shards = prepare_sentences(request.on, tokenizer, sentences, form=TextFormat(request.text_field, request.encoding))
    masking = MaskingScheme(min(128, config.context_length), sentence_pairs=config.next_sentence)
    size, most = request.batch_size or 32, request.limit or ROWS
    batches = [*MaskedText(shards, MaskingVocabulary.of(tokenizer), masking, size, validation_rows=most).validation()]
    sums: dict[str, float] = defaultdict(float)
    with evaluation_mode(model), counting("Evaluating", len(batches), "batches") as progress:
        for done, batch in enumerate(batches, 1):
            output = masked_language_modeling(model, {name: each.to(device) for name, each in batch.items()})
            for name, value in {"tokens": output.weight, **output.figures}.items():
                sums[name] += float(value)
            progress(done)
    found = {name: value / sums["tokens"] for name, value in sums.items()}
    figures = {
        "masked words right": round(found["word_accuracy"], 4),
        "perplexity of masked words": round(math.exp(min(found["word_loss"], 700)), 3),
        "masked words": sum(int((batch["targets"] >= 0).sum()) for batch in batches),
    }
    if masking.sentence_pairs:
        figures["sentence pairs right"] = round(found["pair_accuracy"], 4)
    rows = sum(len(batch["tokens"]) for batch in batches)
    note = f"{rows:,} rows of at most {masking.length} tokens, of the documents of {request.on} that keifu holds out."
    return EvalResult(figures, (note,))
