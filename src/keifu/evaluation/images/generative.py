"""Evaluation of generative image models: FID and KID, memorisation, reconstruction from noise, and bits per dimension.

Reconstruction removes noise from held-out images and reports PSNR and SSIM. Bits per dimension are the variational
bound of a diffusion model: Ho et al. (2020), equation 5, with the discretised decoder of equation 13.

Axes: picture, channels, height, width; batch, steps = T, `*shape` = of an image.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from keifu.data.images.catalogued import CATALOGUED
from keifu.data.images.dataset import ImageDataset, read_images
from keifu.data.images.grid import grid
from keifu.data.images.io import to_bytes, to_signed
from keifu.data.images.splits import ImageSplit, split_of_run
from keifu.data.progress import counting
from keifu.errors import UserError, require_known
from keifu.evaluation.classification.metrics import Confusion
from keifu.evaluation.images.distances import WINDOW, Bytes, frechet, kernel_distance, manifold, nearest, psnr, ssim
from keifu.evaluation.images.features import PAPERS, Extractor, extractor, place
from keifu.evaluation.registry import EvalRequest, EvalResult, Figures, ResultTable
from keifu.inference.embeddings.row_classifiers import RowClassifier
from keifu.inference.images import pixel_diffusion
from keifu.inference.images.denoiser import Denoiser, Network, label_denoiser
from keifu.inference.images.pixel_diffusion import ImageRequest, SeededNoise
from keifu.inference.images.samplers import ConfiguredSampler, configure_sampler, last_x
from keifu.layers.counter_rng import normal
from keifu.layers.diffusion.image_model import ImageModel
from keifu.layers.diffusion.noise_schedule import Noise, add_noise, at, normal_kl, posterior
from keifu.layers.diffusion.sampling_schedule import Level, Schedule
from keifu.training.objectives.diffusion import HELD_OUT, bits_of_step, draw_noise

Values = Float[Tensor, "batch *shape"]
Seeds = Int[Tensor, " batch"]


class Bound(NamedTuple):
    """Bits per dimension (per number of a picture) of each picture.

    prior [batch]: divergence of x_T from noise. steps [batch, T]: each denoising step; timestep 0 is the decoder.
    """

    prior: Float[Tensor, " batch"]
    steps: Float[Tensor, "batch steps"]


@torch.inference_mode()
def bound(
    network: Network, noise: Noise, pictures: Values, seeds: Seeds, advance: Callable[[], None] = lambda: None
) -> Bound:
    """Return the bound of pictures with values from -1 to 1, over all T steps, with one noise sample for each.

    The noise depends on a picture's seed and the timestep. advance: called after each step.
    """
    denoise, exact, rows = Denoiser(network, noise), posterior(noise), []
    for step in range(noise.steps):
        timestep = torch.full((len(pictures),), step, device=pictures.device)
        x = add_noise(pictures, normal(seeds + step, pictures.shape[1:]).to(pictures), noise.alpha_bar, timestep)
        alpha_bar = float(noise.alpha_bar[step])
        output = denoise(x, Level(float(step), math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)))
        rows.append(bits_of_step(noise, exact, pictures, output.picture, x, timestep, output.variance_fraction))
        advance()
    return Bound(prior_bits(noise, pictures), torch.stack(rows, -1))


def prior_bits(noise: Noise, pictures: Values) -> Float[Tensor, " batch"]:
    """Return the divergence of x_T, given the picture, from pure noise, in bits per dimension."""
    last = torch.full((len(pictures),), noise.steps - 1, device=pictures.device)
    mean = at(noise.alpha_bar.sqrt(), last, pictures) * pictures
    zero = torch.zeros_like(mean)
    divergence = normal_kl(mean, at((1 - noise.alpha_bar).log(), last, pictures), zero, zero)
    return divergence.flatten(1).mean(1) / math.log(2)


LEFT = 0.9, 0.5, 0.1  # ᾱ: shares of the picture's variance that remain after adding noise, before reconstruction
STEPS = 50  # of the whole path from pure noise
COLUMNS = "picture left in the noise", "timestep", "PSNR of the noisy picture", "PSNR", "SSIM"


def reconstruct(
    model: ImageModel, pictures: ImageDataset, seed: int, batch_size: int, steps: int | None = None
) -> tuple[Figures, ResultTable]:
    """Return mean PSNR (decibels) and SSIM of images that were noised to each level of `LEFT` and denoised
    deterministically.

    Denoising is DDIM (η = 0) along the remaining part of a path of `steps` steps. It begins at the noisiest level at
    which at least that share of the variance remains. The headline figures are those of the middle level. SSIM is left
    out for pictures smaller than its window.
    """
    sampler, rows = configure_sampler(model.noise, "ddim", steps or min(STEPS, model.noise.steps)), []
    clean = pictures.take(slice(None))
    with counting("Finding pictures again", len(LEFT) * len(pictures), "pictures") as advance:
        for index, share in enumerate(LEFT):
            way = [step for step in sampler.schedule.steps if step.level.alpha**2 >= share] or sampler.schedule.steps[
                -1:
            ]
            level, pairs = way[0].level, []
            for first, originals, label in _batches(model, pictures, batch_size):
                seeds = draw_noise(seed, HELD_OUT, len(originals), first)
                pairs.append(_reconstruct(model, sampler, Schedule(tuple(way)), originals, label, seeds))
                advance(index * len(pictures) + first + len(originals))
            noisy, restored = (torch.cat(part) for part in zip(*pairs, strict=True))
            alike = _mean(ssim(clean, restored), 4) if min(clean.shape[2:]) >= WINDOW else None
            before, after = _mean(psnr(clean, noisy)), _mean(psnr(clean, restored))
            rows.append((round(level.alpha**2, 3), int(level.timestep), before, after, alike))
    figures = dict(zip(COLUMNS[2:], rows[1][2:], strict=True))
    return {name: value for name, value in figures.items() if value is not None}, ResultTable(COLUMNS, rows)


@torch.inference_mode()
def _reconstruct(
    model: ImageModel, sampler: ConfiguredSampler, way: Schedule, pictures: Bytes, label: Tensor | None, seeds: Tensor
) -> tuple[Bytes, Bytes]:
    """Return noised pictures at the level where the path begins, and the result of denoising them. seeds: of the
    noise."""
    level, clean = way.steps[0].level, to_signed(pictures)
    x = level.alpha * clean + level.sigma * normal(seeds.to(clean.device), clean.shape[1:])
    walk = sampler.run(sampler.denoiser(label_denoiser(model, label)), x, way, SeededNoise(seeds.tolist()))
    return to_bytes(x).cpu(), to_bytes(last_x(walk)).cpu()


def bits(model: ImageModel, pictures: ImageDataset, seed: int, batch_size: int) -> Figures:
    """Return the variational bound in bits per dimension, its three parts, and the standard error of the mean.

    prior: the end of the noising. steps (with the prior the paper's rate): denoising down to timestep 0. decoder (its
    distortion): the remaining bits for the pixel values.
    """
    bounds, all_steps = [], model.noise.steps * -(-len(pictures) // batch_size)
    with counting("Counting bits", all_steps, "steps") as advance:
        reached = iter(range(1, 1 + all_steps))
        for first, originals, label in _batches(model, pictures, batch_size):
            seeds = draw_noise(seed, HELD_OUT, len(originals), first).to(originals.device)
            network = label_denoiser(model, label)
            bounds.append(bound(network, model.noise, to_signed(originals), seeds, lambda: advance(next(reached))))
    prior, steps = map(torch.cat, zip(*bounds, strict=True))
    total = prior + steps.sum(1)
    parts = {"": total, "prior": prior, "steps": steps[:, 1:].sum(1), "decoder": steps[:, 0]}
    error = {"standard error": float(total.std() / math.sqrt(len(total)))} if len(total) > 1 else {}
    means = {name: float(value.mean()) for name, value in parts.items()} | error
    return {f"bits/dim{', ' * bool(part)}{part}": round(value, 4) for part, value in means.items()}


def condition_labels(model: ImageModel, pictures: ImageDataset) -> Tensor | None:
    """Return the class of each image in the model's numbering; None for an unconditional model.

    If the model has no class names, its classes are in the order of the data set. Raises `UserError` for an image
    without a class if the model requires one.
    """
    if not model.config.n_classes:
        return None
    known_names = model.config.classes or pictures.classes[: model.config.n_classes]
    names = [pictures.classes[label] if label >= 0 else "" for label in pictures.labels]
    if all(name in known_names for name in names):
        return torch.tensor([known_names.index(name) for name in names])
    if model.config.null_class:
        return None
    raise UserError(f"This model is conditioned on classes, and those of {pictures.source} are not its classes.")


def _batches(model: ImageModel, pictures: ImageDataset, size: int) -> Iterator[tuple[int, Bytes, Tensor | None]]:
    """Yield (index of the first picture, pictures, labels) of each batch, on the model's device."""
    labels, device = condition_labels(model, pictures), next(model.parameters()).device
    for first in range(0, len(pictures), size):
        part = slice(first, first + size)
        yield first, pictures.take(part).to(device), None if labels is None else labels[part].to(device)


