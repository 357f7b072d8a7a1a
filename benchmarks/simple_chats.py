"""Simple conversations and stories of a teacher, for a small student: short answers in the style of a few examples.

python benchmarks/simple_chats.py --out FILE.jsonl [--count 1000] [--seed 0] [--model smollm2] [--weights int8]
    [--streams 96] [--most 10] [--most-sentences 4] [--threads 1]

Each item has a kind. `talk`: the user says an everyday sentence of Tatoeba, or a remark or mood of the lists below.
`fact`: the user asks a question, of Tatoeba or from the lists. `greeting`: a greeting, or a question about the program.
`story`: the user asks for a story. The teacher reads a few example turns before the user's, so that it answers in
simple words; the file does not have these turns. 40% of the talks and greetings go on with a second question, which the
teacher writes from a short opening.

An answer is left out if it is cut (a story may end earlier), repeats itself, has unusual characters, copies the user's
sentence or an example, or speaks of an AI. It is left out, too, if a sentence-embedding model (MiniLM) finds it nearer
to more than five of 1,000 other sentences than to the user's: such an answer fits everything. The same answer is kept
at most --most times, and a sentence of a talk at most --most-sentences times. Prompts within one word of a prompt of
`blind_comparison.py` are not asked. A line of FILE is a conversation for `keifu train sft`, marked as synthetic. The
answers are generated, and nobody has checked them. Run the same command again to continue at the end of FILE.
"""
# ruff: noqa: SIM905

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from blind_comparison import PROMPTS
from teacher_texts import (
    BEINGS,
    EVENTS,
    GREETINGS,
    PLACES,
    REMARKS,
    TASKS,
    TOPICS,
    Writer,
    repeats,
    whole_sentences,
    write_file,
    writing_options,
)
from torch import Tensor

from keifu import checkpoints
from keifu.data.text.normalization import HeldOut, units
from keifu.data.translation import tatoeba
from keifu.inference.embeddings.encoders import embed
from keifu.inference.text.generate import Completion

