"""Every option of the recipes for pictures reaches what it names, and the papers' figures stand in them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_captions
import wiring
from wiring import DIFFERENT, MINUTES, Group, Reach

from keifu.data.images.augmentation import Augmentation
from keifu.errors import UserError
from keifu.layers.lora import adapters
from keifu.models.classic import gan as gan_model
from keifu.models.clip import image as clip_image, text as clip_text
from keifu.models.diffusion import autoencoder_kl, vq_vae
from keifu.recipes.images import (
    clip,
    dalle,
    ddpm,
    dit,
    gan,
    image_runs,
    latent_diffusion,
    lora_image,
    mean_flow,
    score,
    unclip,
    vq,
)  # fmt: skip
from keifu.training.settings import Settings

SMALL = Settings(steps=30, batch_size=4)
OTHER = Settings(
    steps=31, batch_size=5, learning_rate=0.007, warmup=3, weight_decay=0.03, betas=(0.7, 0.8), epsilon=1e-5, clip=0.4,
    ema=0.9, precision="float32", seed=7, save_every=13, keep=4,
)  # fmt: skip


@dataclass(frozen=True)
class Toys:
    """Paths of pictures and models that read or draw them."""

    drawings: str
    others: str
    clip: str
    wide_clip: str
    latent: str
    other_latent: str
    classes: str
    long: str
    out: Path


@pytest.fixture(scope="module")
def toys(own_cache: pytest.MonkeyPatch, drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """Return two sets of drawings, two CLIPs whose text towers are as wide as their space, and two latent
    diffusions."""
    folder = tmp_path_factory.mktemp("toys")
    torch.set_num_threads(1)
    for name in ("others", "long"):
        (folder / name).mkdir()
        toy_captions.drawings(folder / name)
    captions = folder / "long" / "metadata.jsonl"
    captions.write_text(captions.read_text().replace("a small", "a small " * 40))
    for name in ("a", "b"):
        (folder / "classes" / name).mkdir(parents=True)
        for path in sorted(drawings.glob("*.png"))[name == "b" :: 2]:
            (folder / "classes" / name / path.name).write_bytes(path.read_bytes())
    for name, dim in (("clip", 16), ("wide-clip", 32)):
        text = clip_text.Config(600, 16, dim, 32, 1, 2, embedding_dim=dim)
        image = clip_image.Config(24, 6, 3, 24, 48, 1, 2, embedding_dim=dim)
        wiring.run("clip", toy_captions.small_clip(drawings, text=text, image=image), folder / name, True)
    for name, clip_name in (("latent", "clip"), ("other-latent", "wide-clip")):
        wiring.run("latent_diffusion", small_latent(str(drawings), str(folder / clip_name)), folder / name, True)
    names = ("others", "clip", "wide-clip", "latent", "other-latent", "classes", "long")
    return Toys(str(drawings), *(str(folder / name) for name in names), folder / "runs")


def small_latent(drawings: str, towers: str | None) -> latent_diffusion.Recipe:
    return latent_diffusion.Recipe(
        drawings, clip=towers, size=24, autoencoder_widths=(4, 8), latent_channels=3, widths=(8, 16), attention=(1,),
        heads=2, autoencoder_steps=3, clip_steps=2, steps=3, autoencoder_batch=4, clip_batch=4, batch_size=4,
        prompts=("a small red disc", "a large blue bar"), precision="float32",
    )  # fmt: skip


def source(record: Any) -> str:
    return record.run.about["data"][0]["source"]


def languages(record: Any) -> int:
    """Count the languages that have captions."""
    return len(_pictures(record).training_tokens)


def _pictures(record: Any) -> Any:
    """Return the innermost data of pictures, without its wrappers."""
    data = record.data
    while hasattr(data, "data"):
        data = data.data
    return data


def caption_length(record: Any) -> int:
    return _pictures(record).training_tokens.shape[-1]


def loop_rows(steps: str = "steps") -> dict[str, Reach]:
    """Return the rows of recipes whose last part has these options."""
    return {
        steps: Reach(41, "settings.steps"),
        "batch_size": Reach(6, ("settings.batch_size", lambda r: _pictures(r).batch_size)),
        "learning_rate": Reach(0.0071, "settings.learning_rate"),
        "precision": Reach("bfloat16", "settings.precision"),
        "seed": Reach(5, ("settings.seed", lambda r: _pictures(r).seed)),
    }


def kept_rows() -> dict[str, Reach]:
    """Return the rows of recipes that keep a moving average."""
    return loop_rows() | {"ema": Reach(0.81, "settings.ema"), "keep": Reach(5, "settings.keep")}


def clip_rows() -> dict[str, Reach]:
    """Return the rows of the CLIP that is trained as a part of a run."""
    return {"clip_steps": Reach(11, "clip:settings.steps"), "clip_batch": Reach(3, "clip:settings.batch_size")}


def clip_groups() -> list[Group]:
    """Return the groups where a CLIP is trained first, and what it is given."""
    own = {"clip": None, "clip_steps": 2, "clip_batch": 4}
    more = {"seed": Reach(5, "clip:settings.seed"), "precision": Reach("bfloat16", "clip:settings.precision")}
    more |= {"languages": Reach(("en",), lambda r: languages(r.parts["clip"]), 1)}
    minutes = {"clip_minutes": Reach(0.07, "clip:settings.steps", round(0.07 * MINUTES))}
    return [Group(clip_rows() | more, own), Group(minutes, own | {"clip_steps": None})]


def sampled() -> dict[str, Reach]:
    """Return the rows of the samples."""
    return {"prompts": Reach(("a bar",), "sample.recipe.prompts")}


def of_clip(toys: Toys) -> tuple[Any, list[Group]]:
    base = replace(SMALL_CLIP, data=toys.drawings, training=SMALL)
    image, resnet = replace(base.image, dim=32, n_layers=2), replace(base.resnet, image_size=64, width=8)
    rows = {
        "data": Reach(toys.others, lambda r: r.run.options["data"]),
        "languages": Reach(("ja",), languages, 1),
        "vocab_size": Reach(530, "model.config.text.vocab_size"),
        "image": Reach(image, "model.config.image"),
        "text": Reach(replace(base.text, dim=32, n_layers=2), "model.config.text", but=("vocab_size", "end_id")),
        "hard_negatives": Reach(True, "data.hard_negatives"),
        "augmentation": Reach(Augmentation(True, 1, 0.2, 3.0, 0.3, 0.4, 0.5), "data.augmentation"),
        "training": Reach(OTHER, "settings"),
    }
    batch = {"training": Reach(replace(SMALL, batch_size=3, seed=9), ("data.batch_size", "data.seed"), DIFFERENT)}
    tower = {"tower": Reach("resnet", lambda r: type(r.model.config.image).__name__, "ResNetConfig")}
    seen = {"resnet": Reach(replace(resnet, embedding_dim=16), "model.config.image")}
    short = {"text": replace(base.text, context_length=5), "languages": ("en",)}
    start = {"start_from": Reach(toys.wide_clip, "model.config.text.dim", 32)}
    known = {"tokenizer": Reach(toys.clip, "model.config.text.vocab_size", DIFFERENT)}
    ways = {"tower": "resnet", "resnet": replace(base.resnet, image_size=72, width=8, embedding_dim=16)}
    truncate = {"truncate": Reach(True, caption_length, 5)}
    evenly = {"evenly": Reach(True, "data.evenly")}
    return base, [
        Group(rows), Group(batch), Group(tower, {"resnet": ways["resnet"]}), Group(seen, ways), Group(start),
        Group(known, {"vocab_size": 520}), Group(truncate, short, refused=True), Group(evenly),
    ]  # fmt: skip


def of_gan(toys: Toys) -> tuple[Any, list[Group]]:
    model = gan_model.Config(size=8, channels=3, latent_dim=6, widths=(4, 6))
    base = gan.Recipe(toys.drawings, model, training=SMALL)
    other = replace(model, size=16, channels=1, latent_dim=7, network="mlp", widths=(5,), hidden_dim=11, norm="none")
    return base, [Group({
        "data": Reach(toys.others, lambda r: r.run.options["data"]),
        "model": Reach(other, "model.config"),
        "flip": Reach(True, lambda r: _pictures(r).augmentation.flip),
        "held_out": Reach(0.3, lambda r: len(_pictures(r).held_out), DIFFERENT),
        "samples": Reach(3, "sample.count"),
        "training": Reach(OTHER, "settings", but=("micro_batch",)),
    }), Group({"training": Reach(replace(SMALL, seed=8, batch_size=3), (
        "settings.micro_batch", lambda r: _pictures(r).batch_size), 3)}),
        Group({"training": Reach(replace(SMALL, seed=8), "data.key", 8)}),
    ]  # fmt: skip


def of_vq(toys: Toys) -> tuple[Any, list[Group]]:
    model = vq_vae.Config(8, 3, 4, (4, 6), 1, codebook_size=9, norm_groups=2)
    base = vq.Recipe(toys.drawings, model, training=SMALL)
    other = replace(model, size=16, channels=1, latent_channels=5, widths=(6, 6), codebook_size=11, scale=2.0)
    rows = {
        "data": Reach(toys.others, lambda r: r.run.options["data"]),
        "model": Reach(other, "model.config"),
        "decay": Reach(0.8, "model.codebook.decay"),
        "least_usage": Reach(0.3, "model.codebook.least"),
        "commitment": Reach(0.4, "objective.commitment"),
        "flip": Reach(True, lambda r: _pictures(r).augmentation.flip),
        "held_out": Reach(0.3, lambda r: len(_pictures(r).held_out), DIFFERENT),
        "training": Reach(OTHER, "settings", but=("micro_batch",)),
    }
    learned = {"codebook": Reach("gradient", ("model.codebook.averages", "settings.micro_batch"), DIFFERENT)}
    seed = {"training": Reach(replace(SMALL, seed=8, batch_size=3), ("data.key", "settings.micro_batch"), DIFFERENT)}
    return base, [Group(rows), Group(learned), Group(seed)]


def of_score(toys: Toys) -> tuple[Any, list[Group]]:
    base = score.Recipe("moons", points=50, hidden_dim=8, training=SMALL)
    sampling = score.PointSampling(sampler="ode", process="ve", sampling_steps=7, guidance=2.0, count=30)
    return base, [Group({
        "data": Reach("spiral", source),
        "points": Reach(60, lambda r: len(_pictures(r).training)),
        "hidden_dim": Reach(9, "model.config.hidden_dim"),
        "n_layers": Reach(2, "model.config.n_layers"),
        "label_dropout": Reach(0.7, "objective.label_dropout"),
        "sampling": Reach(sampling, "sample.recipe.sampling"),
        "training": Reach(OTHER, "settings"),
    }), Group({"training": Reach(replace(SMALL, batch_size=3), lambda r: _pictures(r).batch_size, 3)}),
        Group({"training": Reach(replace(SMALL, seed=8), "data.key", 8)}),
    ]  # fmt: skip


def of_mean_flow(toys: Toys) -> tuple[Any, list[Group]]:
    base = mean_flow.Recipe(toys.classes, size=8, n_heads=2, head_dim=4, n_layers=1, training=SMALL)
    return base, [Group({
        "data": Reach(toys.drawings, lambda r: r.run.options["data"]),
        "size": Reach(12, "model.config.size"),
        "patch_size": Reach(2, "model.config.patch_size"),
        "n_layers": Reach(2, "model.config.n_layers"),
        "n_heads": Reach(3, "model.config.n_heads"),
        "head_dim": Reach(8, "model.config.head_dim"),
        "moving": Reach(0.7, "objective.moving"),
        "power": Reach(0.5, "objective.power"),
        "jumps": Reach(3, "sample.jumps"),
        "flip": Reach(True, lambda r: _pictures(r).augmentation.flip),
        "held_out": Reach(0.3, lambda r: len(_pictures(r).held_out), DIFFERENT),
        "training": Reach(OTHER, "settings", but=("micro_batch",)),
    }), Group({"classes": Reach(True, "model.config.n_classes", DIFFERENT)}),
        Group({"training": Reach(replace(SMALL, batch_size=3), lambda r: _pictures(r).batch_size, 3)}),
        Group({"training": Reach(replace(SMALL, seed=8), "data.key", 8)}),
    ]  # fmt: skip


def of_ddpm(toys: Toys) -> tuple[Any, list[Group]]:
    base = ddpm.Recipe(
        toys.classes, size=16, channels=3, dim=8, multipliers=(1, 2), residual_blocks=1, steps=30, batch_size=4,
    )  # fmt: skip
    rows = kept_rows() | {
        "data": Reach(toys.drawings, lambda r: r.run.options["data"]),
        "size": Reach(24, "model.config.size"),
        "channels": Reach(1, "model.config.channels"),
        "dim": Reach(12, "model.config.dim"),
        "multipliers": Reach((1, 2, 3), "model.config.multipliers"),
        "residual_blocks": Reach(2, "model.config.n_residual_blocks"),
        "attention": Reach((0, 2), "model.config.attention"),
        "dropout": Reach(0.37, "model.config.dropout"),
        "scale_shift": Reach(False, "model.config.scale_shift"),
        "schedule": Reach("linear", ("model.config.noise.schedule", "objective.noise.schedule")),
        "noise_steps": Reach(77, ("model.config.noise.steps", "objective.noise.steps")),
        "target": Reach("noise", ("model.config.noise.target", "objective.noise.target")),
        "variance": Reach("fixed_large", ("model.config.noise.variance", "objective.noise.variance")),
        "weighting": Reach("p2", "objective.weighting"),
        "gamma": Reach(2.5, "objective.gamma"),
        "times": Reach("logit_normal", "objective.sampling"),
        "flip": Reach(False, lambda r: _pictures(r).augmentation.flip),
        "micro_batch": Reach(2, "settings.micro_batch"),
        "held_out": Reach(0.3, lambda r: len(_pictures(r).held_out), DIFFERENT),
    }
    classes = {"classes": Reach(True, ("model.config.n_classes"), 2)}
    dropout = {"label_dropout": Reach(0.35, "objective.label_dropout")}
    none = {"label_dropout": Reach(0.0, ("model.config.null_class", "objective.label_dropout"), 0.0)}
    spread = {"dequantise": Reach(True, lambda r: r.data.key, "dequantised")}
    minutes = {"minutes": Reach(0.5, "settings.steps", MINUTES // 2)}
    paper = {"recipe_of": Reach("paper", "settings.schedule", "constant")}
    seed = {"seed": Reach(5, ("data.key", "sample.seeds.0"))}
    flow = {"schedule": Reach("flow", ("objective.noise.target", "model.config.noise.schedule"), "flow")}
    wide = Path(toys.out).with_name("wide-ddpm")
    wiring.run("ddpm", replace(base, dim=16), wide, True)
    start = {"start_from": Reach(str(wide), "model.config.dim", 16)}
    return base, [
        Group(start), Group(rows), Group(classes), Group(dropout, {"classes": True}), Group(none, {"classes": True}),
        Group(spread),
        Group(minutes, {"steps": None}), Group(paper), Group(seed), Group(flow),
    ]  # fmt: skip


def of_dit(toys: Toys) -> tuple[Any, list[Group]]:
    base = dit.Recipe(
        toys.classes, size=16, channels=3, n_layers=1, n_heads=2, head_dim=8, steps=30, batch_size=4,
    )  # fmt: skip
    rows = kept_rows() | {
        "data": Reach(toys.drawings, lambda r: r.run.options["data"]),
        "size": Reach(24, "model.config.transformer.size"),
        "channels": Reach(1, "model.config.channels"),
        "patch_size": Reach(8, "model.config.transformer.patch_size"),
        "n_layers": Reach(2, "model.config.transformer.n_layers"),
        "n_heads": Reach(3, "model.config.transformer.n_heads"),
        "head_dim": Reach(16, "model.config.transformer.head_dim"),
        "dropout": Reach(0.37, "model.config.transformer.dropout"),
        "noise_steps": Reach(77, ("model.config.noise.steps", "objective.noise.steps")),
        "target": Reach("picture", ("model.config.noise.target", "objective.noise.target")),
        "times": Reach("logit_normal", "objective.sampling"),
        "flip": Reach(False, lambda r: _pictures(r).augmentation.flip),
        "micro_batch": Reach(2, "settings.micro_batch"),
        "held_out": Reach(0.3, lambda r: len(_pictures(r).held_out), DIFFERENT),
    }
    linear = {"schedule": Reach("linear", ("model.config.noise.target", "objective.noise.target"), "noise")}
    classes = {"classes": Reach(True, ("model.config.n_classes"), 2)}
    dropout = {"label_dropout": Reach(0.35, "objective.label_dropout")}
    spread = {"dequantise": Reach(True, lambda r: r.data.key, "dequantised")}
    minutes = {"minutes": Reach(0.5, "settings.steps", MINUTES // 2)}
    seed = {"seed": Reach(5, ("data.key", "sample.seeds.0"))}
    coder = {"autoencoder": Reach(f"{toys.latent}/autoencoder", "model.config.factor", 2)}
    wide = Path(toys.out).with_name("wide-dit")
    wiring.run("dit", replace(base, head_dim=16), wide, True)
    start = {"start_from": Reach(str(wide), "model.config.transformer.head_dim", 16)}
    return base, [
        Group(start), Group(rows), Group(linear), Group(classes), Group(dropout, {"classes": True}), Group(spread),
        Group(minutes, {"steps": None}), Group(seed), Group(coder, {"size": 24}),
    ]  # fmt: skip


def of_dalle(toys: Toys) -> tuple[Any, list[Group]]:
    base = dalle.Recipe(
        toys.drawings, clip=toys.clip, size=16, codebook_size=16, vae_widths=(8, 8), code_dim=8, dim=16, hidden_dim=32,
        n_layers=2, n_heads=2, kernel=3, vae_steps=30, steps=30, vae_batch=4, batch_size=4, prompts=("a red disc",),
        precision="float32",
    )  # fmt: skip
    rows = kept_rows() | sampled() | {
        "data": Reach(toys.others, lambda r: r.run.options["data"]),
        "languages": Reach(("ja",), languages, 1),
        "size": Reach(24, "model.config.vae.size"),
        "codebook_size": Reach(24, "model.config.vae.codebook_size"),
        "vae_widths": Reach((8, 16), "model.config.vae.widths"),
        "code_dim": Reach(12, "model.config.vae.code_dim"),
        "kl_weight": Reach(0.7, ("dvae:data.key.kl_weight.end",)),
        "flip": Reach(False, lambda r: _pictures(r.parts["dvae"]).augmentation.flip),
        "dim": Reach(24, "model.config.dim"),
        "hidden_dim": Reach(48, "model.config.hidden_dim"),
        "n_layers": Reach(3, "model.config.n_layers"),
        "n_heads": Reach(4, "model.config.n_heads"),
        "kernel": Reach(5, "model.config.kernel"),
        "sparse": Reach(False, "model.config.sparse"),
        "text_weight": Reach(0.3, "objective.text_weight"),
        "vae_steps": Reach(50, "dvae:settings.steps"),
        "vae_batch": Reach(7, ("dvae:settings.batch_size", lambda r: _pictures(r.parts["dvae"]).batch_size)),
        "vae_rate": Reach(0.0091, "dvae:settings.learning_rate"),
    }  # fmt: skip
    anneal = {"anneal": Reach(0.2, "dvae:data.key.temperature.steps", 6)}
    minutes = {"minutes": Reach(0.5, "settings.steps", MINUTES // 2)}
    minutes |= {"vae_minutes": Reach(0.4, "dvae:settings.steps", round(0.4 * MINUTES))}
    seed = {"seed": Reach(5, ("dvae:settings.seed", "dvae:data.data.key", "sample.seeds.0"))}
    seed |= {"precision": Reach("bfloat16", "dvae:settings.precision")}
    return base, [
        Group(rows), Group(anneal), Group(minutes, {"steps": None, "vae_steps": None}), Group(seed),
        Group({"clip": Reach(None, lambda r: "clip" in r.parts, True)}, {"clip_steps": 2, "clip_batch": 4}),
        truncated(toys), *clip_groups(),
    ]  # fmt: skip


def truncated(toys: Toys) -> Group:
    """Return the group of captions that are too long for the CLIP that is trained first: its context is 32 tokens."""
    own = {"clip": None, "clip_steps": 2, "clip_batch": 4, "data": toys.long, "languages": ("en",)}
    return Group({"truncate": Reach(True, lambda r: caption_length(r) == caption_length(r.parts["clip"]))}, own, True)


def of_latent_diffusion(toys: Toys) -> tuple[Any, list[Group]]:
    base = small_latent(toys.drawings, toys.clip)
    rows = kept_rows() | sampled() | {
        "data": Reach(toys.others, lambda r: r.run.options["data"]),
        "languages": Reach(("ja",), languages, 1),
        "size": Reach(16, "model.config.autoencoder.size"),
        "clip": Reach(toys.wide_clip, "model.config.text.dim", 32),
        "autoencoder_widths": Reach((8, 16), "model.config.autoencoder.widths"),
        "latent_channels": Reach(5, ("model.config.autoencoder.latent_channels", "model.config.unet.channels")),
        "kl_weight": Reach(0.07, "autoencoder:objective.kl_weight"),
        "edges": Reach(0.6, "autoencoder:objective.edges"),
        "flip": Reach(False, lambda r: _pictures(r.parts["autoencoder"]).augmentation.flip),
        "widths": Reach((8, 16, 24), "model.config.unet.widths"),
        "attention": Reach((0, 2), ("model.config.unet.attention", "model.config.unet.up_attention")),
        "heads": Reach(4, "model.config.unet.n_heads"),
        "residual_blocks": Reach(2, "model.config.unet.n_residual_blocks"),
        "schedule": Reach("linear", ("model.config.noise.schedule", "objective.noise.schedule")),
        "target": Reach("noise", ("model.config.noise.target", "objective.noise.target")),
        "weighting": Reach("simple", "objective.weighting"),
        "caption_dropout": Reach(0.35, "objective.label_dropout"),
        "evenly": Reach(True, lambda r: _pictures(r).evenly),
        "autoencoder_steps": Reach(50, "autoencoder:settings.steps"),
        "autoencoder_batch": Reach(7, "autoencoder:settings.batch_size"),
        "autoencoder_rate": Reach(0.0091, "autoencoder:settings.learning_rate"),
        "guidance": Reach(2.25, "sample.request.guidance"),
    }  # fmt: skip
    minutes = {"minutes": Reach(0.5, "settings.steps", MINUTES // 2)}
    minutes |= {"autoencoder_minutes": Reach(0.4, "autoencoder:settings.steps", round(0.4 * MINUTES))}
    pixels = {"autoencoder_minutes": Reach(0.4, "settings.steps", round(0.9 * MINUTES))}
    of_pixels = {"steps": None, "space": "pixels", "minutes": 0.5}
    space = {"space": Reach("pixels", lambda r: r.model.autoencoder is None, True)}
    own = ("autoencoder:settings.seed", "autoencoder:data.key", "data.data.key", "sample.seeds.0")
    seed = {"seed": Reach(5, own)}
    seed |= {"precision": Reach("bfloat16", "autoencoder:settings.precision")}
    start = {"start_from": Reach(toys.other_latent, "model.config.text.dim", 32)}
    last = {"keep_best": Reach(False, "settings.keep_best")}
    return base, [
        Group(start), Group(last, {"start_from": toys.other_latent}), Group(rows),
        Group(minutes, {"steps": None, "autoencoder_steps": None}),
        Group(pixels, of_pixels), Group(space),
        Group(seed), truncated(toys), *clip_groups(),
    ]  # fmt: skip


def of_unclip(toys: Toys) -> tuple[Any, list[Group]]:
    base = unclip.Recipe(
        data=toys.drawings, clip=toys.clip, size=16, small=8, crop=8, prior_layers=1, prior_heads=2, head_dim=8,
        widths=(8, 16), attention=(1,), context_dim=16, upsampler_widths=(8, 16), noise_steps=50, steps=4, batch_size=4,
        prompts=("a red disc", "a blue bar"), precision="float32",
    )  # fmt: skip
    rows = kept_rows() | sampled() | {
        "data": Reach(toys.others, lambda r: r.run.options["data"]),
        "languages": Reach(("ja",), languages, 1),
        "clip": Reach(toys.wide_clip, "model.config.text.dim", 32),
        "size": Reach(24, ("model.config.upsampler.size")),
        "small": Reach(12, ("model.config.decoder.size", "objective.small.0", "objective.small.1")),
        "crop": Reach(12, "objective.crop"),
        "prior_layers": Reach(2, "model.config.prior.n_layers"),
        "prior_heads": Reach(4, "model.config.prior.n_heads"),
        "head_dim": Reach(4, "model.config.prior.head_dim"),
        "widths": Reach((8, 16, 24), "model.config.decoder.widths"),
        "attention": Reach((0, 2), ("model.config.decoder.attention", "model.config.decoder.up_attention")),
        "residual_blocks": Reach(2, "model.config.decoder.n_residual_blocks"),
        "context_dim": Reach(24, ("model.config.decoder.context_dim", "model.config.conditions.context_dim")),
        "upsampler_widths": Reach((12, 24), "model.config.upsampler.dim", 12),
        "target": Reach("picture", ("objective.decoder.noise.target", "objective.upsampler.noise.target")),
        "weighting": Reach("min_snr", "objective.decoder.weighting"),
        "noise_steps": Reach(60, tuple(f"objective.{part}.noise.steps" for part in ("prior", "decoder", "upsampler"))),
        "prior_dropout": Reach(0.31, "objective.prior_dropout"),
        "text_dropout": Reach(0.32, "objective.text_dropout"),
        "image_dropout": Reach(0.33, "objective.image_dropout"),
        "guidance": Reach(2.25, ("sample.request.guidance", "sample.request.prior_guidance")),
    }  # fmt: skip
    minutes = {"minutes": Reach(0.5, "settings.steps", MINUTES // 2)}
    seed = {"seed": Reach(5, ("data.data.key", "sample.seeds.0"))}
    groups = clip_groups()
    return base, [Group(rows), Group(minutes, {"steps": None}), Group(seed), *groups, truncated(toys)]


def of_lora_image(toys: Toys) -> tuple[Any, list[Group]]:
    base = lora_image.Recipe(toys.latent, toys.drawings, steps=8, batch_size=3, rank=2, guidance=2.0)

    def adapter(record: Any, part: str, what: str) -> Any:
        found = (a.low for a in adapters(record.model) if a.target.label.startswith(part))
        return getattr(next(found, None), what, None)

    rows = loop_rows() | {
        "data": Reach(toys.others, "run.options.data"),
        "model": Reach(toys.other_latent, "model.config.text.dim", 32),
        "limit": Reach(7, lambda r: len(_pictures(r).training)),
        "languages": Reach(("en", "ja"), languages, 2),
        "words": Reach("flat", lambda r: all(t.startswith("flat ") for t in _pictures(r).training.texts("en")), True),
        "size": Reach(16, lambda r: _pictures(r).training.shape[1]),
        "rank": Reach(3, lambda r: adapter(r, "unet", "rank")),
        "alpha": Reach(5.0, lambda r: adapter(r, "unet", "alpha")),
        "targets": Reach(("to_q", "proj_in"), lambda r: targets(r, "unet"), {"to_q", "proj_in"}),
        "text_rank": Reach(4, lambda r: adapter(r, "text_encoder", "rank")),
        "text_targets": Reach(("q_proj",), lambda r: targets(r, "text_encoder"), {"q_proj"}),
        "dora": Reach(True, lambda r: adapter(r, "unet", "dora")),
        "style": Reach("kohya", "save.recipe.style"),
        "weighting": Reach("min_snr", "objective.weighting"),
        "caption_dropout": Reach(0.35, "objective.label_dropout"),
        "prompts": Reach(("a bar",), "sample.task.prompts"),
        "guidance": Reach(2.25, "sample.request.guidance"),
        "seed": Reach(5, ("settings.seed", "data.data.key", "sample.seeds.0")),
    }
    long = {"words": "long " * 30, "prompts": ("a bar",)}
    return base, [Group(rows), Group({"truncate": Reach(True, caption_length)}, long, refused=True)]


def targets(record: Any, part: str) -> set[str]:
    """Return the last words of the names of the layers of a part that have adapters."""
    labels = (a.target.label for a in adapters(record.model) if a.target.label.startswith(part))
    return {label.removesuffix(".0").rpartition(".")[2] for label in labels}


TABLE = {
    "clip": of_clip, "ddpm": of_ddpm, "dalle": of_dalle, "latent_diffusion": of_latent_diffusion, "unclip": of_unclip,
    "lora_image": of_lora_image, "dit": of_dit, "gan": of_gan, "vq": of_vq, "score": of_score,
    "mean_flow": of_mean_flow,
}  # fmt: skip
ELSEWHERE = {  # options that another test holds
    "ddpm": dict.fromkeys(
        ("fit", "distinct", "yes"), "test_ddpm_reads_pictures_as_it_is_told, test_published_recipes.py"
    ),
    "dit": dict.fromkeys(("fit", "distinct"), "test_ddpm_reads_pictures_as_it_is_told"),
    "clip": dict.fromkeys(("text_teacher", "dictionary"), "test_both_towers_learn_from_a_teacher"),
}


CLIP, SMALL_CLIP = clip.Recipe(), toy_captions.small_clip(Path("emoji"))
SMALL_CLIP = replace(SMALL_CLIP, text=replace(SMALL_CLIP.text, dim=16))


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Draw less than by default, and train a small CLIP first."""
    patch.setattr(lora_image, "STEPS", 2)
    patch.setattr(clip, "Recipe", lambda *given, **more: replace(SMALL_CLIP, **named(given), **more))