def _mean(values: Tensor, digits: int = 2) -> float:
    return round(math.fsum(values.tolist()) / len(values), digits)


ABOUT = "drawing: a model that removes noise, on pictures"
NAMES = CATALOGUED
OPTIONS = {"seed", "batch_size", "output", "sampler", "steps", "metric", "guidance", "judge"}
METRICS = "distances", "reconstruction", "bits", "classes"
DRAWN, BATCH = 1000, 64
AGAIN, COUNTED = 256, 64  # maximal held-out pictures for reconstruction, and for bits
COMPARED = 10_000  # maximal real pictures for the distances
SHOWN, ACROSS = 24, 4  # drawn pictures on the sheet, and in each of its rows


class Neighbours(NamedTuple):
    """Nearest real picture of each drawn picture, by pixels and by features, and the distance of the former.

    differences: root mean squared difference of two pictures' bytes, 0 to 255.
    """

    by_pixels: Int[Tensor, " picture"]
    differences: Float[Tensor, " picture"]
    by_features: Int[Tensor, " picture"]


def takes(model: nn.Module) -> bool:
    """Return whether the model is a diffusion model without text conditioning."""
    return isinstance(model, ImageModel) and model.draws == "pixels"


def accepts(on: str) -> bool:
    """Return whether `on` is a folder, or .tar shards."""
    return Path(on).expanduser().exists() or on.endswith(".tar")


