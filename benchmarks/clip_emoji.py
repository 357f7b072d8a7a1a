"""CLIP trained on emoji and their names: retrieval of names, and of a drawing style, that it never saw.

python benchmarks/clip_emoji.py [--run runs/clip] [--steps 1000] [--picture similarity.png] [--write]

Without --run, the recipe `clip` is trained first with its default settings. Three sets are searched: Twemoji's test
part, whose names were never seen; the same names drawn by OpenMoji; and all other names drawn by OpenMoji, whose names
were seen but not that style. The baseline only counts: a picture is its histogram of 64 colours, a name its bag of
words (of letters for Japanese); a picture's words are those of the training pictures with the most similar colours, and
a name's colours those of the training names with the most similar words. Groups are classified zero-shot, by a few
words for each. Intervals resample families of emoji. --write puts the rank of each item into
docs/results/data/emoji-clip-all.json, and the two tables into text_and_pictures.json and its pages.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from _charts import chart
from _results import write_table
from _rounds import machine
from matplotlib import font_manager
from torch import Tensor

from keifu import checkpoints
from keifu.checkpoints.hub import locate
from keifu.commands.evaluate import training_facts
from keifu.data.catalogue import catalogue
from keifu.data.images.dataset import ImageDataset, read_images
from keifu.data.images.splits import split
from keifu.evaluation.classification.metrics import Confusion
from keifu.evaluation.images.counting import counted_points
from keifu.evaluation.images.retrieval import both_ranks
from keifu.evaluation.intervals import bootstrap
from keifu.inference.embeddings.clip import embed_bytes, embed_texts, label_points, label_shares, preprocessing
from keifu.recipes.images import clip as recipe
from keifu.recipes.running import run_jobs

LANGUAGES = ("en", "ja")
WAYS = {"captions": "name by picture", "pictures": "picture by name"}
WHO = ("emoji-clip", "counting")
DATA = Path(__file__).parent.parent / "docs" / "results" / "data"
ALL = DATA / "emoji-clip-all.json"
COMMAND = "python benchmarks/clip_emoji.py --run emoji-clip --write"
SECTION, RELATIVES = "CLIP on emoji and their names", "Relatives of emoji in training"
UNSEEN = "unseen names"
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


def ranked(task: recipe.ClipTask, sets: dict[str, ImageDataset]) -> list[dict[str, Any]]:
    """Return the ranks of each set and language, by the model and by counting, with the family of each picture."""
    new = {*task.parts.clean_test().names}
    found = []
    for name, pictures in sets.items():
        points, numbers = vectors(task.model, pictures), torch.arange(len(pictures))
        about = {"families": pictures.families.tolist(), "pictures": list(pictures.names)}
        about["distinct"] = list(pictures.distinct().names)
        about["relative in training"] = [int(each not in new) for each in pictures.names]
        for language in LANGUAGES:
            both = points, embed_texts(task.model, task.tokenizer, pictures.texts(language), cut=True)
            by = (
                both_ranks(both, both, numbers),
                both_ranks(*counted_points(task.parts.train, pictures, language), numbers),
            )
            ranks = {
                who: dict(zip(WAYS.values(), each.values(), strict=True)) for who, each in zip(WHO, by, strict=True)
            }
            found.append({"set": name, "language": language, "ranks": ranks, **about})
            print(f"{name}, {language}: {cells(found[-1])}", flush=True)
    return found


def share(ranks: Sequence[int], families: Sequence[int], chosen: Iterable[int] | None = None) -> str:
    """Return the share of first ranks with its interval, of all pictures or of those at some positions."""
    positions = list(range(len(ranks)) if chosen is None else chosen)
    right = np.array([ranks[at] == 1 for at in positions])
    low, high = bootstrap(right, clusters=[families[at] for at in positions])
    return f"{right.mean():.1%} ({low:.1%} to {high:.1%})"


def cells(found: dict[str, Any]) -> list[str]:
    """Return a line of the first table: both ways by the model, then by counting."""
    ranks = [found["ranks"][who][way] for who in WHO for way in WAYS.values()]
    return [f"{len(found['families']):,}", *(share(each, found["families"]) for each in ranks)]


def relatives(found: dict[str, Any]) -> list[list[str]]:
    """Return two lines of the second table: names by pictures, of pictures with relatives in training and without."""
    families, old = found["families"], found["relative in training"]
    once = [at for at, name in enumerate(found["pictures"]) if name in found["distinct"]]
    parts = [None, [at for at, each in enumerate(old) if each], [at for at, each in enumerate(old) if not each], once]
    ranks = {who: found["ranks"][who]["name by picture"] for who in WHO}
    return [[f"{found['language']}, {who}", *(share(ranks[who], families, part) for part in parts)] for who in WHO]


def write(found: Sequence[dict[str, Any]]) -> None:
    """Write the ranks, and the tables that follow from them."""
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in found)
    ALL.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    values = {"file": ALL.name}
    columns = ["R@1", "among", *(f"{who}, {way}" for who in WHO for way in WAYS.values())]
    rows = [[f"{each['set']}, {each['language']}", *cells(each)] for each in found]
    write_table(DATA / "text_and_pictures.json", SECTION, COMMAND, columns, rows, values)
    unseen = [each for each in found if each["set"] == UNSEEN]
    counts = [len(unseen[0]["families"]), sum(unseen[0]["relative in training"]), len(unseen[0]["distinct"])]
    names = [f"all {counts[0]}", f"{counts[1]} with a relative in training", f"{counts[0] - counts[1]} without"]
    columns = ["name by picture, R@1", *names, f"each of the {counts[2]} emoji once"]
    rows = [row for each in unseen for row in relatives(each)]
    write_table(DATA / "text_and_pictures.json", RELATIVES, COMMAND, columns, rows, values)


def groups(task: recipe.ClipTask, name: str, pictures: ImageDataset) -> None:
    """Print zero-shot accuracy over the groups for which this file has words."""
    known = [place for place, label in enumerate(pictures.labels) if pictures.classes[label] in GROUPS]
    pictures, labels = pictures.subset(known), [*GROUPS]
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
    some = some.subset(np.linspace(0, len(some) - 1, count).astype(int))
    points, thumbnails = vectors(task.model, some), some.take(slice(0, count)).permute(0, 2, 3, 1).numpy()
    with chart(path, (15, 8), 2, legend=None, dpi=100) as axes:
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


def ready(options: argparse.Namespace) -> recipe.ClipTask:
    """Return the trained model with the splits of its data. Train it first if no run is given."""
    wanted = recipe.Recipe()
    wanted = replace(wanted, training=replace(wanted.training, steps=options.steps or wanted.training.steps))
    if options.run is None:
        start = time.perf_counter()
        run_jobs(recipe.jobs(wanted), options.out)
        print(f"Trained in {time.perf_counter() - start:.0f} s.", flush=True)
    model, tokenizer = checkpoints.load(options.run or options.out)
    held_out = training_facts(locate(options.run or str(options.out)))["held_out"]
    pictures = read_images(wanted.data, preprocessing(model).crop, 3)
    parts = split(pictures, whole_families=held_out.get("whole_families", True))
    return recipe.ClipTask(model, tokenizer, parts, None, wanted.training)


def shown(names: Sequence[str], size: int) -> ImageDataset:
    return read_images("openmoji", size, 3).with_names(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", help="a run of the recipe, or emoji-clip; without it one is trained")
    parser.add_argument("--out", type=Path, default=Path("runs/clip-emoji"), help="the folder of the run made here")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--picture", type=Path, help="a PNG file for the similarity matrix")
    parser.add_argument("--write", action="store_true", help="write the ranks and the tables of docs/results")
    options = parser.parse_args()
    task = ready(options)
    size = preprocessing(task.model).crop
    print(f"{machine()}; {task.parts.sentence()}\n")
    sets = {
        UNSEEN: task.parts.test,
        "unseen names in an unseen style": shown(task.parts.test.names, size),
        "seen names in an unseen style": shown(task.parts.train.distinct().names, size),
    }
    found = ranked(task, sets)
    if options.write:
        write(found)
    for name in (UNSEEN, "unseen names in an unseen style"):
        groups(task, name, sets[name])
    if options.picture:
        draw(task, task.parts.test, options.picture)


if __name__ == "__main__":
    main()
