"""Texts of a teacher, to distil it: stories, answers, questions and conversations that a chat model writes itself.

python benchmarks/teacher_texts.py --out FILE.jsonl [--count 1000] [--model smollm2] [--weights int8] [--streams 32]
    [--seed 0] [--temperature 0.6] [--question-temperature 0.9] [--kinds story answer greeting ...]

Each item begins with a prompt that is drawn from the lists below by the seed and the item's number. `story` and
`answer`: the model answers it. `question` and `conversation`: the prompt is only the opening of a question, which the
model completes in the user's turn before it answers (Magpie, Xu et al., 2024); a conversation has a second question.
`greeting` and `remark`: a greeting or a remark about a topic, and a second turn whose opening is drawn too.

A line of FILE is a conversation as `keifu train sft` reads it, marked as synthetic. An answer that --max-tokens cut
ends with its last whole sentence; one that repeats itself is left out. Run the same command again to go on where FILE
ends. All text is the model's: nobody has checked it.
"""
# ruff: noqa: SIM905

import argparse
import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from _rounds import machine

from keifu import checkpoints
from keifu.generation.text.generate import Completion, generate_batch
from keifu.generation.text.sampling_params import SamplingParams

BEINGS = (
    "a dog;a cat;a fox;an owl;a mouse;a bear;a rabbit;a bird;a girl;a boy;a farmer;a baker;a teacher;a sailor;"
    "a painter;an old woman;a king;a robot;a fisherman;twin sisters;a gardener;a doctor;a young musician;a shepherd"
).split(";")
EVENTS = (
    "finds a key;loses a hat;gets lost in the fog;makes a new friend;is afraid of the dark;learns to swim;"
    "plants a tree;breaks a promise;shares the last piece of bread;hears a strange sound at night;builds a boat;"
    "wants to fly;forgets a birthday;helps a stranger;finds a letter in a bottle;tells a lie;waits for the rain;"
    "repairs an old clock;wins a race;misses the train;keeps a secret;cooks soup for the whole village"
).split(";")
PLACES = (
    "in a small village;by the sea;in the mountains;in a big city;on a farm;in a deep forest;at school;on an island;"
    "in a library;in winter;on a hot summer day;in a castle;on a train;at the market;by the river;in a garden"
).split(";")
TOPICS = (
    "rain;the moon;bread;a volcano;photosynthesis;gravity;a bicycle;bees;salt;electricity;the heart;a library;money;"
    "music;sleep;fire;glass;paper;earthquakes;the seasons;a democracy;vaccines;rivers;the internet;whales;dreams;"
    "magnets;coffee;friendship;a computer;maps;the alphabet;soil;clouds;trees;the sun;cheese;history;numbers;chess"
).split(";")
TASKS = (
    "save water at home;learn a new language;sleep better;write a letter;cook rice;plan a trip;grow tomatoes;"
    "make a new friend;clean a kitchen;prepare for an exam;speak in front of a class;save money;stay healthy;"
    "train a dog;take better photos;read more books;paint a wall;stop being late;bake a cake;ride a bicycle"
).split(";")
STORIES = (
    "Write a short story about {being} who {event} {place}.",
    "Tell me a story for a small child, in simple words, about {being} who {event}.",
    "Write a short story {place}. It begins: \"One morning, {being}\"",
    "Write a story of one paragraph about {being} who {event} {place}.",
)  # fmt: skip
REQUESTS = (
    "What do you know about {topic}?", "Explain {topic} in two sentences.", "Why are people interested in {topic}?",
    "How do I {task}?", "Tell me three facts about {topic}.", "Give me three tips to {task}.", "Is it hard to {task}?",
    "Tell me about {topic}.", "Explain {topic} to a child.", "Write a short poem about {topic}.",
)  # fmt: skip
OPENINGS = (
    "How do I;How can I;What is;What are;Why do;Why is;Can you tell me;Can you explain;I feel;I want to;Is it;Who was;"
    "Where is;When did;Give me;Tell me;Write a;What should I;Do you think;My friend;Please help me;Which"
).split(";")
FOLLOWING = "Thank you. And;Why;Can you;How;What if;But;Could you give me an example;And what".split(";")
GREETINGS = (
    "Hi!;Hello!;Hello, how are you?;Good morning!;Good evening.;Hey there!;Nice to meet you.;Hi, can you help me?;"
    "What is your name?;Who are you?;What can you do?;Tell me about yourself.;Are you a robot?;Do you have friends?;"
    "I am sad today.;I am happy today!;I am bored.;I am tired.;I am hungry.;I had a bad day.;I had a great day!;"
    "Tell me a story.;Tell me a joke.;Let's talk.;What should we talk about?;What do you like?;Do you like music?;"
    "Do you like animals?;What is your favorite color?;What is your favorite food?;What is your favorite book?;"
    "Where do you live?;How old are you?;What are you doing?;I like dogs.;I like cats.;It is raining today.;"
    "I have a question.;I need some advice.;Thank you!;Can we be friends?;Can you tell me something interesting?"
).split(";")
REMARKS = (
    "I like {topic}.;Do you like {topic}?;I want to {task}.;I am learning about {topic}.;Can you help me to {task}?;"
    "Let's talk about {topic}.;I saw {being} today.;I dreamed of {being}.;Yesterday I tried to {task}.;"
    "I do not like {topic}.;What do you think about {topic}?;My friend wants to {task}.;I read a book about {topic}.;"
    "Today I will {task}.;I am worried because I have to {task}.;My brother likes {topic}.;I am thinking of {topic}.;"
    "I met {being} {place}.;My favorite thing is {topic}.;I finally managed to {task}!;I never learned to {task}."
).split(";")
FRIENDLY = (
    "What do;Do you;Can you tell me;I like;I am;That is;Thank you;Tell me;How about;Why;What is;I think;I want to"
).split(";")
KINDS = ("story", "answer", "question", "conversation", "greeting", "remark")
WITH_PROMPT = {"story": STORIES, "answer": REQUESTS, "greeting": GREETINGS, "remark": REMARKS}  # else only an opening


