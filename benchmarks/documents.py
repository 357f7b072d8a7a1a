"""Answers about documents that no model has seen, with and without retrieval, and questions without an answer.

python benchmarks/documents.py [--model smollm2] [--seeds 1 2] [--json FILE]

The documents are synthetic: for each seed a generator writes 25 files about invented lighthouses, companies, festivals,
programs and bridges, with four invented facts each, and one question about each fact. 60 further questions have no
answer in them: 20 ask for a property that the document of a thing does not mention, 20 are about things of the same
kinds that no document is about, and 20 are of general knowledge. One half of each kind, drawn at random, chooses the
threshold of similarity: the highest that keeps 95% of the answerable questions. The figures are those of the other
half. Each seed has its own documents; the prompt was chosen on those of seed 0.

An answer has the fact if it contains its number or name as a word. A citation is right if its lines include the line
of the fact. A question without an answer has a false answer unless the answer says that it is not known. Decoding is
greedy.
"""

import argparse
import random
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _results import publish, share_of, typed, usual

from keifu import checkpoints, generate
from keifu.inference.chat.citations import Citer
from keifu.inference.chat.documents import NOT_FOUND, Grounding, Retriever, SearchedFolder

SECTION = "Answers from documents"
TOKENS = 48  # of an answer, at most
UNKNOWN = re.compile(
    r"not (in|mention|state|specif|provide|know|contain|sure|given|include|aware|able)|"
    r"n't (know|have|mention|say|find)|no (information|mention|answer|record|specific)|unknown|unable|cannot|can't",
    re.IGNORECASE,
)
# by kind: (what a document says, how a question asks for it, what kind of value it is)
FACTS: dict[str, list[tuple[str, str, str]]] = {
    "lighthouse": [
        ("The lamp of {name} was first lit in {value}.", "In which year was the lamp of {name} first lit?", "year"),
        ("{name} rises {value} metres above the sea.", "How tall is {name}, in metres?", "number"),
        ("Its keeper for most of that time was {value}.", "Who was the keeper of {name}?", "person"),
        ("The tower is painted {value}.", "What colour is {name} painted?", "colour"),
    ],
    "company": [
        ("{name} was founded by {value}.", "Who founded the company {name}?", "person"),
        ("It employs {value} people.", "How many people work at {name}?", "number"),
        ("Its head office is in the town of {value}.", "In which town is the head office of {name}?", "place"),
        ("{name} began to trade in {value}.", "When did {name} begin to trade?", "year"),
    ],
    "festival": [
        ("The {name} festival takes place in {value}.", "In which town is the {name} festival held?", "place"),
        ("It lasts {value} days.", "How many days does the {name} festival last?", "small"),
        ("A {value} lantern is carried at its head.", "Which colour is the lantern of the {name} festival?", "colour"),
        ("It was held for the first time in {value}.", "In what year was the first {name} festival?", "year"),
    ],
    "program": [
        ("{name} listens on port {value} by default.", "What is the default port of the program {name}?", "number"),
        ("The author of {name} is {value}.", "Who wrote the program {name}?", "person"),
        ("A request is given up after {value} seconds.", "After how many seconds does {name} give up?", "small"),
        ("Version one of it appeared in {value}.", "In which year did version one of {name} appear?", "year"),
    ],
    "bridge": [
        ("The bridge {name} spans the river {value}.", "Which river does the bridge {name} cross?", "place"),
        ("It is {value} metres long.", "How long is the bridge {name}, in metres?", "number"),
        ("The engineer was {value}.", "Who was the engineer of the bridge {name}?", "person"),
        ("Traffic has used {name} since {value}.", "Since which year has traffic used the bridge {name}?", "year"),
    ],
}
MISSING = {  # properties that no document mentions
    "lighthouse": "How many steps does the staircase of {name} have?",
    "company": "What was the profit of {name} last year?",
    "festival": "How much is a ticket for the {name} festival?",
    "program": "In which programming language is {name} written?",
    "bridge": "How much did it cost to build the bridge {name}?",
}
FILLER = {
    "lighthouse": "Ships that come from the north see the light before the coast. Visitors climb the stairs in summer.",
    "company": "The firm makes parts for clocks and sells them through small shops. It has never advertised.",
    "festival": "Families cook together on the first evening, and the streets are closed to cars. Children sing.",
    "program": "It copies files between machines and keeps a log of what it did. The configuration is a text file.",
    "bridge": "In winter the deck is salted twice a day. Cyclists have a lane of their own on the south side.",
}
GENERAL = [
    "What is the capital of France?", "How many legs does a spider have?", "Who wrote Romeo and Juliet?",
    "What gas do plants take in?", "Which planet is closest to the sun?", "How do I boil an egg?",
    "What is the square root of 144?", "In which country is Mount Fuji?", "Who painted the Mona Lisa?",
    "What language do people speak in Brazil?", "How many minutes are in an hour?",
    "What is the freezing point of water?",
    "What is a prime number?", "Which animal is called the king of the jungle?", "What is the largest ocean?",
    "How many strings does a violin have?", "What is bread made of?", "Who was the first person on the moon?",
    "What do bees make?", "Which metal is liquid at room temperature?",
]  # fmt: skip
SYLLABLES = [
    "bra", "dor", "fen", "gal", "hes", "ivo", "jun", "kel", "lor", "mav", "nim", "ost", "pel", "qua", "rith", "sol",
    "tav", "ul", "ver", "wex", "yar", "zin",
]  # fmt: skip
COLOURS = ["crimson", "turquoise", "ochre", "violet", "silver", "emerald", "amber", "ivory"]


