"""Evaluation of text-to-image models: CLIP score of the generated images, and their distance to real ones.

Axes: picture, channels, height, width. There are as many texts as images.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keifu.data.images.dataset import ImageDataset
from keifu.data.images.grid import grid
from keifu.data.images.io import to_image
from keifu.data.images.splits import ImageSplit, split_of_run
from keifu.data.progress import counting
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError, require_known
from keifu.evaluation.images import generative as drawn_pictures
from keifu.evaluation.images.distances import Bytes
from keifu.evaluation.intervals import share_figures
from keifu.evaluation.registry import EvalRequest, EvalResult, Figures, ResultTable
from keifu.inference.embeddings.clip import embed_pictures, embed_texts, two_towers
from keifu.inference.images.pipeline import TextToImagePipeline, is_text_to_image, text_to_image_pipeline
from keifu.inference.images.pixel_diffusion import ImageRequest

Cosines = Float[Tensor, "picture texts"]


def cosines(towers: nn.Module, tokenizer: Tokenizer, pictures: Bytes, texts: Sequence[str]) -> Cosines:
    """Return the cosine between the CLIP embeddings of each picture and each text."""
    if len(pictures) != len(texts):
        raise UserError(f"{len(pictures)} pictures need as many texts, and {len(texts)} were given.")
    return embed_pictures(towers, map(to_image, pictures)) @ embed_texts(towers, tokenizer, texts, cut=True).T


def clip_scores(cosines: Cosines) -> tuple[Float[Tensor, " picture"], Float[Tensor, " picture"]]:
    """Return CLIP scores of each picture with its text, and the mean of its scores with all other texts, as if captions
    were shuffled.

    A score is 100 · max(cosine, 0): CLIPScore without its factor of 2.5, in hundredths (Hessel et al., 2021, section
    3).
    """
    scores, count = 100 * cosines.clamp(min=0), len(cosines)
    matching = scores.diagonal()
    return matching, (scores.sum(1) - matching) / max(1, count - 1)


def best(cosines: Cosines, count: int) -> list[int]:
    """Return the indices of the pictures that fit the first text best, the best one first (DALL-E's reranking; Ramesh
    et al., 2021)."""
    return cosines[:, 0].argsort(descending=True, stable=True)[:count].tolist()


ABOUT = "drawing from text: a model that reads a caption, on pictures with captions"
takes, NAMES, accepts = is_text_to_image, drawn_pictures.NAMES, drawn_pictures.accepts
OPTIONS = {"seed", "batch_size", "output", "sampler", "steps", "metric", "language", "guidance", "clip", "lora"}
METRICS = "clip-score", "distances"
DRAWN, BATCH = 200, 16
ITEMS = "captions", "caption", "score", "own caption first", "score of the real picture", "its own caption first"


class GeneratedImages(NamedTuple):
    """Pictures drawn from captions, and the real pictures with these captions."""

    real: ImageDataset
    captions: tuple[str, ...]
    pictures: Bytes


def evaluate(model: nn.Module, tokenizer: Any, request: EvalRequest) -> EvalResult:
    """Return the figures of `metric`, or of both metrics, for captions in training and for held-out captions.

    clip-score needs a CLIP. Without one it is left out, or raises `UserError` if it was requested by name.
    """
    require_known("metric of a text-to-image model", METRICS[0] if request.metric is None else request.metric, METRICS)
    if request.metric == "clip-score" and request.towers is None:
        raise UserError("A CLIP must look at the pictures: name one with --clip (a run, a folder, a hub id).")
    if request.towers is not None:
        two_towers(request.towers[0])
    drawer = text_to_image_pipeline(model, tokenizer)
    parts, drawing = _requested(drawer, request)
    train, test = parts.evaluated()
    if len(train) < 2:
        raise UserError(f"{request.on} has {len(train)} picture with a caption, and at least 2 are needed: give more.")
    sets = {"": train.distinct(), " of held-out captions": test.distinct() if test else None}
    generated = {
        name: _generate(drawer, drawing, part, request) for name, part in sets.items() if part and len(part) > 1
    }
    note = _sentence(generated, drawing, request)
    figures, rows = Figures(), list[tuple[Any, ...]]()
    if request.metric != "distances" and request.towers is not None:
        for where, images in generated.items():
            scores, lines = _score(where, images, request)
            figures |= scores
            rows += lines
    if request.metric == "clip-score":
        return EvalResult(figures, (note,), {}, ResultTable(ITEMS, rows), _save_grid(generated))
    result = drawn_pictures.write_neighbours(generated[""].pictures, train, test, request, drawing)
    return replace(result, figures=figures | result.figures, notes=(note, *result.notes))


def _requested(drawer: TextToImagePipeline, request: EvalRequest) -> tuple[ImageSplit, ImageRequest]:
    """Return captioned images of the model's size, split, and the request that generates each picture."""
    guidance = drawer.usual_guidance if request.guidance is None else request.guidance
    sampler = request.sampler or drawer.usual_sampler
    drawing = ImageRequest(sampler, request.steps, request.seed, guidance=guidance, text="a", truncate=True)
    drawing = drawer.resolved(drawing)
    pictures = drawn_pictures.read_squares(request.on, drawing.size or (0, 0), drawer.colours)
    pictures.texts(request.language)  # raises an error for an unknown language before anything is generated
    return split_of_run(pictures, request.held_out), drawing


