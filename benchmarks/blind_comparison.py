"""Blind comparison of chat models: a sheet of answers that hides their models, and the count of a judge's choices.

python benchmarks/blind_comparison.py FOLDER --models FIRST OTHER [OTHER ...] [--seed 0] [--temperature 0.6]
    [--max-tokens 200] [--weights own] [--prompts FILE.json]
python benchmarks/blind_comparison.py FOLDER --earlier [--seed 0]
python benchmarks/blind_comparison.py FOLDER --choices FILE --judge WORDS [--write JSON]

The first command asks 40 prompts: 20 conversations, 8 of them with a second question, 10 stories and 10 questions with
a known answer. `simple_chats.py` begins with none of them, nor with one within a word of them. FIRST is compared with
each OTHER, and answers anew for each, so that no answer is on the sheet twice. A base model reads "A: ...", line break,
"B:", the format of keifu's conversation texts, and stops where the next turn begins. FOLDER/sheet.md shows the items in
random order with random sides; FOLDER/key.json has the models. The judge reads only the sheet, and writes FILE: a line
for each item, such as `12 A`, `13 B` or `14 tie`.

--prompts asks others, such as docs/results/data/fresh-prompts.json. A language model wrote them that had read neither
the first 40 nor any training data; it knew the subjects of the 40, to choose others. Whoever chose the training data
had not read them.

--earlier asks nothing: the sheet has chat-en's answers of docs/results/data, next to those of the weights before, to
all prompts that gpt-en answered too.

The last command counts. A share is of all items, so a tie is not a success; its interval is Wilson's. --write puts
the table into a data file of docs/results/data, and all answers and choices next to it.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _results import print_rows, share_of, write_items, write_table
from _rounds import machine

from keifu import checkpoints
from keifu.evaluation.pairwise import a_is_left, seed_of
from keifu.inference.text.generate import generate_batch
from keifu.inference.text.sampling_params import SamplingParams

SECTION, ANSWERS = "Blind comparison", "blind-comparison.json"
FRESH, FRESH_ANSWERS = "Blind comparison on fresh prompts", "fresh-comparison.json"
EARLIER, EARLIER_ANSWERS = "Blind comparison with earlier weights", "chat-en-weights.json"
NEW_AND_EARLIER = ["new", "earlier"]
DATA = Path(__file__).parents[1] / "docs/results/data"
COLUMNS = ("compared with", "items", "better", "worse", "equal", "better of all, 95% interval")
NEXT_TURN = "\nA:"
BASE = """{{ bos_token }}{% for message in messages %}
{{ 'A' if message['role'] == 'user' else 'B' }}: {{ message['content'] }}
{% endfor %}B:"""  # the chat template of a base model
PROMPTS = {  # the user's turns
    "conversation": [
        ["Hey, how is your day going?"],
        ["I just moved to a new town and I don't know anybody."],
        ["My grandmother is visiting us this weekend!"],
        ["I can't find my glasses anywhere."],
        ["I passed my driving test!"],
        ["I had a fight with my sister."],
        ["Could you cheer me up a little?"],
        ["What should I eat for breakfast?"],
        ["I'm nervous about my first day at work."],
        ["Do you ever get lonely?"],
        ["Can you recommend a game for a family evening?"],
        ["My neighbor is very loud at night."],
        ["Hi, I'm Anna.", "What is my name?"],
        ["I want to get a pet.", "I live in a small flat. Which one fits?"],
        ["Let's play a word game.", "You start."],
        ["Do you prefer tea or juice?", "Why do you prefer it?"],
        ["I'm planning a picnic.", "What should I bring?"],
        ["I started to learn the guitar.", "How often should I practice?"],
        ["My phone is broken.", "I cannot afford a new one."],
        ["Good night!", "Will you be here tomorrow?"],
    ],
    "story": [
        ["Write a short story about a turtle who collects shells."],
        ["Tell me a story about a lighthouse keeper and a lost seal."],
        ["Write a bedtime story about a little dragon who cannot sneeze."],
        ["Tell me a story about two brothers who share one umbrella."],
        ["Write a story about a snowman in the spring."],
        ["Write a short story about a postman on his last day of work."],
        ["Tell me a story about an elephant who paints."],
        ["Write a very short story about a lost balloon."],
        ["Tell me a story about a squirrel who forgets where the nuts are."],
        ['Write a short story that ends with the words "and they laughed."'],
    ],
    "question": [
        ["How many days does a week have?"],
        ["Which color do you get when you mix blue and yellow?"],
        ["Which animal says moo?"],
        ["What is the opposite of hot?"],
        ["Which is bigger, an ant or a horse?"],
        ["What do people use an umbrella for?"],
        ["What is the capital of Italy?"],
        ["Where do fish live?"],
        ["Which day comes after Tuesday?"],
        ["Why do people wear shoes?"],
    ],
}


def asked(turns: Sequence[str]) -> list[dict[str, str]]:
    """Return the user's messages."""
    return [{"role": "user", "content": text} for text in turns]


