"""CLIP (Radford et al., 2021): contrastive training of an image and a text encoder on captioned pictures.

Paper: "Learning Transferable Visual Models From Natural Language Supervision"; 400 million pairs, batches of 32,768,
32 epochs, AdamW with weight decay 0.2 (not of gains and biases), rate 5e-4, betas 0.9 and 0.98, epsilon 1e-6 (ResNets:
0.999 and 1e-8), 2,000 steps of warm-up, a cosine to 0, mixed precision. Here: small towers for drawings of 72 pixels,
batches of 256, weight decay, betas, epsilon and the cosine as in the paper, and a learned tokenizer by CLIP's rules.
Command: keifu train clip --data emoji --languages en ja
Cost: printed before it starts; by default some 8 minutes of one core with bfloat16. The packaged emoji-clip was trained
with --steps 2000.
Expected: see docs/results.md, "CLIP on emoji and their names".
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from keifu import checkpoints
from keifu.data.images import batches, dataset, splits
from keifu.data.images.augmentation import Augmentation
from keifu.data.padding import pad
from keifu.data.tokenizers import bpe
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.devices import choose
from keifu.errors import UserError
from keifu.evaluation.images import retrieval
from keifu.inference.embeddings import clip as clip_embeddings
from keifu.inference.embeddings.encoders import encode_texts
from keifu.inference.images.latent_diffusion import text_tokens
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.ranges import Count
from keifu.recipes.images import image_runs, text_teacher
from keifu.recipes.starting import adapted, holds_families
from keifu.recipes.training_options import TrainingOptions
from keifu.training.job import Budget, Job, Jobs, JobsReturning, PlannedSettings, RunFacts, parameters
from keifu.training.objectives.contrastive import contrastive_loss, taught_loss
from keifu.training.protocols import Objective
from keifu.training.settings import Settings

LEARNED = "learned"
CaptionTokens = tuple[torch.Tensor, torch.Tensor | None]  # of training and validation captions
ACTIVATION, EMBEDDING = "gelu", 128
LEARNING = Settings(
    steps=800, batch_size=256, learning_rate=1e-3, warmup=100, final_ratio=0.0, weight_decay=0.2,
    betas=(0.9, 0.98), epsilon=1e-6, ema=0.99, evaluate_every=100, sample_every=100, save_every=250,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    data: str = "emoji"
    """A catalogue name (emoji), a folder with metadata.jsonl (file_name, text, text_ja, ...), or .tar shards."""
    languages: tuple[str, ...] = ("en", "ja")
    """Codes of the captions' languages; each step samples one for a picture. und: captions of one, unnamed language."""
    tokenizer: str = LEARNED
    """learned: CLIP's rules, merges learned from the captions; or a catalogue name (clip-bpe), a file, a folder."""
    vocab_size: Count = 2500
    """Largest vocabulary size of a learned tokenizer."""
    hard_negatives: bool = False
    """Near copies, such as an emoji in all skin tones, come in one batch, which then asks what tells them apart."""
    evenly: bool = False
    """Whether an epoch has one picture of each group, so that an emoji in many skin tones counts once."""
    text_teacher: str | None = None
    """Encoder of English texts, such as minilm, whose embeddings of the English captions both towers learn; the text
    tower learns them from the captions of all languages."""
    dictionary: str | None = None
    """Words with English meanings that the text tower learns from its teacher: jmdict-ja-en, or a file of pairs."""
    truncate: bool = False
    """Keep the beginning of a caption that is longer than the text tower takes; without it that is an error."""
    start_from: str | None = None
    """CLIP whose weights, tokenizer and sizes the run starts from: a run, a folder, a hub id or a catalogue name. The
    default learning rate is then a tenth of 1e-3."""
    tower: Literal["vit", "resnet"] = "vit"
    """The architecture of the image tower."""
    image: clip_image.Config = clip_image.Config(
        image_size=72, patch_size=12, dim=128, hidden_dim=512, n_layers=5, n_heads=4, activation=ACTIVATION,
        embedding_dim=EMBEDDING,
    )  # fmt: skip
    """The vision transformer."""
    resnet: clip_image.ResNetConfig = clip_image.ResNetConfig(
        image_size=72, width=16, layers=(1, 1, 2, 1), n_heads=8, embedding_dim=EMBEDDING
    )
    """The ResNet, with --tower resnet."""
    text: clip_text.Config = clip_text.Config(
        vocab_size=2500, context_length=32, dim=128, hidden_dim=512, n_layers=3, n_heads=4, activation=ACTIVATION,
        embedding_dim=EMBEDDING,
    )  # fmt: skip
    """The text tower; its vocabulary and the end of a caption follow from the tokenizer."""
    augmentation: Augmentation = Augmentation(
        shift=6, crop=0.4, rotation=15.0, brightness=0.1, contrast=0.2, saturation=0.3
    )
    """Augmentation of the pictures."""
    training: TrainingOptions = LEARNING
    """Settings of the training loop."""


