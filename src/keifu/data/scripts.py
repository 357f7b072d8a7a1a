"""Which script a character is written in, for many characters at once; knows no text and no tokenizer."""

import numpy as np

_RANGES = (  # first and last code point of the blocks that are common in text, after the Unicode standard, Blocks.txt
    ("Latin", 0x41, 0x5A), ("Latin", 0x61, 0x7A), ("Latin", 0xAA, 0xAA), ("Latin", 0xBA, 0xBA), ("Latin", 0xC0, 0xD6),
    ("Latin", 0xD8, 0xF6), ("Latin", 0xF8, 0x2AF), ("Latin", 0x1E00, 0x1EFF), ("Latin", 0xFF21, 0xFF3A),
    ("Latin", 0xFF41, 0xFF5A), ("Greek", 0x370, 0x3FF), ("Greek", 0x1F00, 0x1FFF), ("Cyrillic", 0x400, 0x52F),
    ("Hebrew", 0x590, 0x5FF), ("Arabic", 0x600, 0x77F), ("Arabic", 0x8A0, 0x8FF), ("Arabic", 0xFB50, 0xFDFF),
    ("Arabic", 0xFE70, 0xFEFE), ("Indic", 0x900, 0xDFF), ("Thai", 0xE00, 0xE7F), ("Hangul", 0x1100, 0x11FF),
    ("Hangul", 0x3130, 0x318F), ("Hangul", 0xAC00, 0xD7AF), ("Hiragana", 0x3041, 0x309F), ("Katakana", 0x30A0, 0x30FF),
    ("Katakana", 0x31F0, 0x31FF), ("Katakana", 0xFF66, 0xFF9F), ("Han", 0x3005, 0x3007), ("Han", 0x3400, 0x4DBF),
    ("Han", 0x4E00, 0x9FFF), ("Han", 0xF900, 0xFAFF), ("Han", 0x20000, 0x323AF), ("emoji", 0x200D, 0x200D),
    ("emoji", 0x2600, 0x27BF), ("emoji", 0x2B00, 0x2BFF), ("emoji", 0xFE0F, 0xFE0F), ("emoji", 0x1F000, 0x1FAFF),
    ("common", 0x0, 0x40), ("common", 0x5B, 0x60), ("common", 0x7B, 0xA9), ("common", 0xAB, 0xB9),
    ("common", 0xBB, 0xBF), ("common", 0xD7, 0xD7), ("common", 0xF7, 0xF7), ("common", 0x2000, 0x200C),
    ("common", 0x200E, 0x25FF), ("common", 0x3000, 0x3004), ("common", 0x3008, 0x303F), ("common", 0xFF00, 0xFF20),
    ("common", 0xFF3B, 0xFF40), ("common", 0xFF5B, 0xFF65),
)  # fmt: skip
SCRIPTS = (*dict.fromkeys(name for name, *_ in _RANGES if name != "common"), "other", "common")
"""The names in the order of their numbers: "other" is any script that is not named, "common" spaces, digits, marks."""

_ORDERED = sorted((first, last, SCRIPTS.index(name)) for name, first, last in _RANGES)
_FIRST, _LAST, _SCRIPT = (np.array(column) for column in zip(*_ORDERED, strict=True))


def script_numbers(code_points: np.ndarray) -> np.ndarray:
    """The number in `SCRIPTS` of each code point's script."""
    place = np.searchsorted(_FIRST, code_points, side="right") - 1
    return np.where(code_points <= _LAST[place], _SCRIPT[place], SCRIPTS.index("other"))


def bytes_to_scripts(text: np.ndarray) -> np.ndarray:
    """The script number of the character that each byte of a UTF-8 text belongs to.

    A byte that belongs to no whole character counts as what its first byte's character would at least be.
    """
    text = text.astype(np.int64)
    starts = np.flatnonzero((text & 0xC0) != 0x80)
    if not len(starts) or starts[0]:
        starts = np.concatenate([[0], starts])
    lead = text[starts]
    length = 1 + (lead >= 0xC0) + (lead >= 0xE0) + (lead >= 0xF0)
    points = np.where(length == 1, lead & 0x7F, lead & (0xFF >> (length + 1)))
    for extra in range(1, 4):
        following = text[np.minimum(starts + extra, len(text) - 1)] & 0x3F
        points = np.where(length > extra, points << 6 | following, points)
    spans = np.diff(np.append(starts, len(text)))
    return np.repeat(script_numbers(points), spans)