def named(given: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("data", "languages"), given, strict=False))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", TABLE)
def test_every_option_reaches_what_it_names(name: str, toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    base, groups = TABLE[name](toys)
    groups = wiring.logged(base, groups)
    assert not wiring.uncovered(base, groups, ELSEWHERE.get(name, {})), "an option without a row in the table above"
    wiring.check(groups, lambda given: wiring.run(name, wiring.assign(base, given), toys.out / name))


def test_ddpm_reads_pictures_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Source, size, channels and fit, then near copies left out, then the share held out."""
    asked = []

    class Read:
        def distinct(self) -> str:
            return "distinct"

    def split(pictures: object, share: float) -> None:
        asked.append((pictures if pictures == "distinct" else "all", share))
        raise InterruptedError

    monkeypatch.setattr(ddpm.dataset, "read_images", lambda *given: (asked.append(given), Read())[1])
    monkeypatch.setattr(ddpm.splits, "split", split)
    for distinct in (True, False):
        with pytest.raises(InterruptedError):
            ddpm.prepare(ddpm.Recipe("x", size=7, channels=1, fit="pad", distinct=distinct, held_out=0.2).resolved())
    assert asked == [("x", 7, 1, "pad"), ("distinct", 0.2), ("x", 7, 1, "pad"), ("all", 0.2)]


PAPERS: dict[str, dict[str, Any]] = {
    "clip": {
        "settings.weight_decay": 0.2, "settings.betas": (0.9, 0.98), "settings.epsilon": 1e-6,
        "settings.schedule": "cosine", "settings.final_ratio": 0.0,
    },
    "ddpm": {
        "settings.learning_rate": 2e-4, "settings.betas": (0.9, 0.999), "settings.weight_decay": 0.0,
        "settings.schedule": "constant", "settings.ema": 0.9999, "settings.batch_size": 128, "settings.clip": 1.0,
        "model.config.dropout": 0.1, "objective.noise.schedule": "linear", "objective.noise.steps": 1000,
        "objective.noise.target": "noise", "objective.noise.variance": "fixed_large", "objective.weighting": "simple",
        "model.config.scale_shift": False, "objective.label_dropout": 0.0, "data.data.augmentation.flip": True,
    },
    "dit": {
        "objective.noise.schedule": "flow", "objective.noise.target": "flow", "objective.sampling": "uniform",
        "objective.weighting": "simple", "settings.betas": (0.9, 0.99), "settings.ema": 0.999,
        "model.config.noise.clip": 1.0, "model.config.transformer.patch_size": 4,
    },
    "dalle": {
        "settings.betas": (0.9, 0.96), "settings.weight_decay": 0.045, "settings.clip": 4.0, "settings.ema": 0.999,
        "objective.text_weight": 1 / 8, "dvae:settings.weight_decay": 1e-4, "dvae:settings.ema": 0.999,
        "dvae:settings.betas": (0.9, 0.999), "dvae:settings.final_ratio": 1 / 80,
        "dvae:data.key.temperature.start": 1.0, "dvae:data.key.temperature.end": 1 / 16,
        "dvae:data.key.kl_weight.start": 0.0, "dvae:data.key.kl_weight.steps": 3, "settings.final_ratio": 0.0,
    },
    "latent_diffusion": {
        "objective.label_dropout": 0.1, "settings.betas": (0.9, 0.99), "settings.weight_decay": 0.01,
        "settings.ema": 0.999, "settings.final_ratio": 0.0, "autoencoder:settings.weight_decay": 0.0,
        "autoencoder:settings.betas": (0.9, 0.99), "autoencoder:settings.final_ratio": 0.0,
        "model.config.noise.spacing": "trailing", "model.config.noise.steps_offset": 1,
    },
    "unclip": {
        "objective.prior_dropout": 0.1, "objective.text_dropout": 0.5, "objective.image_dropout": 0.1,
        "settings.betas": (0.9, 0.99), "settings.weight_decay": 0.01, "settings.ema": 0.999,
        "objective.prior.noise.target": "picture", "objective.decoder.noise.schedule": "cosine",
    },
    "lora_image": {
        "settings.schedule": "constant", "settings.learning_rate": 1e-4, "settings.betas": (0.9, 0.999),
        "settings.weight_decay": 0.01, "objective.label_dropout": 0.0,
    },
}  # fmt: skip


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PAPERS)
def test_figures_of_the_papers(name: str, toys: Toys, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    base = TABLE[name](toys)[0]
    if name == "ddpm":
        small = {"size": 16, "dim": 8, "multipliers": (1, 2), "residual_blocks": 1, "steps": 200_000}
        base = ddpm.Recipe(toys.drawings, recipe_of="paper", **small)
    if name == "clip":
        base = replace(base, training=CLIP.training)
    record = wiring.run(name, base, toys.out / f"papers-{name}")
    assert {path: wiring.look(record, path) for path in PAPERS[name]} == PAPERS[name]
    assert name != "ddpm" or record.settings.warmup == 5000


@pytest.mark.usefixtures("one_thread")
def test_a_transformer_in_latents_draws_pictures_and_refuses_what_latents_cannot_have(toys: Toys) -> None:
    base = of_dit(toys)[0]
    base = replace(base, data=toys.classes, size=24, classes=True, autoencoder=f"{toys.latent}/autoencoder")
    record = wiring.run("dit", base, toys.out / "dit-latents")
    batch = record.data.batch(0)
    assert batch["pictures"].shape[1:] == (3, 12, 12) and batch["pictures"].dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in record.model.autoencoder.parameters())
    assert record.objective(record.model, batch).total.isfinite()
    assert record.sample(1)[:4] == b"\x89PNG"
    for wrong, word in ({"flip": True}, "--flip"), ({"dequantise": True}, "--dequantise"):
        with pytest.raises(UserError, match=word):
            replace(base, **wrong).resolved()
    with pytest.raises(UserError, match="--autoencoder .* is of the type Clip, which this recipe does not train"):
        dit.prepare(replace(base, autoencoder=toys.clip).resolved())
    with pytest.raises(UserError, match="3 channels, not 1"):
        dit.prepare(replace(base, channels=1).resolved())


@pytest.mark.parametrize("recipe", [ddpm.Recipe, dit.Recipe])
def test_documented_defaults_of_runs_on_pictures(recipe: Any) -> None:
    """Warm-up over a twentieth, validation twenty times, a sample at most every fifty steps; no two are equal."""
    seen = [image_runs.image_settings(recipe(steps=steps).resolved(), steps) for steps in (400, 8000)]
    assert [each.warmup for each in seen] == [20, 400]
    assert [each.evaluate_every for each in seen] == [20, 400]
    assert [each.sample_every for each in seen] == [50, 800]
    assert [each.save_every for each in seen] == [20, 400] and {each.final_ratio for each in seen} == {0.0}


def test_pictures_are_clipped_and_latents_are_not() -> None:
    """A latent has no bounds; a picture is between -1 and 1."""
    coder = autoencoder_kl.Config(widths=(8, 8), norm_groups=4)
    recipe = dit.Recipe(size=16, n_layers=1, n_heads=2, head_dim=8).resolved()
    assert dit.model_config(recipe, None, 3, ()).noise.clip == 1.0
    assert dit.model_config(replace(recipe, patch_size=1), coder, 3, ()).noise.clip is None