@dataclass(frozen=True)
class Question:
    """Question about the documents. answer: the fact; "" if there is none. file, line: of the fact."""

    text: str
    kind: str
    answer: str = ""
    file: str = ""
    line: int = 0


def name_of(draw: random.Random) -> str:
    """Return an invented name."""
    return "".join(draw.sample(SYLLABLES, 3)).capitalize()


def value_of(sort: str, draw: random.Random) -> str:
    """Return an invented value of this sort."""
    values = {
        "year": lambda: str(draw.randint(1780, 2015)),
        "number": lambda: str(draw.randint(21, 989)),
        "small": lambda: str(draw.randint(3, 19)),
        "person": lambda: f"{name_of(draw)} {name_of(draw)}",
        "place": lambda: name_of(draw),
        "colour": lambda: draw.choice(COLOURS),
    }
    return values[sort]()


def write_documents(folder: Path, seed: int) -> list[Question]:
    """Write the documents into a folder. Return the questions: answerable ones, then the three kinds of others."""
    draw, asked = random.Random(seed), list[Question]()
    missing, absent = list[Question](), list[Question]()
    for number in range(25):
        kind = [*FACTS][number % len(FACTS)]
        name, file = name_of(draw), f"{kind}-{number // len(FACTS) + 1}.{('md', 'txt')[number % 2]}"
        lines = [f"# {name}" if file.endswith(".md") else name, "", f"{name} is a {kind}.", FILLER[kind], ""]
        for index, (statement, question, sort) in enumerate(FACTS[kind]):
            value = value_of(sort, draw)
            lines += [statement.format(name=name, value=value), *([FILLER[kind], ""] if index % 2 else [])]
            line = len(lines) - (2 if index % 2 else 0)
            asked.append(Question(question.format(name=name), "answerable", value, file, line))
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        if number < 20:
            missing.append(Question(MISSING[kind].format(name=name), "missing property"))
            strange = FACTS[kind][draw.randrange(4)][1].format(name=name_of(draw))
            absent.append(Question(strange, "unknown thing"))
    return asked + missing + absent + [Question(text, "general knowledge") for text in GENERAL]