@dataclass(frozen=True, eq=False)
class ClipTask:
    """Task that is ready to train: the model, its tokenizer, and the pictures in three parts."""

    model: nn.Module
    tokenizer: Tokenizer
    parts: splits.ImageSplit
    data: Any  # batches of pictures and captions
    settings: Settings

    @property
    def objective(self) -> Objective:
        """Loss of the pictures: contrastive, or by the teacher's embeddings if the data have them."""
        loss = taught_loss if isinstance(self.data, text_teacher.TaughtBatches) else contrastive_loss
        return loss(clip_embeddings.preprocessing(self.model).normalised)


def prepare(recipe: Recipe) -> ClipTask:
    """Read the pictures, hold some out, learn the tokenizer from the captions of the others, and build the model."""
    torch.manual_seed(recipe.training.seed)
    if recipe.evenly and recipe.hard_negatives:
        raise UserError("--evenly takes one picture of each group and --hard-negatives all of them: give one of them.")
    if recipe.dictionary and not recipe.text_teacher:
        raise UserError("--dictionary has words that a teacher reads: name it, for example --text-teacher minilm.")
    if recipe.text_teacher and recipe.start_from:
        raise UserError("--text-teacher decides the size of new towers, and --start-from has towers: give one of them.")
    loaded, loaded_tokenizer = checkpoints.load(recipe.start_from, torch.float32) if recipe.start_from else (None, None)
    pixels = clip_embeddings.two_towers(loaded).config.pixels if loaded else pixels_of(recipe)
    pictures = dataset.read_images(recipe.data, pixels.crop, 1 if len(pixels.mean) == 1 else 3)
    parts = splits.split(pictures, whole_families=holds_families(recipe.start_from))
    lessons = text_teacher.ask(recipe.text_teacher, recipe.dictionary, parts) if recipe.text_teacher else None
    tokenizer = loaded_tokenizer or _tokenizer(recipe, parts.train, lessons.words if lessons else [])
    model: Any = loaded or _new(recipe, tokenizer, pixels, lessons).to(choose())
    limit = model.config.context_length
    rows = [tokens(recipe, tokenizer, part, limit) for part in (parts.train, parts.validation)]
    settings = adapted(recipe.training, LEARNING, recipe.start_from)
    make: Any = batches.ImageBatches
    if lessons is not None:
        make = partial(text_teacher.TaughtBatches, lessons, text_teacher.encode_words(lessons, tokenizer, limit))
    data = make(
        parts.train, parts.validation, settings.batch_size, settings.seed, recipe.augmentation, *rows,
        hard_negatives=recipe.hard_negatives, evenly=recipe.evenly,
    )  # fmt: skip
    return ClipTask(model, tokenizer, parts, data, settings)


def pixels_of(recipe: Recipe) -> clip.Pixels:
    """Return the format of pictures for a new model."""
    if recipe.tower == "resnet":
        size = recipe.resnet.image_size
        if size < 64:  # the last batch norms would get one number for each picture
            raise UserError(f"A ResNet must see 64 pixels at least, and image_size is {size}: make it larger.")
        return clip.Pixels(size, size)
    size, grey = recipe.image.image_size, recipe.image.channels == 1
    return clip.Pixels(size, size, mean=(0.5,), std=(0.5,)) if grey else clip.Pixels(size, size)


def _new(recipe: Recipe, tokenizer: Tokenizer, pixels: clip.Pixels, lessons: text_teacher.Lessons | None) -> clip.Clip:
    text = replace(recipe.text, vocab_size=tokenizer.vocab_size, end_id=tokenizer.eos_id)
    image: Any = recipe.image if recipe.tower == "vit" else recipe.resnet
    if lessons is not None:
        text, image = (replace(part, embedding_dim=lessons.training.shape[1]) for part in (text, image))
    return clip.build(clip.Config(text, image, pixels))


def _tokenizer(recipe: Recipe, pictures: dataset.ImageDataset, words: Sequence[str]) -> Tokenizer:
    captions = [text for language in recipe.languages for text in pictures.texts(language)] + [*words]
    if recipe.tokenizer == LEARNED:
        return bpe.learn(captions, recipe.vocab_size)
    tokenizer = load_tokenizer(recipe.tokenizer)
    if tokenizer.eos_id is None or tokenizer.eos_id not in tokenizer.encode("a", special=True):
        raise UserError(f"{recipe.tokenizer} puts no end after a text, and CLIP reads a caption there: take clip-bpe.")
    return tokenizer


def tokens(recipe: Recipe, tokenizer: Tokenizer, pictures: dataset.ImageDataset, limit: int) -> batches.Tokens | None:
    """Encode the captions, padded to one length: [language, picture, length]. Return None if there are no pictures."""
    if not len(pictures):
        return None
    texts = [text for language in recipe.languages for text in pictures.texts(language)]
    rows, cut = encode_texts(tokenizer, texts, limit, recipe.truncate)
    if cut:
        print(f"{cut:,} of {len(texts):,} captions were cut to {limit} tokens.", flush=True)
    ids, _ = pad(rows, clip_embeddings.padding(tokenizer))
    return ids.unflatten(0, (len(recipe.languages), len(pictures)))