KINDS = ("talk", "fact", "talk", "story", "talk", "talk", "greeting", "talk", "fact", "talk")
FRIENDLY = "You are a friendly chat program. You answer in one short sentence, in simple words."
MANNERS = {
    "talk": FRIENDLY,
    "fact": "You answer questions in one short sentence, in simple words.",
    "greeting": FRIENDLY,
    "story": "You tell short stories in simple words.",
}
EXAMPLES = {
    "talk": (
        ("I found a coin in the street.", "How lucky! Will you keep the coin, or look for its owner?"),
        ("My brother broke his leg.", "Oh no, a broken leg hurts a lot. I hope that he can walk again soon."),
        ("She sings very well.", "What songs does she like to sing?"),
        ("Do you like apples?", "Yes, I think that red apples are the best, because they are sweet."),
        ("I am very tired today.", "Did you sleep badly? You could go to bed early tonight."),
        ("We are going to the mountains on Sunday.", "It can be cold in the mountains. Take warm clothes with you."),
        ("He did not answer my letter.", "Maybe he is busy. You could write to him again next week."),
        ("What can I do when it rains?", "When it rains, you could read a good book or bake some bread."),
        ("I won the race!", "Well done! How long did you train for the race?"),
        ("My car makes a strange noise.", "A strange noise is a bad sign. Someone should look at your car soon."),
        ("I do not like winter.", "Winter is cold and dark. Which season do you like best?"),
        ("Can you help me with my homework?", "Yes, I can help you with your homework. What is it about?"),
    ),
    "fact": (
        ("What is a spoon for?", "People use a spoon to eat soup and to stir tea."),
        ("Where do birds sleep?", "Most birds sleep in trees or in their nests."),
        ("Which month comes after May?", "June comes after May."),
        ("What color is grass?", "Grass is green."),
        ("Why do people laugh?", "People laugh because they are happy or because something is funny."),
        ("Who was Mozart?", "Mozart was a composer from Austria who wrote a lot of famous music."),
        ("Is a cat bigger than a bus?", "No, a bus is much bigger than a cat."),
        ("What is the opposite of long?", "The opposite of long is short."),
    ),
    "greeting": (
        ("Hello there!", "Hello! It is nice to meet you. What would you like to talk about?"),
        ("Who are you?", "I am a small chat program. I like to talk about simple things."),
        ("How are you?", "I am fine, thank you. And how are you?"),
        ("Are you a human?", "No, I am a computer program, but I like to chat with people."),
        ("See you later!", "Goodbye! It was nice to talk with you."),
        ("Thanks a lot!", "You are welcome!"),
        ("Let us talk.", "Yes, let us talk! What did you do today?"),
        ("How old are you?", "Programs do not get older, so I cannot tell you."),
        ("What do you like?", "I like short questions and funny stories."),
        ("My name is Rosa.", "Hello, Rosa! It is nice to meet you."),
    ),
    "story": (
        ("Tell me a short story about a cat who wants to swim.",
         "Once there was a small cat named Mia. Mia saw the ducks on the lake, and she wanted to swim too. She put one "
         "paw into the water. It was cold! Then a kind duck came with a little boat. Mia sat in the boat, and they "
         "crossed the lake together. Mia was very happy."),
        ("Write a story about a girl who loses her hat.",
         "Anna had a red hat that she loved. One windy day, the wind took it away. Anna ran after it, over the hill "
         "and through the trees. At last she found it on the head of a cow! Anna laughed and took her hat back. From "
         "then on, she tied it under her chin."),
        ("Tell me a story about an old man who builds a bridge.",
         "An old man lived by a river. Every day, the children of the village had to walk a long way to school. So the "
         "man took some wood and his tools, and he began to build. It took him all summer. When the bridge was ready, "
         "the children ran across it and cheered. They brought him flowers and apples."),
    ),
}  # fmt: skip
STRAY = {  # words of the examples, which an answer has from there unless the user said them
    "talk": "coin;owner;leg;song;songs;apples;mountains;letter;bread;race;noise;winter;homework",
    "fact": "spoon;nests;june;mozart;grass;opposite",
    "greeting": "rosa;older",
    "story": "mia;anna",
}
ANIMALS = (
    "dog;cat;horse;cow;pig;sheep;goat;hen;duck;goose;mouse;rat;rabbit;fox;wolf;bear;lion;tiger;monkey;giraffe;zebra;"
    "camel;deer;squirrel;hedgehog;frog;snake;crocodile;shark;whale;dolphin;penguin;owl;eagle;parrot;swan;bee;"
    "butterfly;spider;snail;kangaroo;koala;panda;bat;crab;octopus;seal;donkey"
).split(";")
THINGS = (
    "a knife;a cup;a plate;a chair;a table;a bed;a lamp;a clock;a mirror;a key;a door;a window;a bag;a book;"
    "a pen;a pencil;a letter;a newspaper;a phone;a computer;a camera;a radio;a car;a bus;a train;a bicycle;"
    "a boat;an airplane;a bridge;a road;a house;a school;a hospital;a library;a museum;a church;a market;"
    "a kitchen;a garden;a farm;a hat;a coat;a shirt;a glove;a sock;a belt;a ring;soap;a towel;a comb;"
    "a toothbrush;bread;butter;cheese;milk;an egg;rice;soup;salad;a cake;an apple;a banana;an orange;a lemon;"
    "a grape;a cherry;a carrot;a potato;a tomato;an onion;salt;sugar;coffee;water;ice;snow;rain;wind;a storm;"
    "a cloud;a star;the sun;the moon;the sky;a river;a lake;a sea;an island;a mountain;a forest;a tree;a flower;"
    "a leaf;a seed;a stone;sand;gold;iron;glass;paper;wood;wool;money;a map;a ticket;a candle;a ladder;a hammer;"
    "a needle;a rope;a wheel;a drum;a piano;a violin;a flute;a ball;a kite;a doll;a puzzle;a gift;a flag;a tent;"
    "a blanket;a pillow;a basket;a bottle;a box"
).split(";")
PEOPLE = (
    "doctor;nurse;teacher;farmer;baker;cook;pilot;sailor;painter;singer;dancer;writer;dentist;gardener;police officer;"
    "firefighter;carpenter;tailor;king;queen;scientist;judge;student;waiter;hairdresser;fisherman;actor"
).split(";")
LANDS = (
    "France;Spain;Germany;Japan;China;India;Egypt;Russia;Greece;Portugal;Poland;Sweden;Norway;Brazil;Mexico;Canada;"
    "Australia;England;Austria;Hungary;Turkey;Kenya;Peru;Cuba;Thailand;Ireland"
).split(";")
OPPOSITES = (
    "cold;big;small;good;bad;fast;slow;old;young;new;happy;sad;light;dark;high;low;full;empty;rich;hard"
).split(";")
QUESTIONS = (
    "What is {thing}?;What do people use {thing} for?;Where can I find {thing}?;What does a {person} do?;"
    "Where does a {animal} live?;What does a {animal} eat?;What is a {animal}?;What sound does a {animal} make?;"
    "How big is a {animal}?;Can a {animal} swim?;Can a {animal} fly?;Tell me something about the {animal}.;"
    "What is the capital of {land}?;Where is {land}?;What language do people speak in {land}?;"
    "What is the opposite of {opposite}?;What is {topic}?;Tell me something about {topic}.;"
    "What can you tell me about {topic}?;How can I {task}?;Which is bigger, a {animal} or a {animal2}?;"
    "What color is {thing}?;What is {thing} made of?;Who works with {thing}?;Why do people like {topic}?"
).split(";")
REQUESTS = (
    "Tell me a story about {being} who {event}.;Tell me a short story about {being} who {event}.;"
    "Write a short story about {being} who {event} {place}.;Write a story about {being} and {other}.;"
    "Tell me a story about {being} {place}.;Write a very short story about {thing}.;"
    "Tell me a bedtime story about {being}.;Tell me a story about a {animal} who {event}.;"
    "Write a story about a {animal} and a {animal2}.;Tell me a story about a {person} and a {animal}.;"
    "Write a short story about a {person} who {event}.;Write a short story about a {animal} {place}.;"
    "Tell me a story about {being} and {thing}.;Write a story about a {animal} who finds {thing}."
).split(";")
MORE_GREETINGS = (
    "Hi.;How are you?;How are you today?;Hello again!;Hey!;Good afternoon!;How is it going?;What is up?;"
    "Nice to see you.;Are you there?;Bye!;Goodbye!;"
    "Good night.;Thanks.;Thank you very much.;You are funny.;You are nice.;Can you help me?;Can we talk?;Are you real?;"
    "Do you sleep?;Do you eat?;Are you happy?;What do you do all day?;Who made you?;What are you?;Do you know me?;"
    "I feel great today.;I feel bad.;I am a bit sad.;I am lonely.;I am angry.;I am sick.;I am nervous.;I am so happy.;"
    "I do not know what to do.;Please cheer me up.;Make me laugh.;Say something nice.;How was your day?;I missed you.;"
    "My name is {name}.;I am {name}.;Hello, my name is {name}.;Hi, this is {name}.;Can you say my name? I am {name}."
).split(";")
MOODS = [text for text in (*GREETINGS, *MORE_GREETINGS) if re.match(r"I (am (?!\{)|feel|had|like|do not)|It is", text)]
OTHER_GREETINGS = [text for text in (*GREETINGS, *MORE_GREETINGS) if text not in MOODS]
NAMES = "Tom;Mary;Ken;Emma;Paul;Lucy;Max;Sara;Ben;Julia;Peter;Nina;Sam;Laura;David;Yuki;Leo;Eva;Jack;Mia".split(";")
FOLLOWING = [
    "Do you", "I think", "Why", "Really", "I do not", "Yes, ", "No, ", "What", "Thank you", "How", "I want", "But",
    "Can you", "And you", "Where",
]  # fmt: skip
MOST_TOKENS = {"story": 150, "talk": 40, "fact": 40, "greeting": 40}
TEMPERATURES = {"story": 0.7, "talk": 0.5, "fact": 0.2, "greeting": 0.5}
PLAIN = re.compile(r"[A-Za-z0-9 ,.!?;:'\"()\-]+")
PERSON = re.compile(r"(?i)\b(i|you|your|my|we|our)\b")
NOT_GENERAL = re.compile(
    r"(?i)\b(i|you|your|my|me|we|us|our|he|him|his|she|her|they|them|it|this|that|these|tom|mary)\b"
)
DULL = re.compile(
    r"(?i)language model|\bAI\b|assist|chatbot|sorry for (your loss|any|the)|user|not (familiar|able)|unable|"
    r"not sure (what|how)|\b(?P<word>\w+), (?P=word)\b"
)
NEARER = 5  # of the other sentences may be nearer to an answer than the user's
Talks = dict[int, list[dict[str, str]]]  # the turns of each item


