"""A student with the layers of one model and the tokens of another, its teacher, for distillation from the teacher.

python benchmarks/student.py --data FILE.jsonl --out DIR [--body gpt-en] [--teacher smollm2] [--vocabulary 6000]

Forward and reverse KL need a student with its teacher's tokens. The student's tokenizer keeps the teacher's merges
whose tokens are most frequent in the conversations of FILE, and the teacher's chat template. A token's embedding begins
as the mean of the body's embeddings of the tokens of the same text, so that the body's layers can use it.
"""

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from keifu import checkpoints
from keifu.data.chat import conversations
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.recipes.distilling import prune


@torch.no_grad()
def with_tokens(body: Any, tokenizer: Tokenizer, tokens: Tokenizer) -> Any:
    """Return the body, changed in place, with embeddings of these tokens and no separate head."""
    rows = body.embedding.weight
    texts = [tokens.decode([id]) for id in range(tokens.vocab_size)]
    pieces = [[] if "\ufffd" in text else tokenizer.encode(text) for text in texts]
    means = [rows[ids].mean(0) if ids else rows.mean(0) for ids in pieces]
    body.embedding = nn.Embedding(len(means), rows.shape[1], dtype=rows.dtype)
    body.embedding.weight.copy_(torch.stack(means))
    body.config = replace(body.config, vocab_size=len(means))
    return body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="conversations, as keifu train sft reads them")
    parser.add_argument("--body", default="gpt-en", help="model whose layers the student has, with a tied head")
    parser.add_argument("--teacher", default="smollm2", help="model whose tokens the student has")
    parser.add_argument("--vocabulary", type=int, default=6000, help="merges of the teacher's tokenizer that stay")
    parser.add_argument("--out", type=Path, required=True, help="folder of the student")
    options = parser.parse_args()
    teacher, tokens = checkpoints.load(options.teacher)
    uses = Counter(id for chat in conversations.read(options.data) for id in tokens.render_turns(chat)[0])
    _, tokens = prune(teacher, tokens, None, options.vocabulary, uses)
    loaded: Any = checkpoints.load(options.body)
    body, tokenizer = loaded
    if not body.config.tied:
        raise SystemExit(f"{options.body} has a head of its own: give a model whose head is its embedding.")
    student = with_tokens(body, tokenizer, tokens)
    checkpoints.save(student, tokens, options.out)
    count = sum(weights.numel() for weights in student.parameters()) / 1e6
    print(f"{options.out} has {count:.1f} M parameters and {tokens.vocab_size:,} tokens.")


if __name__ == "__main__":
    main()