def evaluate(model: nn.Module, tokenizer: object, request: EvalRequest) -> EvalResult:
    """Return the figures of `metric`, or of all three default metrics.

    distances: generated images against training images, by features; and by pixels, to detect copies. reconstruction
    and bits: of held-out images. classes: how a classifier labels images drawn of each class.
    """
    drawer = pixel_diffusion.require_diffusion_model(model)
    require_known("metric of a diffusion model", METRICS[0] if request.metric is None else request.metric, METRICS)
    if request.metric == "classes":
        return class_agreement(drawer, request)
    if request.judge is not None or request.guidance is not None:
        raise UserError("--judge and --guidance are for the metric classes alone: give --metric classes, or neither.")
    parts = _real_images(drawer, request)
    drawn_result = (
        _compare_drawings(drawer, parts, request) if request.metric in (None, "distances") else EvalResult({})
    )
    held_out_result = EvalResult({}) if request.metric == "distances" else _held_out(drawer, parts.test, request)
    return replace(
        drawn_result,
        figures=drawn_result.figures | held_out_result.figures,
        notes=drawn_result.notes + held_out_result.notes,
        tables=held_out_result.tables,
    )


def class_agreement(drawer: ImageModel, request: EvalRequest) -> EvalResult:
    """Return how often a classifier of grey images recognises the class for which an image was drawn."""
    judge, classes = request.judge, drawer.config.classes or ()
    if not isinstance(judge, RowClassifier) or not classes:
        raise UserError("The metric classes needs a model conditioned on named classes, and --judge one of digits.")
    size = drawer.colours * math.prod(pixel_diffusion.trained_size(drawer))
    if sorted(judge.classes) != sorted(classes) or judge.config.dim != size:
        raise UserError(
            f"The judge reads {judge.config.dim} numbers of the classes {', '.join(judge.classes)}: no judge of these."
        )
    count, guidance = request.limit or DRAWN, 1.0 if request.guidance is None else request.guidance
    pipeline = pixel_diffusion.PixelPipeline(drawer)
    drawing = pipeline.resolved(ImageRequest(request.sampler or "ddim", request.steps, request.seed, 0, guidance))
    generated = _generated(pipeline, drawing, count, request.batch_size or BATCH, range(len(classes)))
    predicted = judge.predict_proba(generated.flatten(1) / 255).argmax(-1).tolist()
    seen_classes = torch.tensor([classes.index(judge.classes[index]) for index in predicted])
    confusion = Confusion.of(torch.arange(count) % len(classes), seen_classes, classes)
    compared = compare_images(extractor(), generated, *_real_images(drawer, request).evaluated())[1]
    readings = [
        (request.seed + n, classes[n % len(classes)], classes[index]) for n, index in enumerate(seen_classes.tolist())
    ]
    how = f"{drawing.sampler} in {drawing.steps} steps, guidance {guidance:g}, seeds {request.seed} and on"
    figures = confusion.accuracy_figures("asked class seen") | compared | {"pictures": count}
    tables, items = {"by class": confusion.result("pictures")}, ResultTable(("seed", "asked", "read as"), readings)
    return EvalResult(figures, (f"{count:,} pictures by {how}.",), tables, items)


