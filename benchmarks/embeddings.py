"""Sentence embeddings per second of MiniLM, compared with sentence-transformers and transformers on the same weights.

python benchmarks/embeddings.py [--dtype float32 bfloat16] [--rounds 5] [--sentences 2000] [--summaries 300]
    [--json FILE]

Two sets of real texts: everyday sentences (Tatoeba, median 7 words) and summaries of Wikipedia articles (about 100
tokens), evenly spaced, in their order. sentence-transformers has its defaults, batches of 32 sorted by length, except
that it may read 512 tokens, so that it cuts nothing. transformers runs as on the model's card: batches of 32 in the
given order, padded, the mean over the mask, normalised.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _results import typed, usual, write_timing
from _rounds import interleaved, machine
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from keifu import checkpoints
from keifu.data.catalogue import catalogue
from keifu.inference.embeddings.encoders import embed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Contenders = dict[str, Callable[[], Tensor]]
SECTION, BASE = "Sentence embeddings", "sentence-transformers"
SOURCES = {"sentences": "tatoeba-en", "summaries": "wiki-summaries"}


def contenders(texts: list[str], dtype: torch.dtype) -> Contenders:
    """Return for each contender a function that embeds the same sentences in the same dtype."""
    path = str(catalogue.fetch("minilm"))
    transformer = Transformer(path, max_seq_length=512, model_kwargs={"dtype": dtype})
    packaged = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension()), Normalize()], device="cpu"
    )
    theirs, tokens = AutoModel.from_pretrained(path, dtype=dtype).eval(), AutoTokenizer.from_pretrained(path)
    ours, tokenizer = checkpoints.load("minilm", dtype)

    @torch.inference_mode()
    def as_on_the_card() -> Tensor:
        parts = []
        for start in range(0, len(texts), 32):
            batch = tokens(
                texts[start : start + 32], padding=True, truncation=True, max_length=512, return_tensors="pt"
            )
            mask = batch["attention_mask"][..., None].to(dtype)
            hidden = theirs(**batch).last_hidden_state
            parts.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
        return torch.cat(parts)

    return {
        BASE: lambda: packaged.encode(texts, convert_to_tensor=True, show_progress_bar=False),
        "transformers": as_on_the_card,
        "keifu": lambda: embed(ours, tokenizer, texts),
    }


def spread(name: str, count: int) -> list[str]:
    """Return this many texts of a catalogue entry, evenly spaced."""
    documents = list(catalogue.documents(name))
    return [documents[place * len(documents) // count] for place in range(count)]


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=[*DTYPES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--summaries", type=int, default=300)
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    print(f"{machine()}; all-MiniLM-L6-v2, {options.rounds} interleaved rounds")
    tasks = dict[str, dict[str, Any]]()
    for kind, source in SOURCES.items():
        count = getattr(options, kind)
        texts = spread(source, count)
        for name in options.dtype:
            running = contenders(texts, DTYPES[name])
            vectors = {who: work().float() for who, work in running.items()}
            apart = float((vectors["keifu"] - vectors[BASE]).abs().max())
            print(f"{count} {kind}, {name}; largest difference from {BASE} {apart:.1e}", flush=True)
            tasks[f"{kind}, {name}"] = {"amount": count, "seconds": interleaved(running, options.rounds)}
    values = {"tasks": tasks, "a row": "task", "against": {"keifu": [BASE]}}
    columns = [f"texts/s; keifu: ratio to {BASE}", BASE, "transformers", "keifu"]
    write_timing(options.json, SECTION, typed("embeddings.py", vars(options), usual(parser)), columns, values)


if __name__ == "__main__":
    main()
