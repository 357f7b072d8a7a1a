"""Conversations as a model will learn them, with what it learns of them in colour; knows no training."""

import json
import sys
from itertools import groupby
from pathlib import Path

from keifu.errors import UserError

LEARNED, ENDS = "bold green", "⟦⟧"  # on a terminal, and where there is no colour


def holds_conversations(source: str) -> bool:
    """Whether a source is one of conversations, not of pictures."""
    from keifu.data import conversations

    return source in conversations.names() or Path(source).suffix.lower() in (".json", ".jsonl")


def show(source: str, model: str, count: int, as_json: bool) -> None:
    """Prints the first conversations by the chat template of a model, and how much of all of them is learned.

    What is learned is in colour; where the output is no terminal it stands between ⟦ and ⟧.
    """
    from rich.console import Console
    from rich.text import Text

    from keifu.checkpoints.hub import locate
    from keifu.checkpoints.opening import open_source
    from keifu.data import conversations
    from keifu.recipes._assistant import templated

    found = open_source(locate(model)).tokenizer()
    if found is None:
        raise UserError(f"{model} has no tokenizer, so it reads no conversation: name another with --tokenizer.")
    tokenizer = templated(found, "own")
    talks, learned, total = list(conversations.read(source)), 0, 0
    console = Console(highlight=False, soft_wrap=True)
    for place, talk in enumerate(talks):
        ids, mask = tokenizer.render_turns(talk)
        learned, total = learned + sum(mask), total + len(ids)
        if place >= count:
            continue
        if as_json:
            print(json.dumps({"tokens": ids, "learned": mask}))
            continue
        text = Text()
        for own, run in groupby(zip(ids, mask, strict=True), lambda pair: pair[1]):
            piece = tokenizer.decode([token for token, _ in run], skip_special=False)
            marked = piece if console.is_terminal or not own else f"{ENDS[0]}{piece}{ENDS[1]}"
            text.append(marked, LEARNED if own else "dim")
        console.print(text, end="\n\n")
    whole = f"{len(talks):,} conversation{'s' * (len(talks) != 1)}, {total:,} tokens"
    told = f"{whole}, of which {learned:,} ({learned / max(1, total):.0%}) are learned."
    print(told, file=sys.stderr if as_json else sys.stdout)