def first_words(item: int, seed: int, kinds: list[str]) -> tuple[str, str, str]:
    """Return the kind of an item, its prompt or the opening of one, and the opening of a second question."""
    drawn = random.Random(f"{seed} {item}")
    kind = kinds[item % len(kinds)]
    words = {"being": BEINGS, "event": EVENTS, "place": PLACES, "topic": TOPICS, "task": TASKS}
    chosen = {name: drawn.choice(values) for name, values in words.items()}
    text, friendly = drawn.choice(WITH_PROMPT.get(kind, OPENINGS)), kind in ("greeting", "remark")
    return kind, text.format(**chosen), drawn.choice(FRIENDLY if friendly else FOLLOWING)


class Writer:
    """A chat model that writes turns of several conversations at a time, and counts its tokens."""

    def __init__(self, options: argparse.Namespace):
        self.model, self.tokenizer = checkpoints.load(options.model, weights=options.weights)
        self.options, self.tokens, self.seconds = options, 0, 0.0

    def write(
        self, prompts: list[list[int]], items: list[int], turn: int, most: int, temperature: float
    ) -> list[Completion]:
        """Return what the model writes after each prompt; its seed is that of the item and the turn."""
        seeds = [random.Random(f"{self.options.seed} {item} {turn}").getrandbits(31) for item in items]
        drawn: dict[str, Any] = {"temperature": temperature, "top_p": 0.95, "max_tokens": most}
        how = [SamplingParams(seed=seed, **drawn) for seed in seeds]
        start = time.perf_counter()
        written = generate_batch(self.model, self.tokenizer, prompts, how, self.options.streams)
        self.seconds += time.perf_counter() - start
        self.tokens += sum(len(each.tokens) for each in written)
        return written

    def opened(self, talk: list[dict[str, str]], opening: str) -> list[int]:
        """Return the ids of a conversation up to the opening of the user's next turn."""
        ids = self.tokenizer.render_chat([*talk, {"role": "user", "content": opening}], add_generation_prompt=False)
        ends = [place for place, token in enumerate(ids) if token in self.tokenizer.stop_ids]
        return ids[: ends[-1]]

    def ask(self, talks: dict[int, list[dict[str, str]]], openings: dict[int, str], turn: int) -> None:
        """Add the user's turn to each conversation of these items; one without an end is removed."""
        items = [item for item in openings if item in talks]
        prompts = [self.opened(talks[item], openings[item]) for item in items]
        warm = self.options.question_temperature or self.options.temperature
        for item, said in zip(items, self.write(prompts, items, turn, 48, warm), strict=True):
            talks[item].append({"role": "user", "content": (openings[item] + said.text).strip()})
            if said.finish_reason != "stop" or "\n" in said.text.strip():
                del talks[item]

    def answer(self, talks: dict[int, list[dict[str, str]]], items: list[int], turn: int) -> None:
        """Add the assistant's turn to each conversation of these items; a bad one is removed."""
        items = [item for item in items if item in talks]
        prompts = [self.tokenizer.render_chat(talks[item]) for item in items]
        most, temperature = self.options.max_tokens, self.options.temperature
        for item, said in zip(items, self.write(prompts, items, turn, most, temperature), strict=True):
            text = said.text.strip() if said.finish_reason == "stop" else whole_sentences(said.text)
            talks[item].append({"role": "assistant", "content": text})
            if not text or repeats(text):
                del talks[item]


