"""Short answers for a small student: the first sentences of each answer in a file of conversations.

python benchmarks/shortened.py --data FILE.jsonl --out FILE.jsonl [--sentences 2] [--story-sentences 5]

A model of few parameters loses the thread of a long answer. An answer keeps the first sentences of its first paragraph;
an answer to a turn with the word "story" or "poem" keeps more, of all paragraphs. A conversation ends before an answer
without a whole sentence, or with more than 700 characters.
"""

import argparse
import json
import re
from pathlib import Path

SENTENCE = re.compile(r"[^\W\d][.!?]['\"”]?(?=\s|$)")
LONGEST = 700  # characters of an answer


def first_sentences(text: str, count: int) -> str:
    """Return the first whole sentences of a text; "" if there are none."""
    ends = [match.end() for match in SENTENCE.finditer(text)][:count]
    return text[: ends[-1]].strip() if ends else ""


def shorten(messages: list[dict[str, str]], sentences: int, story_sentences: int) -> list[dict[str, str]]:
    """Return the turns with short answers, up to the first without one."""
    short: list[dict[str, str]] = []
    for asked, answered in zip(messages[::2], messages[1::2], strict=False):
        story = re.search(r"\b(story|poem)\b", asked["content"].lower())
        text = answered["content"] if story else answered["content"].partition("\n")[0]
        text = first_sentences(text, story_sentences if story else sentences)
        if not text or len(text) > LONGEST:
            break
        short += [asked, {**answered, "content": text}]
    return short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="lines of conversations, as teacher_texts.py writes them"
    )
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--sentences", type=int, default=2, help="most sentences of an answer")
    parser.add_argument("--story-sentences", type=int, default=5, help="most sentences of a story or a poem")
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.data.read_text(encoding="utf-8").split("\n") if line]
    short = [
        line | {"messages": kept}
        for line in lines
        if (kept := shorten(line["messages"], options.sentences, options.story_sentences))
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in short)
    options.out.write_text(text, encoding="utf-8")
    print(f"{options.out} has {len(short):,} of {len(lines):,} conversations.")


if __name__ == "__main__":
    main()
