"""Which tokens of a text stand between marks, exact to the token; knows no template and not who wrote what."""

import re
from itertools import pairwise

import tokenizers


def encode_turns(backend: tokenizers.Tokenizer, text: str, marks: str) -> tuple[list[int], list[bool]]:
    """The ids of a text without its marks, and of each id whether it stands between an opening mark and a closing one.

    A token counts that has a character inside, as in transformers' masks of assistant tokens.
    """
    pieces = re.split(f"[{re.escape(marks)}]", text)
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    spans = [span for number, span in enumerate(pairwise(ends)) if number % 2]
    encoding = backend.encode("".join(pieces), add_special_tokens=False)
    mask, turn = [], 0
    for start, end in encoding.offsets:
        start = min(start, end - 1)  # blank space may have been trimmed off until nothing was left
        while turn < len(spans) and start >= spans[turn][1]:
            turn += 1
        mask.append(turn < len(spans) and end > spans[turn][0])
    return encoding.ids, mask