@cache
def everyday() -> tuple[list[str], list[str]]:
    """Return Tatoeba's short sentences that mention who speaks or hears, and its questions that mention nobody."""
    learned, _ = tatoeba.rows(0.01)
    texts = dict.fromkeys(row["en"] for row in learned if "en" in row)
    short = [text for text in texts if 3 <= len(text.split()) <= 11 and PLAIN.fullmatch(text)]
    questions = [text for text in short if text.endswith("?") and not NOT_GENERAL.search(text)]
    return [text for text in short if PERSON.search(text)], questions


@cache
def compared() -> HeldOut:
    """Return the turns of the blind comparison, which are not asked here."""
    return HeldOut(turn for several in PROMPTS.values() for turns in several for turn in turns)


def prompt_of(kind: str, drawn: random.Random) -> str:
    """Return a user's first turn of this kind."""
    said, questions = everyday()
    of_lists = drawn.random()
    one, two = drawn.sample(BEINGS, 2)
    animal, animal2 = drawn.sample(ANIMALS, 2)
    words = {
        "being": one, "other": two, "event": drawn.choice(EVENTS), "place": drawn.choice(PLACES),
        "thing": drawn.choice(THINGS), "animal": animal, "animal2": animal2, "person": drawn.choice(PEOPLE),
        "land": drawn.choice(LANDS), "opposite": drawn.choice(OPPOSITES), "topic": drawn.choice(TOPICS),
        "task": drawn.choice(TASKS), "name": drawn.choice(NAMES),
    }  # fmt: skip
    source: Sequence[str] = {
        "talk": MOODS if of_lists < 0.08 else REMARKS if of_lists < 0.25 else said,
        "fact": questions if of_lists < 0.3 else QUESTIONS,
        "greeting": OTHER_GREETINGS,
        "story": REQUESTS,
    }[kind]  # fmt: skip
    text = re.sub(r"\ba(?= [aeiou])", "an", drawn.choice(source).format(**words))
    return prompt_of(kind, drawn) if compared().near(text) else text