def answers(name: str, against: str, prompts: Sequence[Sequence[str]], options: argparse.Namespace) -> list[list[str]]:
    """Return a model's answers to the turns of each prompt. "[...]" marks answers cut by --max-tokens."""
    model, tokenizer = checkpoints.load(name, weights=options.weights)
    stop = () if tokenizer.chat_template else (NEXT_TURN,)
    tokenizer = tokenizer.with_chat_template(tokenizer.chat_template or BASE)
    talks: list[list[dict[str, str]]] = [[] for _ in prompts]
    for turn in range(max(map(len, prompts))):
        open_talks = [(turns, talk) for turns, talk in zip(prompts, talks, strict=True) if turn < len(turns)]
        for turns, talk in open_talks:
            talk += asked(turns[turn : turn + 1])
        drawn: dict[str, Any] = {"temperature": options.temperature, "top_p": 0.95, "max_tokens": options.max_tokens}
        seeds = [seed_of(options.seed, asked(turns), f"{name} {against} {turn}") for turns, _ in open_talks]
        how = [SamplingParams(seed=seed, stop=stop, **drawn) for seed in seeds]
        done = generate_batch(model, tokenizer, [tokenizer.render_chat(talk) for _, talk in open_talks], how)
        for (_, talk), answer in zip(open_talks, done, strict=True):
            cut = " [...]" if answer.finish_reason == "length" else ""
            talk.append({"role": "assistant", "content": answer.text.strip() + cut})
    return [[message["content"] for message in talk[1::2]] for talk in talks]


def pair_up(other: str, options: argparse.Namespace) -> list[dict]:
    """Return an item for each prompt: its kind and turns, the models of A and B, and their answers."""
    asks = json.loads(options.prompts.read_text(encoding="utf-8")) if options.prompts else PROMPTS
    kinds = [(kind, turns) for kind, several in asks.items() for turns in several]
    first, prompts = options.models[0], [turns for _, turns in kinds]
    ours, theirs = answers(first, other, prompts, options), answers(other, first, prompts, options)
    items = []
    for (kind, turns), mine, its in zip(kinds, ours, theirs, strict=True):
        sides = [(options.models[0], mine), (other, its)]
        if not a_is_left(options.seed, [*asked(turns), {"role": "other", "content": other}]):
            sides.reverse()
        (a, first), (b, second) = sides
        items.append({"kind": kind, "turns": turns, "A": a, "B": b, "answers": {"A": first, "B": second}})
    return items


def answers_of(file: str) -> dict[tuple[str, ...], dict[str, Any]]:
    """Return by turns the kind and chat-en's answers of each item of a data file in which gpt-en is the other."""
    found = {}
    for item in json.loads((DATA / file).read_text(encoding="utf-8"))["items"]:
        sides = {item[side]: side for side in "AB"}
        if "gpt-en" in sides:
            found[tuple(item["turns"])] = {"kind": item["kind"], "answers": item["answers"][sides["chat-en"]]}
    return found


def with_earlier(drawn: random.Random) -> list[dict]:
    """Return an item for each prompt: chat-en's answers of the data files, and those of the weights before."""
    items = []
    for file in (FRESH_ANSWERS, ANSWERS):
        new = answers_of(file)
        for turns, earlier in answers_of(file.replace(".json", "-before.json")).items():
            sides = [("earlier", earlier["answers"]), ("new", new[turns]["answers"])]
            drawn.shuffle(sides)
            (a, first), (b, second) = sides
            answers = {"A": first, "B": second}
            items.append({"kind": earlier["kind"], "turns": [*turns], "A": a, "B": b, "answers": answers})
    return items


def sheet(items: Iterable[Mapping[str, Any]]) -> str:
    """Return the items as Markdown, without their models."""
    lines = ["# Which answer is better: A, B or tie?"]
    for item in items:
        lines.append(f"## {item['item']}")
        for side in "AB":
            lines.append(f"### {item['item']} {side}")
            for turn, answer in zip(item["turns"], item["answers"][side], strict=True):
                lines += [f"**User:** {turn}", "\n".join(f"> {line}" for line in (answer or "(nothing)").split("\n"))]
    return "\n\n".join(lines) + "\n"


def write_sheet(options: argparse.Namespace) -> None:
    """Let all models answer, or read their answers. Write the sheet and its key."""
    drawn, items = random.Random(options.seed), list[dict]()
    if options.earlier:
        options.models, items = NEW_AND_EARLIER, with_earlier(drawn)
    else:
        first, *others = options.models
        for other in others:
            items += pair_up(other, options)
            print(f"{first} and {other} have answered {len(items)} prompts.", flush=True)
    drawn.shuffle(items)
    items = [{"item": number, **item} for number, item in enumerate(items, 1)]
    given = {name: vars(options)[name] for name in ("models", "seed", "temperature", "max_tokens", "weights")}
    if options.prompts:
        given["prompts"] = options.prompts.name
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "sheet.md").write_text(sheet(items), encoding="utf-8")
    write_items(options.folder / "key.json", given, items)