def describe(task: ClipTask, languages: Sequence[str]) -> str:
    """Return recall on the held-out pictures, a line for each language and direction."""
    validation, lines = task.parts.validation, list[str]()
    points = clip_embeddings.embed_bytes(task.model, validation.batches(64))
    for code in languages:
        texts = clip_embeddings.embed_texts(task.model, task.tokenizer, validation.texts(code), cut=True)
        alike = retrieval.equal(validation.texts(code)).to(points.device)
        ranks = retrieval.both_ranks((points, texts), (points, texts), alike)
        for what, name in (("captions", "captions by picture"), ("pictures", "pictures by caption")):
            recall = retrieval.recall(ranks[what])
            shares = "  ".join(f"R@{first} {share:.1%}" for first, share in recall.shares.items())
            lines.append(f"{code} {name}: {shares}  (of {len(validation):,})")
    return "\n".join(lines)


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, with the retrieval figures of the held-out pairs as its samples."""
    task = prepare(recipe)
    yield job_of(recipe, task, task.settings)


def job_of(recipe: Recipe, task: ClipTask, settings: Settings | PlannedSettings) -> Job:
    """Return the training of the task's model."""
    print(task.parts.train.source, "-", task.parts.sentence(), flush=True)
    held_out = {"whole_families": task.parts.whole_families}
    facts = RunFacts(
        title="clip",
        about={"parameters": parameters(task.model), "held_out": held_out, "languages": list(recipe.languages)},
        data={"source": recipe.data, "fingerprint": task.parts.train.fingerprint},
        options={name: value for name, value in asdict(recipe).items() if name != "training"},
        unit="pairs",
    )
    return Job(
        model=task.model, objective=task.objective, data=task.data, settings=settings, tokenizer=task.tokenizer,
        sample=(lambda step: describe(task, recipe.languages)) if len(task.parts.validation) else None, facts=facts,
    )  # fmt: skip


def two_towers_of(
    recipe: image_runs.TextToImageOptions, parts: splits.ImageSplit
) -> JobsReturning[tuple[clip.Clip, Tokenizer, CaptionTokens]]:
    """Return the CLIP that a text-to-image model uses, with its tokenizer and the encoded captions. Yield its training
    first, unless the recipe names one."""
    directory = recipe.clip or (yield stage_of(recipe)).directory
    model: Any
    model, tokenizer = checkpoints.load(directory, torch.float32)
    clip_embeddings.two_towers(model)
    if tokenizer is None:
        raise UserError(f"{directory} has no tokenizer, and captions must be read: give a CLIP that has one.")
    length = model.config.context_length
    text_tokens(tokenizer, recipe.prompts, length, recipe.truncate)
    return model, tokenizer, caption_tokens(tokenizer, length, parts, recipe.languages, recipe.truncate)


def stage_of(recipe: image_runs.TextToImageOptions) -> Job:
    """Return the training of a CLIP on the pictures and captions of a text-to-image model."""
    towers = Recipe(recipe.data, recipe.languages, truncate=recipe.truncate)
    fixed = replace(towers.training, batch_size=recipe.clip_batch, precision=recipe.precision, seed=recipe.seed)
    task = prepare(replace(towers, training=fixed))
    length = clip_embeddings.two_towers(task.model).config.context_length
    text_tokens(task.tokenizer, recipe.prompts, length, recipe.truncate)  # reports long prompts before the training
    budget = Budget(recipe.clip_steps, recipe.clip_minutes)

    def settings(steps: int) -> Settings:
        every = dict.fromkeys(("evaluate_every", "sample_every"), max(1, steps // 10))
        return replace(fixed, steps=steps, minutes=budget.limit, warmup=steps // 10, **every)

    return replace(job_of(towers, task, PlannedSettings(budget, settings)), stage=image_runs.CLIP)


def text_conditioned(model: clip.Clip) -> clip_text.TextTower:
    """Return the frozen text tower without its projection. A U-Net attends to the hidden state of every token."""
    tower = clip_text.TextTower(replace(model.config.text, projected=False))
    tower_weights = {
        name: tensor for name, tensor in model.text.state_dict().items() if not name.startswith("projection")
    }
    tower.load_state_dict(tower_weights)
    return tower.requires_grad_(False).eval()


def caption_tokens(
    tokenizer: Tokenizer, length: int, parts: splits.ImageSplit, languages: tuple[str, ...], truncate: bool
) -> CaptionTokens:
    """Encode the training and validation captions, padded as for drawing: [language, picture, length]; None without
    pictures."""

    def tokens(part: dataset.ImageDataset) -> torch.Tensor:
        return torch.stack([text_tokens(tokenizer, part.texts(language), length, truncate) for language in languages])

    return image_runs.of_both(parts, tokens)