def has_fact(answer: str, fact: str) -> bool:
    """Return whether an answer contains a fact as a word."""
    return bool(re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", answer.replace(",", ""), re.IGNORECASE))


def includes(passage: Any, question: Question) -> bool:
    """Return whether a passage includes the line of a question's fact."""
    return passage.file == question.file and passage.line <= question.line <= passage.last_line


def chosen_threshold(similarities: Sequence[float]) -> float:
    """Return the highest threshold, in hundredths, that keeps 95% of these answerable questions."""
    least = 0.95 * len(similarities)
    return max(n / 100 for n in range(101) if sum(value >= n / 100 for value in similarities) >= least)


def cited(answer: str, grounding: Grounding) -> list[Any]:
    """Return the passages that an answer cites."""
    citer = Citer(grounding.passages)
    citer.push(answer, True)
    return [citation.excerpt for citation in citer.citations]


def row_of(name: str, held: Sequence[dict[str, Any]], column: str, cites: str = "") -> list[str]:
    """Return the table's row of one way to answer. column: the items' field of the answer, cites: of its citations."""
    known = [item for item in held if item["kind"] == "answerable"]
    others = [item for item in held if item["kind"] != "answerable"]
    right = sum(has_fact(item[column], item["answer"]) for item in known)
    false = sum(not UNKNOWN.search(item[column]) for item in others)
    flags = [flag for item in known for flag in item[cites]] if cites else []
    precision = share_of(sum(flags), len(flags)) if flags else "-"
    return [name, share_of(right, len(known)), precision, share_of(false, len(others))]


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    retriever = Retriever(checkpoints.load("minilm"), least_similarity=-1.0)
    questions, groundings, choosing = list[Question](), list[Grounding](), list[bool]()
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as directory:
            asked = write_documents(Path(directory), seed)
            searched = SearchedFolder(Path(directory), retriever, "minilm", print)
            questions += asked
            groundings += [searched.ground(question.text) for question in asked]
        for kind in dict.fromkeys(question.kind for question in asked):
            count = sum(question.kind == kind for question in asked)
            halves = [True, False] * (count // 2)
            random.Random(seed).shuffle(halves)
            choosing += halves
    answerable = [question.kind == "answerable" for question in questions]
    similarities = [round(grounding.similarity, 4) for grounding in groundings]
    known = [value for value, *sides in zip(similarities, answerable, choosing, strict=True) if all(sides)]
    threshold = chosen_threshold(known)
    print(f"threshold {threshold}", flush=True)
    model, tokenizer = checkpoints.load(options.model, weights="own")
    items: list[dict[str, Any]] = [
        vars(question) | {"similarity": value} for question, value in zip(questions, similarities, strict=True)
    ]
    held = [index for index, side in enumerate(choosing) if not side]
    prompts = {
        "without": [questions[index].text for index in held],
        "with": [groundings[index].prompt(questions[index].text) for index in held],
    }
    for column, texts in prompts.items():
        begun = time.perf_counter()
        answers = generate(model, tokenizer, texts, temperature=0.0, max_tokens=TOKENS)
        print(f"{column}: {(time.perf_counter() - begun) / len(texts):.2f} s for each answer", flush=True)
        for index, answer in zip(held, answers, strict=True):
            items[index][column] = answer
    for index in held:
        found, item = groundings[index].passages, items[index]
        item["found"] = [passage.source for passage in found]
        item["has fact"] = [includes(passage, questions[index]) for passage in found]
        item["cited"] = [includes(each, questions[index]) for each in cited(str(item["with"]), groundings[index])]
        below = item["similarity"] < threshold
        item["final"] = NOT_FOUND if below else item["with"]
        item["cited in answer"] = [] if below else item["cited"]
    report(options, parser, threshold, items, [items[index] for index in held])


def report(
    options: Any, parser: Any, threshold: float, items: list[dict[str, Any]], held: list[dict[str, Any]]
) -> None:
    """Print and write the table of the held-out half."""
    rows = [
        row_of("without documents", held, "without"),
        row_of("with the three nearest passages", held, "with", "cited"),
        row_of(f"the same, and no answer below {threshold:.2f}", held, "final", "cited in answer"),
    ]
    known = [item for item in held if item["kind"] == "answerable"]
    for count in (1, 3):
        right = sum(any(item["has fact"][:count]) for item in known)
        rows.append([f"fact in the nearest {count} passages", share_of(right, len(known)), "-", "-"])
    kinds = dict.fromkeys(item["kind"] for item in held if item["kind"] != "answerable")
    for kind in kinds:
        group = [item for item in held if item["kind"] == kind]
        false = [sum(not UNKNOWN.search(item[column]) for item in group) for column in ("without", "with", "final")]
        print(f"{kind}: {false} false answers to {len(group)} questions")
    columns = ["answers", "contain the fact", "right citations", "false answers without an answer"]
    values = {"threshold": threshold, "items": items}
    publish(options.json, SECTION, typed("documents.py", vars(options), usual(parser)), columns, rows, values)


if __name__ == "__main__":
    main()