def read_choices(path: Path, count: int) -> dict[int, str]:
    """Return the choice of each item. Raises an error for a line that is not a choice, and for an item with none or
    two."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = [line for line in lines if not re.fullmatch(r"\s*\d+\s+(A|B|tie)\s*", line)]
    if wrong:
        raise SystemExit(f"{path} has lines that are no choice, such as {wrong[0]!r}: write 12 A, 12 B or 12 tie.")
    choices = {int(number): choice for number, choice in map(str.split, lines)}
    if len(lines) != count or choices.keys() != {*range(1, count + 1)}:
        raise SystemExit(f"{path} has {len(lines)} choices of {len(choices)} items, and the sheet has {count} items.")
    return choices


def decided(key: Mapping[str, Any], choices: Mapping[int, str]) -> list[dict]:
    """Return the items, each with the better model, or "tie"."""
    return [{**item, "better": item.get(choices[item["item"]], "tie")} for item in key["items"]]


def lengths(items: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return whether a judge preferred longer texts: counts of items, and mean characters of the texts."""
    unequal = [item for item in items if item["better"] != "tie"]
    pairs = []
    for item in unequal:
        sides = "AB" if item["A"] == item["better"] else "BA"
        pairs.append([len("".join(item["answers"][side])) for side in sides])
    better, worse = (round(sum(pair[side] for pair in pairs) / max(len(pairs), 1)) for side in (0, 1))
    return {
        "items that are not equal": len(pairs),
        "preferred the longer text": sum(chosen > other for chosen, other in pairs),
        "mean characters of preferred texts": better,
        "mean characters of the others": worse,
    }


def rows(first: str, items: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a row for each other model and kind of prompt, and one for all kinds."""
    found = []
    others = {item[side] for item in items for side in "AB"} - {first}
    for other in sorted(others):
        of_pair = [item for item in items if other in (item["A"], item["B"])]
        for kind in ("all prompts", *PROMPTS):
            better = [item["better"] for item in of_pair if kind in ("all prompts", item["kind"])]
            won, lost = better.count(first), better.count(other)
            counts = map(str, (len(better), won, lost, len(better) - won - lost))
            found.append([f"{other}, {kind}", *counts, share_of(won, len(better))])
    return found


def origin(key: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the section of a sheet's table, the file of its answers, and the command that wrote the sheet."""
    command = "python benchmarks/blind_comparison.py FOLDER"
    if key["models"] == NEW_AND_EARLIER:
        return EARLIER, EARLIER_ANSWERS, f"{command} --earlier --seed {key['seed']}"
    command += (
        f" --models {' '.join(key['models'])} --seed {key['seed']} --temperature {key['temperature']:g} "
        f"--max-tokens {key['max_tokens']} --weights {key['weights']}"
    )
    if "prompts" in key:
        return FRESH, FRESH_ANSWERS, f"{command} --prompts docs/results/data/{key['prompts']}"
    return SECTION, ANSWERS, command


def count(options: argparse.Namespace) -> None:
    """Count the choices, and print and write the table."""
    key = json.loads((options.folder / "key.json").read_text(encoding="utf-8"))
    items = decided(key, read_choices(options.choices, len(key["items"])))
    table = rows(key["models"][0], items)
    print_rows([COLUMNS, *table])
    if options.write:
        about = {name: value for name, value in key.items() if name != "items"} | {"judge": options.judge}
        about["lengths"] = lengths(items)
        section, file, command = origin(key)
        write_items(options.write.with_name(file), about, items)
        write_table(options.write, section, command, COLUMNS, table, {"file": file})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sheet and its key")
    parser.add_argument("--models", nargs="+", default=["chat-en", "gpt-en", "smollm2"], help="the first and others")
    parser.add_argument("--seed", type=int, default=0, help="of the answers, the sides and the order")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max-tokens", type=int, default=200, help="of an answer")
    parser.add_argument("--weights", default="own", help="format of the packed weights")
    parser.add_argument("--prompts", type=Path, help="others than the 40: a JSON file of kinds and their prompts")
    parser.add_argument("--earlier", action="store_true", help="compare chat-en's answers with its earlier weights'")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--choices", type=Path, help="the judge's choices, which are counted")
    parser.add_argument("--judge", help="who chose, in words")
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    options = parser.parse_args()
    if options.choices is None:
        if len({*options.models}) < max(2, len(options.models)):
            raise SystemExit("Give at least two models, each once.")
        torch.set_num_threads(options.threads)
        print(machine(), flush=True)
        write_sheet(options)
    elif options.judge is None:
        raise SystemExit("Say who chose: --judge WORDS.")
    else:
        count(options)


if __name__ == "__main__":
    main()