def _compare_drawings(drawer: ImageModel, parts: ImageSplit, request: EvalRequest) -> EvalResult:
    """Generate images and compare them with the real ones."""
    any_class = 0 if drawer.config.n_classes and not drawer.config.null_class else None
    pipeline = pixel_diffusion.PixelPipeline(drawer)
    drawing = pipeline.resolved(ImageRequest(request.sampler or "ddim", request.steps, request.seed, any_class))
    labels = [None] if any_class is None else range(drawer.config.n_classes)
    generated = _generated(pipeline, drawing, request.limit or DRAWN, request.batch_size or BATCH, labels)
    return write_neighbours(generated, *parts.evaluated(), request, drawing)


def write_neighbours(
    generated: Bytes, real: ImageDataset, held_out: ImageDataset | None, request: EvalRequest, drawing: ImageRequest
) -> EvalResult:
    """Compare generated images with real ones. Return distances, remarks, each one's nearest real image, and a picture
    of some."""
    extract = extractor()
    near, figures = compare_images(extract, generated, real, held_out)
    notes = [
        f"{len(generated):,} pictures by {drawing.sampler} in {drawing.steps} steps, seeds {drawing.seed} and on, next "
        f"to {len(real):,} of {request.on} at {real.shape[2]} x {real.shape[1]}; features: {extract.name}.",
        "The Fréchet distance falls with the number of drawn pictures: compare it between equal numbers only.",
    ]
    if extract.titles != PAPERS:
        notes.append(f"Inception's weights are not at {place()}: these are no FID and KID as papers print them.")
    columns = "seed", "nearest by pixels", "difference", "nearest by features"
    seeds = range(request.seed, request.seed + len(generated))
    by_pixels, by_features = (
        [real.names[n] for n in indices.tolist()] for indices in (near.by_pixels, near.by_features)
    )
    differences = [round(difference, 3) for difference in near.differences.tolist()]
    items = ResultTable(columns, list(zip(seeds, by_pixels, differences, by_features, strict=True)))
    return EvalResult(figures, tuple(notes), {}, items, side_by_side(generated, real, near, request.seed))


def _held_out(drawer: ImageModel, pictures: ImageDataset, request: EvalRequest) -> EvalResult:
    """Return reconstruction and bits of held-out images. If they cannot be computed, add a note, or raise `UserError`
    if the metric was requested by name."""
    try:
        if not len(pictures):
            raise UserError(f"{request.on} has too few pictures to hold one out, so none can be found again in noise.")
        if drawer.coder is not None:
            raise UserError("This model sees latents and no pixels, so pictures are not found again in their noise.")
        condition_labels(drawer, pictures)
    except UserError as error:
        if request.metric:
            raise
        return EvalResult({}, (str(error),))
    figures, tables, notes, size = {}, {}, [], request.batch_size or BATCH
    if request.metric in (None, "reconstruction"):
        sample = pictures.spread(request.limit or AGAIN)
        figures, tables["reconstruction"] = reconstruct(drawer, sample, request.seed, size)
        notes.append(
            f"PSNR and SSIM: {len(sample):,} held-out pictures, noise added until a half of their variance is left "
            "(the table has other shares), and taken off by ddim without chance (η = 0) along the rest of a path of "
            f"{min(STEPS, drawer.noise.steps)} steps."
        )
    if request.metric == "bits" or (request.metric is None and not drawer.noise.flows):  # flow models have no bound
        sample = pictures.spread(request.limit or COUNTED)
        figures |= bits(drawer, sample, request.seed, size)
        notes.append(
            f"bits/dim: the variational bound of {len(sample):,} held-out pictures, one draw of noise for each of "
            f"{drawer.noise.steps:,} steps; the decoder gives each number one of 256 grey values."
        )
    return EvalResult(figures, tuple(notes), tables)


