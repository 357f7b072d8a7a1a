"""CLIP trained on emoji and their names: retrieval of names, and of a drawing style, that it never saw.

python benchmarks/clip_emoji.py [--run runs/clip] [--steps 1000] [--picture similarity.png]

Without --run, the recipe `clip` is trained first with its default settings. Three sets are searched: Twemoji's test
part, whose names were never seen; the same names drawn by OpenMoji; and all other names drawn by OpenMoji, whose names
were seen but not that style. The baseline only counts: a picture is its histogram of 64 colours, a name its bag of
words (of letters for Japanese); a picture's words are those of the training pictures with the most similar colours, and
a name's colours those of the training names with the most similar words. Groups are classified zero-shot, by a few
words for each.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from _rounds import machine
from matplotlib import font_manager
from torch import Tensor

from keifu import checkpoints
from keifu.data.catalogue import catalogue
from keifu.data.images.dataset import ImageDataset, read_images
from keifu.data.images.splits import split
from keifu.evaluation.classification.metrics import Confusion
from keifu.evaluation.images.counting import counted_points
from keifu.evaluation.images.retrieval import (
    Recall,
    embed_bytes,
    embed_texts,
    label_points,
    label_shares,
    preprocessing,
    recall_both_ways,
)
from keifu.recipes.images import clip as recipe

LANGUAGES = ("en", "ja")
GROUPS = {
    "Smileys & Emotion": ["face", "smiling face", "heart", "cat face"],
    "People & Body": ["person", "man", "woman", "hand", "people"],
    "Animals & Nature": ["animal", "bird", "fish", "plant", "flower", "tree"],
    "Food & Drink": ["food", "fruit", "bread", "cake", "drink", "glass"],
    "Travel & Places": ["building", "house", "car", "train", "mountain", "moon"],
    "Activities": ["ball", "sport", "game", "medal", "party"],
    "Objects": ["clothes", "book", "phone", "tool", "musical instrument", "box"],
    "Symbols": ["arrow", "button", "sign", "symbol", "circle"],
    "Flags": ["flag"],
}


def vectors(model: torch.nn.Module, pictures: ImageDataset) -> Tensor:
    return embed_bytes(model, (pictures.take(slice(n, n + 64)) for n in range(0, len(pictures), 64)))


def counted(train: ImageDataset, searched: ImageDataset, language: str) -> tuple[Recall, Recall]:
    """Return the recall of the baseline: names by words, pictures by colours."""
    by_words, by_colours = counted_points(train, searched, language)
    return recall_both_ways(*by_words)[0], recall_both_ways(*by_colours)[1]


def line(name: str, language: str, both: tuple[Recall, Recall], count: int) -> str:
    cells = [f"{share:.1%}" for each in both for share in each.shares.values()]
    return f"| {name} | {language} | {count:,} | {' | '.join(cells)} |"


def retrieval(task: recipe.ClipTask, sets: dict[str, ImageDataset]) -> None:
    """Print the table of recall, with the baseline under each row."""
    heads = " | ".join(f"{what} R@{n}" for what in ("name by picture", "picture by name") for n in (1, 5, 10))
    print(f"| | | among | {heads} |\n|---|---|---:|{'---:|' * 6}")
    for name, pictures in sets.items():
        points = vectors(task.model, pictures)
        for language in LANGUAGES:
            texts = embed_texts(task.model, task.tokenizer, pictures.texts(language), cut=True)
            print(line(f"CLIP, {name}", language, recall_both_ways(points, texts), len(pictures)))
            print(line("colours and words", language, counted(task.parts.train, pictures, language), len(pictures)))
    print(flush=True)


def groups(task: recipe.ClipTask, name: str, pictures: ImageDataset) -> None:
    """Print zero-shot accuracy over the groups for which this file has words."""
    known = [place for place, label in enumerate(pictures.labels) if pictures.classes[label] in GROUPS]
    pictures, labels = pictures.chosen(known), [*GROUPS]
    points = torch.stack([label_points(task.model, task.tokenizer, words, ["{}"]).mean(0) for words in GROUPS.values()])
    given = label_shares(task.model, vectors(task.model, pictures), torch.nn.functional.normalize(points, dim=-1))
    right = torch.tensor([labels.index(pictures.classes[label]) for label in pictures.labels])
    verdict = Confusion.of(right, given.argmax(-1), labels).verdict().replace("texts", "pictures")
    print(f"Groups, zero-shot, {name}: {verdict}", flush=True)


def draw(task: recipe.ClipTask, pictures: ImageDataset, path: Path, count: int = 12) -> None:
    """Draw the cosines between some held-out pictures and their names, in English and in Japanese."""
    font_manager.fontManager.addfont(str(catalogue.fetch("japanese-font")))
    plt.rcParams["font.family"] = ["DejaVu Sans", "IPAexGothic"]
    some = pictures.distinct()
    some = some.chosen(np.linspace(0, len(some) - 1, count).astype(int))
    points, thumbnails = vectors(task.model, some), some.take(slice(0, count)).permute(0, 2, 3, 1).numpy()
    figure, axes = plt.subplots(1, 2, figsize=(15, 8), layout="constrained")
    for panel, language in zip(axes, LANGUAGES, strict=True):
        texts = some.texts(language)
        cosines = embed_texts(task.model, task.tokenizer, texts, cut=True) @ points.T
        panel.imshow(cosines, cmap="viridis")
        panel.set_yticks(range(count), texts)
        panel.set_xticks([])
        for place, thumbnail in enumerate(thumbnails):
            panel.imshow(thumbnail, extent=(place - 0.45, place + 0.45, -0.6, -1.5), aspect="auto")
            panel.text(place, place, f"{float(cosines[place, place]):.2f}", ha="center", va="center", color="white")
        panel.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -1.6))
        panel.set_aspect("equal")
    figure.savefig(path, dpi=100)


def ready(options: argparse.Namespace) -> recipe.ClipTask:
    """Return the trained model with the splits of its data. Train it first if no run is given."""
    wanted = recipe.Recipe()
    wanted = replace(wanted, training=replace(wanted.training, steps=options.steps or wanted.training.steps))
    if options.run is None:
        start = time.perf_counter()
        recipe.run(wanted, options.out, False)
        print(f"Trained in {time.perf_counter() - start:.0f} s.", flush=True)
    model, tokenizer = checkpoints.load(options.run or options.out, torch.float32)
    parts = split(read_images(wanted.data, preprocessing(model).crop, 3))
    return recipe.ClipTask(model, tokenizer, parts, None, wanted.training)


def shown(names: Sequence[str], size: int) -> ImageDataset:
    return read_images("openmoji", size, 3).named(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a run of the recipe; without it one is trained")
    parser.add_argument("--out", type=Path, default=Path("runs/clip-emoji"), help="the folder of the run made here")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--picture", type=Path, help="a PNG file for the similarity matrix")
    options = parser.parse_args()
    task = ready(options)
    size = preprocessing(task.model).crop
    print(f"{machine()}; {task.parts.sentence()}\n")
    sets = {
        "unseen names": task.parts.test,
        "unseen names in an unseen style": shown(task.parts.test.names, size),
        "seen names in an unseen style": shown(task.parts.train.distinct().names, size),
    }
    retrieval(task, sets)
    for name in ("unseen names", "unseen names in an unseen style"):
        groups(task, name, sets[name])
    if options.picture:
        draw(task, task.parts.test, options.picture)


if __name__ == "__main__":
    main()