def examples(kind: str, drawn: random.Random) -> list[dict[str, str]]:
    """Return the turns that the teacher reads before the user's, in random order: it copies most from the last."""
    turns = [{"role": "system", "content": MANNERS[kind]}]
    for asked, answered in drawn.sample(EXAMPLES[kind], len(EXAMPLES[kind])):
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return turns


def kept(kind: str, asked: str, said: Completion) -> str:
    """Return an answer, or "" if it is left out."""
    text = said.text.strip()
    if said.finish_reason != "stop":
        text = whole_sentences(said.text.partition("\n\n")[0]) if kind == "story" else ""
    text = text.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"').replace("\n\n", " ")
    plain = PLAIN.fullmatch(text) and text[0].isupper() and text[-1] in '.!?"' and not DULL.search(text)
    long = len(text.split()) >= (25 if kind == "story" else 2)
    words, said_words = units(text), units(asked)
    copied = words == said_words or (
        said_words not in {units(question) for question, _ in EXAMPLES[kind]}
        and ({*STRAY[kind].split(";")} & {*words} - {*said_words} or text in {answer for _, answer in EXAMPLES[kind]})
    )
    most = max(Counter(zip(words, words[1:], words[2:], strict=False)).values(), default=0)
    return text if plain and long and not copied and most < 3 and not repeats(text) else ""