def compare_images(
    extract: Extractor, generated: Bytes, real: ImageDataset, held_out: ImageDataset | None
) -> tuple[Neighbours, Figures]:
    """Return the nearest real images, and figures of generated images against real ones, with those of held-out images
    for comparison."""
    references = real.spread(COMPARED)
    features, known_features = extract(generated), extract(references.take(slice(None)))
    figures = _figures(extract, known_features, features, "")
    near = nearest_neighbours(generated, features, references, known_features, real)
    figures["median difference to the nearest real picture"] = round(float(near.differences.median()), 2)
    if held_out is not None and len(held_out) >= 4:
        held_out_pictures = held_out.take(slice(None))
        other_features = extract(held_out_pictures)
        figures |= _figures(extract, known_features, other_features, " of held-out pictures")
        held_out_differences = nearest_neighbours(
            held_out_pictures, other_features, references, known_features, real
        ).differences
        figures["median difference of held-out pictures"] = round(float(held_out_differences.median()), 2)
        nearer = (near.differences < held_out_differences.quantile(0.01)).float().mean()
        figures["share nearer than 99% of held-out pictures"] = round(float(nearer), 4)
    return near, figures


def _figures(extract: Extractor, real: Tensor, generated: Tensor, whose: str) -> Figures:
    """Return Fréchet and kernel distance, precision and recall by name."""
    distance, (precision, recall) = kernel_distance(real, generated), manifold(real, generated)
    titles = extract.titles
    return {
        f"{titles[0]}{whose}": round(frechet(real, generated), 4),
        f"{titles[1]} x 1000{whose}": round(1000 * distance.mean, 4),
        f"{titles[1]} x 1000, deviation of subsets of {distance.size}{whose}": round(1000 * distance.deviation, 4),
        f"precision{whose}": round(precision, 4),
        f"recall{whose}": round(recall, 4),
    }


def nearest_neighbours(
    generated: Bytes, features: Tensor, references: ImageDataset, known_features: Tensor, real: ImageDataset
) -> Neighbours:
    """Return the nearest of all real pictures by pixels, and the nearest of the `references` ones by features."""
    pixels = generated.flatten(1)
    distances, indices = nearest(pixels, real.take(slice(None)).flatten(1))
    by_features = nearest(features, known_features)[1]
    where = {name: index for index, name in enumerate(real.names)}
    among = torch.tensor([where[references.names[neighbour]] for neighbour in by_features.tolist()])
    return Neighbours(indices, distances / math.sqrt(pixels.shape[1]), among)


def side_by_side(generated: Bytes, real: ImageDataset, near: Neighbours, seed: int) -> bytes:
    """Draw a PNG: some generated images, each with the nearest real one by pixels and the nearest by features."""
    count = min(SHOWN, len(generated))
    one, other = near.by_pixels[:count].tolist(), near.by_features[:count].tolist()
    triples = torch.stack([generated[:count], real.take(one), real.take(other)], 1)
    captions = list[str]()
    for n in range(count):
        captions += f"seed {seed + n}", f"pixels: {_sentence(real, one[n])}", f"features: {_sentence(real, other[n])}"
    return grid(triples.flatten(0, 1), captions, columns=3 * ACROSS)


def _sentence(pictures: ImageDataset, index: int) -> str:
    """Return the caption of a picture, or else its class, or else its name."""
    if pictures.captions:
        return pictures.texts()[index]
    return pictures.classes[pictures.labels[index]] if pictures.labels[index] >= 0 else pictures.names[index]


def _real_images(model: ImageModel, request: EvalRequest) -> ImageSplit:
    """Return the images at the model's size with the split that the model was trained on."""
    pictures = read_squares(request.on, pixel_diffusion.trained_size(model), model.colours)
    return split_of_run(pictures, request.held_out)


def read_squares(on: str, size: tuple[int, int], channels: int) -> ImageDataset:
    """Read a picture set in the height, width and channels that a model draws."""
    if size[0] != size[1]:
        raise UserError(f"This model draws {size[1]} x {size[0]} pictures, and only squares can be compared.")
    return read_images(on, size[0], 1 if channels == 1 else 3)


def _generated(
    pipeline: pixel_diffusion.PixelPipeline, drawing: ImageRequest, count: int, size: int, labels: Sequence[int | None]
) -> Bytes:
    """Generate `count` images with consecutive seeds, of each class in turn."""
    pictures: dict[int, Tensor] = {}
    with counting("Drawing", count, "pictures") as advance:
        for turn, label in enumerate(labels):
            numbers = range(turn, count, len(labels))
            for first in range(0, len(numbers), size):
                part = numbers[first : first + size]
                seeds = [(drawing.seed or 0) + number for number in part]
                pictures |= zip(part, pipeline.draw(replace(drawing, label=label), seeds), strict=True)
                advance(len(pictures))
    return torch.stack([pictures[number] for number in range(count)])