def whole_sentences(text: str) -> str:
    """Return a text that was cut up to the end of its last whole sentence."""
    ends = [*re.finditer(r"[^\W\d][.!?]['\"”]?(?=\s)", text)]
    return text[: ends[-1].end()].strip() if ends else ""


def repeats(text: str) -> bool:
    """Whether a sentence is there three times, or a third of the runs of three words were there before."""
    parts = [part.strip() for line in text.split("\n") for part in line.split(". ")]
    words = text.lower().split()
    runs = [*zip(words, words[1:], words[2:], strict=False)]
    often = any(count > 2 for part, count in Counter(parts).items() if len(part) > 20)
    return often or len(set(runs)) < 2 * len(runs) / 3


def write_items(writer: Writer, items: list[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the lines of these items; some are left out."""
    words = {item: first_words(item, options.seed, options.kinds) for item in items}
    talks: dict[int, list[dict[str, str]]] = {item: [] for item in items}
    for item, (kind, text, _) in words.items():
        if kind in WITH_PROMPT:
            talks[item].append({"role": "user", "content": text})
    writer.ask(talks, {item: text for item, (kind, text, _) in words.items() if not talks[item]}, 0)
    writer.answer(talks, items, 1)
    twice = ("conversation", "greeting", "remark")
    further = {item: more for item, (kind, _, more) in words.items() if kind in twice}
    writer.ask(talks, further, 2)
    writer.answer(talks, [*further], 3)
    source = f"synthetic, written by {options.model} ({options.weights})"
    return [
        {"messages": talk, "source": source, "kind": words[item][0], "seed": options.seed, "item": item}
        for item, talk in talks.items()
    ]


def begun(path: Path, seed: int) -> list[int]:
    """Return the items of the lines that the file has; a half line at its end is removed. Lines of another seed are an
    error."""
    if not path.exists():
        return []
    whole, newline, _ = path.read_text(encoding="utf-8").rpartition("\n")
    path.write_text(whole + newline, encoding="utf-8")
    lines = [json.loads(line) for line in whole.split("\n") if line]  # a text may have other line breaks
    if any(line["seed"] != seed for line in lines):
        raise SystemExit(f"{path} has lines of another seed than {seed}: give another --seed or --out.")
    return [line["item"] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a chat model")
    parser.add_argument("--weights", default="int8", help="format of the weights on the CPU")
    parser.add_argument("--count", type=int, default=1000, help="items, some of which are left out")
    parser.add_argument("--streams", type=int, default=32, help="sequences that are written at a time")
    parser.add_argument("--wave", type=int, default=128, help="items between two times that the file grows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--question-temperature", type=float, help="of the user's turns; unset: as the answers")
    parser.add_argument("--max-tokens", type=int, default=448, help="of an answer")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(), flush=True)
    made = begun(options.out, options.seed)
    writer, kept = Writer(options), len(made)
    for first in range(max(made, default=-1) + 1, options.count, options.wave):
        items = [*range(first, min(first + options.wave, options.count))]
        lines = write_items(writer, items, options)
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        kept += len(lines)
        speed = writer.tokens / writer.seconds
        print(f"{items[-1] + 1:,} of {options.count:,} items, {kept:,} kept, {speed:,.0f} tokens/s", flush=True)
    print(f"{options.out} has {kept:,} conversations: keifu train distill --data {options.out}")


if __name__ == "__main__":
    main()