class SimpleWriter(Writer):
    """Teacher that reads the examples of a kind before a conversation, with a judge of what its answers belong to."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options)
        self.judge, self.judge_tokens = checkpoints.load("minilm")
        said, questions = everyday()
        self.others = self.vectors(random.Random(0).sample([*said, *questions, *GREETINGS, *MORE_GREETINGS], 1000))

    def vectors(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vector of each text."""
        return embed(self.judge, self.judge_tokens, texts)

    def on_topic(self, asked: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Return for each answer whether at most NEARER other sentences are nearer to it than the user's sentence."""
        if not answers:
            return []
        written = self.vectors(answers)
        own = (written * self.vectors(asked)).sum(1, keepdim=True)
        return ((written @ self.others.T > own).sum(1) <= NEARER).tolist()

    def in_style(self, talks: Talks, kinds: dict[int, str], turn: int, openings: dict[int, str]) -> dict:
        """Return by item the completion of its next turn: the user's if it has an opening, else the assistant's."""
        written: dict[int, Completion] = {}
        for kind in MANNERS:  # a kind at a time, so that its examples are computed once
            items = [item for item in talks if kinds[item] == kind]
            before = examples(kind, random.Random(f"{self.options.seed} {min(items, default=0)}"))
            most = MOST_TOKENS[kind]
            prompts = [
                self.opened(before + talks[item], openings[item]) if item in openings
                else self.tokenizer.render_chat(before + talks[item])
                for item in items
            ]  # fmt: skip
            drawn = {"top_p": 0.9, "frequency_penalty": 0.15 if kind == "story" else 0.0}
            done = self.write(prompts, items, turn, most, TEMPERATURES[kind], **drawn)
            written |= zip(items, done, strict=True)
        return written

    def reply(self, talks: Talks, kinds: dict[int, str], turn: int) -> None:
        """Add the assistant's turn to each conversation. One with a bad answer loses the turn before it too."""
        asked = {item: talk[-1]["content"] for item, talk in talks.items()}
        written = self.in_style(talks, kinds, turn, {}).items()
        answers = {item: text for item, said in written if (text := kept(kinds[item], asked[item], said))}
        fit = self.on_topic([asked[item] for item in answers], [*answers.values()])
        good = {item for item, fits in zip(answers, fit, strict=True) if fits}
        for item, talk in talks.items():
            if item in good:
                talk.append({"role": "assistant", "content": answers[item]})
            else:
                talk.pop()

    def ask_on(self, talks: Talks, openings: dict[int, str]) -> Talks:
        """Add a second turn of the user, in the style of `talk`. Return the conversations that have one."""
        asked = self.in_style(talks, dict.fromkeys(talks, "talk"), 2, openings)
        for item, said in asked.items():
            text = (openings[item] + said.text).strip()
            if said.finish_reason == "stop" and PLAIN.fullmatch(text) and len(text.split()) < 14:
                talks[item].append({"role": "user", "content": text})
        return {item: talk for item, talk in talks.items() if len(talk) == 3}


def write_items(writer: SimpleWriter, items: Iterable[int]) -> list[dict[str, Any]]:
    """Return the lines of these items. Some are left out."""
    kinds = {item: KINDS[item % len(KINDS)] for item in items}
    drawn = {item: random.Random(f"{writer.options.seed} {item}") for item in kinds}
    talks = {item: [{"role": "user", "content": prompt_of(kind, drawn[item])}] for item, kind in kinds.items()}
    writer.reply(talks, kinds, 1)
    talks = {item: talk for item, talk in talks.items() if talk}
    openings = {
        item: drawn[item].choice(FOLLOWING)
        for item in talks
        if kinds[item] in ("talk", "greeting") and drawn[item].random() < 0.4
    }
    longer = writer.ask_on({item: talks[item] for item in openings}, openings)
    writer.reply(longer, dict.fromkeys(longer, "talk"), 3)
    return writer.lines(talks, kinds, "synthetic answers")


def phrases(line: dict[str, Any]) -> list[str]:
    """Return what may not be written too often: the sentences of a talk's answers, else the first answer."""
    answers = [message["content"] for message in line["messages"][1::2]]
    if line["kind"] != "talk":
        return answers[:1]
    return [sentence for answer in answers for sentence in re.split(r"(?<=[.!?]) ", answer)]


def main() -> None:
    parser = writing_options(__doc__, streams=96, wave=600)
    parser.add_argument("--most", type=int, default=10, help="times that the same answer is kept")
    parser.add_argument("--most-sentences", type=int, default=4, help="times that a sentence of a talk is kept")
    options = parser.parse_args()
    text = options.out.read_text("utf-8") if options.out.exists() else ""
    uses = Counter(phrase for line in text.split("\n")[:-1] for phrase in phrases(json.loads(line)))

    def write(writer: SimpleWriter, items: list[int]) -> list[dict[str, Any]]:
        lines = []
        for line in write_items(writer, items):
            said, most = phrases(line), options.most_sentences if line["kind"] == "talk" else options.most
            if all(uses[phrase] < most for phrase in said):
                uses.update(said)
                lines.append(line)
        return lines

    write_file(SimpleWriter, options, write)


if __name__ == "__main__":
    main()
