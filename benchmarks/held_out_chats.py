"""Bits per byte of the answers in held-out conversations, for chat models with any tokenizer.

python benchmarks/held_out_chats.py MODEL [MODEL ...] --data FILE.jsonl [--json] [--write JSON]
python benchmarks/held_out_chats.py --split TRAINING.jsonl --data FILE.jsonl [--held-out 0.05] [--most 300]

Each model reads each conversation in its chat template, a base model in keifu's plain one, in float32. A figure is the
information of the assistant's tokens, including the ends of its turns, per byte of its text in UTF-8. Conversations
that exceed the context of any model are left out for all. Intervals resample conversations. --write puts the table, and
the bits of each conversation, into a data file of docs/results/data.

--split writes the conversations that `keifu train distill --data TRAINING.jsonl` holds out: their first questions are
not in training, and each is written once; at most --most, evenly spaced.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import write_table
from _rounds import machine

from keifu import checkpoints
from keifu.data.chat import conversations
from keifu.data.chat.conversations import Conversation
from keifu.inference.text.likelihood import score
from keifu.recipes.assistant.finetuning import with_template
from keifu.recipes.assistant.sft import select_conversations, split

SECTION = "Held-out conversations"
COLUMNS = ("model", "bits per byte of answers", "95% interval")


def bits(name: str, chats: Sequence[Conversation]) -> dict[int, float]:
    """Return by index the bits of the assistant's turns of each conversation that fits the context."""
    model: Any
    model, tokenizer = checkpoints.load(name, torch.float32)
    tokenizer, found = with_template(tokenizer, "own"), dict[int, float]()
    for number, chat in enumerate(chats):
        ids, learned = tokenizer.render_turns(chat)
        if len(ids) <= model.config.context_length:
            values = score(model, torch.tensor([ids]))[0].double()
            found[number] = round(-float(values[torch.tensor(learned[1:])].sum()) / math.log(2), 2)
    return found


def size(chat: Conversation) -> int:
    """Return the bytes of the assistant's turns."""
    return sum(len(message["content"].encode()) for message in chat if message["role"] == "assistant")


def interval(values: Sequence[float], sizes: Sequence[int], resamples: int = 1000) -> tuple[float, float]:
    """Return the 95% percentile interval of a ratio of sums, by resampling the items with a fixed seed."""
    above, below = np.asarray(values), np.asarray(sizes)
    generator = np.random.default_rng(0)
    chosen = (generator.integers(0, len(above), len(above)) for _ in range(resamples))
    low, high = np.percentile([above[some].sum() / below[some].sum() for some in chosen], [2.5, 97.5])
    return float(low), float(high)


def figures(measured: Mapping[str, Sequence[float]], sizes: Sequence[int]) -> dict[str, Any]:
    """Return the first model's figures, then those of the others with their names."""
    found: dict[str, Any] = {}
    for index, (name, values) in enumerate(measured.items()):
        low, high = interval(values, sizes)
        label = f"bits per byte{f' of {name}' if index else ''}"
        found |= {label: round(sum(values) / sum(sizes), 4), f"{label}, 95% interval": f"{low:.4f} to {high:.4f}"}
    return found | {"conversations": len(sizes), "bytes": sum(sizes)}


def rows(measured: Mapping[str, Sequence[float]], sizes: Sequence[int]) -> list[list[str]]:
    """Return a row of the table for each model."""
    found = [(name, figures({name: values}, sizes)) for name, values in measured.items()]
    return [[name, f"{each['bits per byte']:.4f}", each["bits per byte, 95% interval"]] for name, each in found]


def measure(models: Sequence[str], data: str) -> tuple[dict[str, list[float]], list[int]]:
    """Return for each model the bits of each conversation; and the bytes of each conversation."""
    chats = list(conversations.read(data))
    measured = {name: bits(name, chats) for name in models}
    read = sorted(set[int].intersection(*map(set, measured.values())))
    kept = {name: [values[number] for number in read] for name, values in measured.items()}
    return kept, [size(chats[number]) for number in read]


def write_held_out(source: str, share: float, most: int, path: Path) -> None:
    """Write the conversations that training on a file holds out, one for each first question."""
    unseen = {chat[0]["content"]: chat for chat in split(list(conversations.read(source)), share)[1]}
    chats = select_conversations([*unseen.values()], most)
    lines = (json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path} has {len(chats):,} conversations.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--data", type=Path, required=True, help="held-out conversations, as JSON lines")
    parser.add_argument("--split", help="the training data, whose held-out part is written to --data")
    parser.add_argument("--held-out", type=float, default=0.05, help="share that is held out of the training data")
    parser.add_argument("--most", type=int, default=300, help="conversations that are written")
    parser.add_argument("--json", action="store_true", help="print only the figures, as JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.split:
        return write_held_out(options.split, options.held_out, options.most, options.data)
    measured, sizes = measure(options.models, str(options.data))
    found = figures(measured, sizes)
    if options.write:
        command = f"python benchmarks/held_out_chats.py {' '.join(options.models)} --data {options.data}"
        write_table(options.write, SECTION, command, COLUMNS, rows(measured, sizes), {"bytes": sizes, **measured})
    if options.json:
        print(json.dumps(found))
    else:
        print(machine(), *(f"{name}: {value}" for name, value in found.items()), sep="\n")


if __name__ == "__main__":
    main()
