"""Comparison of text-to-image models: latent and pixel diffusion, DALL-E, and any other.

python benchmarks/text_to_picture.py latent=runs/latent-diffusion pixels=runs/latent-pixels dalle=runs/dalle \
    --clip runs/clip [--data emoji] [--count 200] [--guidance 3] [--dtype bfloat16] [--picture side.png] \
    [--plot guidance.png] [--over-time time.png] [--variations variations.png]

Each run is NAME=FOLDER. All draw the same captions with the same seeds, half of them from training and half held out.
One CLIP judges all. The table has kernel distances to the training pictures, by the features of keifu evaluate and by
CLIP's (in brackets those of held-out pictures, the lower limit); CLIP scores with the pictures' captions and with
shuffled ones; seconds per picture, drawn in batches after an uncounted one; and numbers of parameters.

--picture draws 24 prompts in both languages by every run, and counts how many pictures find their prompt among all by
the CLIP, for three drawings. --plot draws fidelity over variety by CLIP's features for each of --guidances, for runs
with guidance. --over-time draws CLIP's kernel distance and score of saved states (`--keep 20` in training; --states of
them, with the last one) over minutes of training, including the autoencoder's but not CLIP's. --variations shows six
held-out pictures, each next to five that unCLIP draws from its embedding. For a quick test use --count 20 --steps 5.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from _charts import chart
from _results import of_seeds, print_rows, typed, write_table
from _rounds import machine
from drawing import states
from torch import Tensor

from keifu import checkpoints
from keifu.checkpoints.hub import locate
from keifu.data.images.dataset import read_images
from keifu.data.images.grid import grid
from keifu.data.images.io import to_image
from keifu.data.images.splits import recorded, split_of_run
from keifu.evaluation.images.distances import kernel_distance, manifold
from keifu.evaluation.images.features import extractor
from keifu.evaluation.images.text_to_image import clip_scores, cosines
from keifu.inference.embeddings.clip import embed_pictures
from keifu.inference.images.image_to_image import read_input_image
from keifu.inference.images.pipeline import TextToImagePipeline, text_to_image_pipeline
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.models.unclip.unclip import Unclip
from keifu.recipes.images.unclip import complete_config
from keifu.training.run import checkpoint, metrics

PROMPTS = (
    "red heart", "cat face", "full moon face", "green book", "sunflower", "police car", "strawberry", "ghost",
    "blue apple", "red cat face", "purple heart with a face", "penguin with a hat",  # these four are not emoji
    "赤いハート", "ネコの顔", "顔のある満月", "緑の本", "ヒマワリ", "パトカー", "いちご", "お化け",
    "青いリンゴ", "赤いネコの顔", "顔のある紫のハート", "帽子をかぶったペンギン",
)  # fmt: skip
NAMES, EMOJI = len(PROMPTS) // 2, 8  # prompts in each language, and number of those that name emoji
TIMES = 3  # number of times that all prompts are drawn
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GUIDANCES = 1.0, 1.5, 2.0, 3.0, 5.0, 8.0
MEASURED = "kernel distance x 1000", "by CLIP", "precision", "recall", "CLIP score"  # by guidance
CHOSEN = "seeds", "guidances", "count", "steps", "dtype"
BATCH, ACROSS = 16, 4  # pictures drawn at once, and prompts in a row
VARIED, VARIATIONS = 6, 5  # pictures, and variations of each


@dataclass(frozen=True)
class Contestant:
    """Run that draws pictures from text."""

    name: str
    drawer: TextToImagePipeline
    model: Any
    folder: Path
    size: int
    held_out: Mapping[str, Any]

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def guided(self) -> bool:
        """Whether the run supports guidance."""
        return self.drawer.usual_guidance != 1

    def draw(self, texts: Sequence[str], options: argparse.Namespace, guidance: float, seed: int = 0) -> Tensor:
        """Draw a picture for each text, with consecutive random seeds after those of the smaller values of `seed`."""
        chosen = {"sampler": options.sampler, "steps": options.steps} if self.guided else {}
        towards = guidance if self.guided else 1.0
        wanted = self.drawer.resolved(ImageRequest(seed=0, text="a", truncate=True, guidance=towards, **chosen))
        made = []
        for first in range(0, len(texts), BATCH):
            part = texts[first : first + BATCH]
            seeds = [seed * len(texts) + first + n for n in range(len(part))]
            made.append(self.drawer.draw(wanted, seeds, texts=part))
        return torch.cat(made)


Eyes = Sequence[Callable[[Tensor], Tensor]]  # functions that compute features of pictures; the last one is CLIP's


@dataclass(frozen=True)
class Ground:
    """Reference at one size: captions with pictures, and the features of the training pictures."""

    captions: tuple[str, ...]
    real: Tensor
    features: tuple[Tensor, ...]
    floors: tuple[float, ...]


def contestant(given: str, dtype: torch.dtype) -> Contestant:
    name, _, folder = given.partition("=")
    folder = locate(folder)
    model, tokenizer = checkpoints.load(folder, dtype)
    config: Any = model.config
    return Contestant(name, text_to_image_pipeline(model, tokenizer), model, folder, config.size[0], recorded(folder))


def clip_features(towers: Any) -> Callable[[Tensor], Tensor]:
    """Return a function that computes CLIP's embeddings, scaled for the kernel distance to a variance of about 1."""

    def see(pictures: Tensor) -> Tensor:
        points = embed_pictures(towers[0], map(to_image, pictures))
        return points * points.shape[1] ** 0.5

    return see