def _generate(
    drawer: TextToImagePipeline, drawing: ImageRequest, part: ImageDataset, request: EvalRequest
) -> GeneratedImages:
    """Generate an image for each of evenly spaced captions, with consecutive seeds."""
    sample = part.spread(min(request.limit or DRAWN, len(part)))
    captions, size, pictures = sample.texts(request.language), request.batch_size or BATCH, list[Tensor]()
    with counting("Drawing", len(captions), "pictures") as advance:
        for first in range(0, len(captions), size):
            texts = captions[first : first + size]
            seeds = [request.seed + first + number for number in range(len(texts))]
            pictures.append(drawer.draw(drawing, seeds, texts=texts))
            advance(first + len(texts))
    return GeneratedImages(sample, captions, torch.cat(pictures))


def _score(where: str, generated: GeneratedImages, request: EvalRequest) -> tuple[Figures, list[tuple[Any, ...]]]:
    """Return CLIP scores of generated and real images, with their captions and with all others; and the items."""
    towers, tokenizer = request.towers
    figures, columns = Figures(), list[list[Any]]()
    for whose, pictures in (("", generated.pictures), (" of real pictures", generated.real.take(slice(None)))):
        similarity = cosines(towers, tokenizer, pictures, generated.captions)
        matching, mismatched = clip_scores(similarity)
        first = similarity.argmax(1).cpu() == torch.arange(len(similarity))
        figures[f"CLIP score{whose}{where}"] = round(float(matching.mean()), 3)
        figures[f"CLIP score{whose}{where}, captions shuffled"] = round(float(mismatched.mean()), 3)
        figures |= share_figures(f"own caption first of {len(first)}{whose}{where}", int(first.sum()), len(first))
        columns += [[f"{score:.3f}" for score in matching.tolist()], first.int().tolist()]
    part = [where.removeprefix(" of ") or "in training"] * len(generated.captions)
    return figures, list(zip(part, generated.captions, *columns, strict=True))


def _sentence(generated: dict[str, GeneratedImages], drawing: ImageRequest, request: EvalRequest) -> str:
    counts = [f"{len(images.captions):,}{name or ' of captions in training'}" for name, images in generated.items()]
    return (
        f"Drawn: {' and '.join(counts)}, in the language {request.language or 'that comes first'}, with a guidance of "
        f"{drawing.guidance:g}. The CLIP score is 100 · max(cosine, 0), and depends on the CLIP that looks."
    )


def _save_grid(generated: dict[str, GeneratedImages]) -> bytes:
    """Draw a PNG: some generated images, each next to the real one with the same caption."""
    count = drawn_pictures.SHOWN // len(generated)
    pairs = [torch.stack([images.pictures[:count], images.real.take(slice(count))], 1) for images in generated.values()]
    captions = [
        text for images in generated.values() for caption in images.captions[:count] for text in (caption, "real")
    ]
    return grid(torch.cat(pairs).flatten(0, 1), captions, drawn_pictures.ACROSS * 2)