def distance(real: Tensor, others: Tensor) -> float:
    return 1000 * kernel_distance(real, others).mean


def ground(contestants: Sequence[Contestant], size: int, eyes: Eyes, options: argparse.Namespace) -> Ground:
    """Return the reference of the runs of a size, which must hold out the same pictures."""
    held_out, *rest = [each.held_out for each in contestants if each.size == size]
    if any(other != held_out for other in rest):
        raise SystemExit(f"The runs of {size} pixels hold out different pictures: compare them one by one.")
    parts = split_of_run(read_images(options.data, size, 3), held_out)
    held = [part for part in (parts.test,) if len(part) > 1]
    chosen = [part.spread(min(options.count // (1 + len(held)), len(part))) for part in (parts.train, *held)]
    captions = tuple(text for part in chosen for text in part.texts(options.language))
    real = torch.cat([part.take(slice(None)) for part in chosen])
    features = tuple(see(parts.train.take(slice(None))) for see in eyes)
    others = [see(part.take(slice(None))) for see in eyes for part in held]
    floors = tuple(map(distance, features, others)) if others else (float("nan"),) * len(eyes)
    return Ground(captions, real, features, floors)


def row(each: Contestant, on: Ground, towers: Any, eyes: Eyes, options: argparse.Namespace) -> str:
    """Return a row of the table."""
    each.draw(on.captions[:2], options, options.guidance)
    start = time.perf_counter()
    drawn = each.draw(on.captions, options, options.guidance)
    seconds = (time.perf_counter() - start) / len(drawn)
    own, others = (float(part.mean()) for part in clip_scores(cosines(*towers, drawn, on.captions)))
    far = [distance(real, see(drawn)) for real, see in zip(on.features, eyes, strict=True)]
    distances = " | ".join(f"{one:.2f} ({floor:.2f})" for one, floor in zip(far, on.floors, strict=True))
    figures = f"{own:.2f} | {others:.2f} | {seconds:.2f} | {each.parameters / 1e6:.2f} M"
    return f"| {each.name} | {each.size} | {distances} | {figures} |"


def recognised(drawn: Tensor, towers: Any) -> str:
    """Return how many pictures find their prompt among all, in either language, for each time that all were drawn."""
    own = np.arange(len(PROMPTS)) % NAMES
    nearest = cosines(*towers, drawn, PROMPTS * TIMES).argmax(1).reshape(TIMES, -1) % NAMES
    right, emoji = nearest == own, own < EMOJI
    counts = [", ".join(map(str, each.sum(1).tolist())) for each in (right, right[:, emoji])]
    return f"{counts[0]} of {len(own)} prompts, {counts[1]} of the {emoji.sum()} that are emoji"


def side_by_side(contestants: Sequence[Contestant], towers: Any, options: argparse.Namespace) -> bytes:
    """Return the pictures of all prompts by every run, enlarged to the largest size."""
    size = max(each.size for each in contestants)
    pictures = []
    for each in contestants:
        drawn = each.draw(PROMPTS * TIMES, options, options.guidance)
        print(f"{each.name}: the CLIP recognises {recognised(drawn, towers)}", flush=True)
        first = drawn[: len(PROMPTS)].float()
        pictures.append(torch.nn.functional.interpolate(first, size=(size, size), mode="nearest").to(torch.uint8))
    captions = [f"{each.name}: {prompt}" for prompt in PROMPTS for each in contestants]
    return grid(torch.stack(pictures, 1).flatten(0, 1), captions, ACROSS * len(contestants))


def variations(contestants: Sequence[Contestant], options: argparse.Namespace) -> bytes:
    """Return held-out pictures, with a row for each, and unCLIP's pictures of their embeddings."""
    rows, captions = [], []
    for each in (one for one in contestants if isinstance(one.model, Unclip)):
        held = split_of_run(read_images(options.data, each.size, 3), each.held_out).test.spread(VARIED)
        with tempfile.TemporaryDirectory() as folder:
            for picture, caption in zip(held.take(slice(None)), held.texts(options.language), strict=True):
                place = Path(folder) / "picture.png"
                to_image(picture).save(place)
                wanted = ImageRequest(
                    options.sampler, options.steps, 0, init=read_input_image(place), guidance=options.guidance
                )
                drawn = each.drawer.draw(each.drawer.resolved(wanted), range(VARIATIONS))
                rows.append(torch.cat([picture[None], drawn]))
                captions += [caption, *[""] * VARIATIONS]
    return grid(torch.cat(rows), captions, 1 + VARIATIONS)


def guidance_plot(
    contestants: Sequence[Contestant],
    grounds: dict[int, Ground],
    towers: Any,
    eyes: Eyes,
    options: argparse.Namespace,
) -> dict[str, list[list[float]]]:
    """Plot precision against recall, and CLIP score against recall, a point for each guidance.

    Return the figures of each run and guidance, named by `MEASURED`, with a value for each seed.
    """
    with chart(options.plot, (11, 4.5), 2, legend=None, dpi=100) as axes:
        found = dict[str, list[list[float]]]()
        for each in (one for one in contestants if one.guided):
            on, points = grounds[each.size], []
            for guidance in options.guidances:
                values = []
                for seed in options.seeds:
                    drawn = each.draw(on.captions, options, guidance, seed)
                    features = [see(drawn) for see in eyes]
                    precision, recall = manifold(on.features[-1], features[-1])
                    score = float(clip_scores(cosines(*towers, drawn, on.captions))[0].mean())
                    far = [distance(real, own) for real, own in zip(on.features, features, strict=True)]
                    values.append((*far, precision, recall, score))
                own = found[f"{each.name}, guidance {guidance:g}"] = [[*seeds] for seeds in zip(*values, strict=True)]
                _, _, precision, recall, score = map(mean, own)
                points.append((recall, precision, score))
                print(f"{each.name}, guidance {guidance:g}: {own}", flush=True)
            recall, *others = zip(*points, strict=True)
            for panel, values in zip(axes, others, strict=True):
                panel.plot(recall, values, "o-", label=each.name)
                for x, y, guidance in zip(recall, values, options.guidances, strict=True):
                    panel.annotate(f"{guidance:g}", (x, y), textcoords="offset points", xytext=(4, 4))
        for panel, label in zip(
            axes, ("precision by CLIP (fidelity)", "CLIP score (fidelity to the text)"), strict=True
        ):
            panel.set(xlabel="recall by CLIP (variety)", ylabel=label)
            panel.legend()
    return found


def over_time(
    contestants: Sequence[Contestant],
    grounds: dict[int, Ground],
    towers: Any,
    see: Callable[[Tensor], Tensor],
    options: argparse.Namespace,
) -> None:
    """Measure kernel distance and CLIP score of every kept state of a run; models keep the last one's weights."""
    with chart(options.over_time, (11, 4.5), 2, legend=None, dpi=100) as axes:
        print("\n| run | minutes | kernel distance x 1000 | CLIP score |\n|---|---:|---:|---:|")
        for each in contestants:
            on, points = grounds[each.size], []
            learned = checkpoint.read(each.folder, checkpoint.steps(each.folder)[-1]).tensors
            for name, parameter in each.model.named_parameters():  # a state only has what its run trained
                parameter.requires_grad_(f"model.{name}" in learned)
            parts = [
                metrics.read(each.folder / part) for part in ("autoencoder", "dvae") if (each.folder / part).exists()
            ]
            before = sum(max(line.get("seconds", 0.0) for line in lines) for lines in parts) / 60
            for _, minutes in states(each.folder, each.model, options.states):
                if isinstance(each.model, Unclip):
                    complete_config(each.model)
                drawn = each.draw(on.captions, options, options.guidance)
                far = distance(on.features[-1], see(drawn))
                score = float(clip_scores(cosines(*towers, drawn, on.captions))[0].mean())
                points.append((before + minutes, far, score))
                print(f"| {each.name} | {before + minutes:.1f} | {far:.2f} | {score:.2f} |", flush=True)
            minutes, *others = zip(*points, strict=True)
            for panel, values in zip(axes, others, strict=True):
                panel.plot(minutes, values, "o-", label=each.name)
        for panel, label in zip(axes, ("kernel distance x 1000, by CLIP", "CLIP score"), strict=True):
            panel.set(xlabel="minutes of training", ylabel=label)
            panel.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--clip", required=True, help="the CLIP that looks at all")
    parser.add_argument("--data", default="emoji")
    parser.add_argument("--language", help="of the captions; unset: the first")
    parser.add_argument("--count", type=int, default=200, help="captions, half of them held out")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="for --plot")
    parser.add_argument("--guidances", type=float, nargs="+", default=[*GUIDANCES])
    parser.add_argument("--sampler", default="dpm++-2m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--picture", type=Path, help="a PNG file: prompts side by side")
    parser.add_argument("--plot", type=Path, help="a PNG file: fidelity against variety by guidance")
    parser.add_argument("--over-time", type=Path, help="a PNG file: quality by the minutes of training")
    parser.add_argument("--variations", type=Path, help="a PNG file: held-out pictures, varied by unCLIP")
    parser.add_argument("--states", type=int, default=20, help="at most so many of a run's, for --over-time")
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data, for the table of --plot")
    options = parser.parse_args()
    towers, own = checkpoints.load(options.clip, torch.float32), extractor()
    eyes = own, clip_features(towers)
    contestants = [contestant(given, DTYPES[options.dtype]) for given in options.runs]
    sizes = sorted({each.size for each in contestants})
    grounds = {size: ground(contestants, size, eyes, options) for size in sizes}
    how = f"{options.sampler}, {options.steps} steps, guidance {options.guidance:g}, {options.dtype}"
    print(f"{machine()}; {how}; features: {own.name}, and CLIP's\n")
    heads = "run | size | kernel distance x 1000 | by CLIP | CLIP score | captions shuffled | s a picture | parameters"
    print(f"| {heads} |\n|---|{'---:|' * 7}")
    for each in contestants:
        print(row(each, grounds[each.size], towers, eyes, options), flush=True)
    for size, on in grounds.items():
        score, others = (float(part.mean()) for part in clip_scores(cosines(*towers, on.real, on.captions)))
        print(f"| real pictures | {size} | 0 | 0 | {score:.2f} | {others:.2f} | - | - |")
    if options.picture:
        options.picture.write_bytes(side_by_side(contestants, towers, options))
    if options.variations:
        options.variations.write_bytes(variations(contestants, options))
    if options.plot:
        rows, values = of_seeds(guidance_plot(contestants, grounds, towers, eyes, options), ".2f")
        print_rows([["", *MEASURED], *rows])
        if options.write:
            script = f"text_to_picture.py {' '.join(options.runs)} --clip {options.clip} --plot PNG"
            defaults = {name: parser.get_default(name) for name in CHOSEN}
            command = typed(script, vars(options), defaults)
            values["held-out pictures"] = grounds[sizes[0]].floors
            write_table(options.write, "Guidance", command, ["", *MEASURED], rows, values)
    if options.over_time:
        over_time(contestants, grounds, towers, eyes[-1], options)


if __name__ == "__main__":
    main()
