"""Teach a language model to see (LLaVA; Liu et al., 2023): questions about pictures, with their answers.

Paper: "Visual Instruction Tuning": CLIP's tower and Vicuna, a projector learned from 595,000 captions, then the
projector and the decoder from 158,000 conversations; loss on the answers alone, AdamW without weight decay, a cosine
after a warm-up of 3%. Here: projector and decoder in one training, and the tower too unless --tower-rate is 0.
Command: keifu train see --model gpt-en --data easy-vqa --tower see --tower-rate 0 --left-out teal triangle
Cost: printed before it starts; by default one pass over the questions, some minutes on 2 cores.
Expected: see docs/lineage/llava.md; keifu evaluate prints the accuracy next to the blind baselines.
"""

import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import tokenizers
import torch

from keifu import checkpoints
from keifu.data.images.preprocessing import Preprocessing, TiledPreprocessing
from keifu.data.images.questions import CLOSED, QuestionBatches, Questions, read_questions
from keifu.data.tokenizers.chat_template import PICTURES
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.devices import choose
from keifu.errors import UserError, shell
from keifu.inference.chat.prompts import in_parts, preprocessing, sees
from keifu.layers.lora import merge
from keifu.models import llama, task_head
from keifu.models.clip import image as clip_image
from keifu.models.hf.image_processor import Pixels
from keifu.models.multimodal import llava
from keifu.ranges import BelowOne, Count, NotNegative, Positive
from keifu.recipes.assistant import finetuning
from keifu.training.job import Jobs, RunFacts
from keifu.training.objectives.language_modeling import answers_about_pictures

IMAGE = "<image>"
LAST_STATES = partial(llava.Config, feature_layers=(-1,), full=True)  # all tokens of the tower's last layer


@dataclass(frozen=True, kw_only=True)
class Recipe(finetuning.AssistantOptions):
    """Options of the run."""

    model: str = field(default="gpt-en", kw_only=False)
    """The decoder, of LLaMA's type: a run, a directory, a catalogue name or a hub id; or a model that sees already."""
    data: str = field(default="easy-vqa", kw_only=False)
    """A catalogue name, or a folder with pictures and questions.jsonl (image, question, answer, part)."""
    left_out: tuple[str, ...] = ()
    """Answers, such as teal triangle: no picture that may show all of them is learned from."""
    image: clip_image.Config = clip_image.Config(
        image_size=64, patch_size=8, dim=128, hidden_dim=512, n_layers=4, n_heads=4, activation="gelu", projected=False
    )
    """The new tower; refused with --tower, or for a model that sees already."""
    tower: str | None = None
    """CLIP or LLaVA whose tower is taken, such as emoji-clip: a run, a directory or a name; unset: a new tower."""
    tower_rate: NotNegative = 1.0
    """The tower's share of the learning rate; 0 keeps the tower as it is, as LLaVA does."""
    names_first: bool = True
    """Whether the first epoch begins with the questions whose answer is a name, which teach a new tower sooner."""
    held_out: BelowOne = 0.02
    """Share of the pictures that is kept for validation, chosen by a hash of the name."""
    epochs: Positive = 1.0
    """Passes over the questions."""
    learning_rate: NotNegative | None = None
    """AdamW's highest learning rate; unset: 5e-4, and 1e-3 with adapters."""
    batch_size: Count = 32
    """Questions in a step."""
    warmup: NotNegative = 0.03
    """Share of the steps in which the learning rate rises from 0."""


def prepare(recipe: Recipe) -> finetuning.FinetuneTask:
    """Read the questions, and build the model of the decoder and a new tower."""
    shaped = recipe.image != Recipe.image
    if shaped and recipe.tower:
        raise UserError(f"--image.* describes a new tower, but {recipe.tower} has its own shape: leave out one.")
    questions = read_questions(recipe.data)
    if not (learned := questions.without(recipe.left_out)):
        raise UserError(f"{recipe.data} has no question to learn from, without those that are left out.")
    decoder, tokenizer = finetuning.open_model(recipe.model, recipe.template)
    if sees(decoder.config):
        if isinstance(preprocessing(decoder.config), TiledPreprocessing):
            raise UserError(f"{recipe.model} cuts pictures into tiles, and this recipe trains without: choose a LLaVA.")
        if recipe.tower:
            raise UserError(f"{recipe.model} sees already: leave out --tower.")
        if shaped:
            raise UserError(f"{recipe.model} sees already, by a tower of its own shape: leave out --image.*.")
        model: Any = finetuning.to_train(decoder, recipe.lora, recipe.seed)
    else:
        if not recipe.tower_rate and not recipe.tower:
            raise UserError("--tower-rate 0 keeps a new tower random: give --tower, or a share above 0.")
        model, tokenizer = start(recipe, decoder, tokenizer, replace(questions, learned=learned))
    if not recipe.tower_rate:
        model.tower.requires_grad_(False)
    sides = finetuning.held_out(learned, [question.image for question in learned], recipe.held_out)
    turns = {pair: encode(tokenizer, *pair, model.config) for pair in {question[1:] for question in learned}}
    rows = [[(*turns[question[1:]], question.image) for question in side] for side in sides]
    ready = Preprocessing(**vars(model.config.pixels))
    names_picture = [recipe.names_first and question.answer not in CLOSED for question in sides[0]]
    data = QuestionBatches(rows, questions, ready, recipe.batch_size, recipe.seed, tokenizer.pad_id or 0, names_picture)
    return finetuning.FinetuneTask(model.to(choose()), tokenizer, data)


def start(recipe: Recipe, decoder: Any, tokenizer: Tokenizer, questions: Questions) -> tuple[llava.Llava, Tokenizer]:
    """Return the decoder with a vision tower and a new projector, and the tokenizer with a token for pictures."""
    if vars(decoder.config).keys() != vars(llama.Config()).keys():
        raise UserError(f"{recipe.model} is no model of LLaMA's type, and LLaVA's decoder is one: choose another.")
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken(IMAGE, special=True, normalized=False)])
    marked = tokenizer.replace(backend=backend, chat_template=PICTURES + (tokenizer.chat_template or ""))
    mark = marked.token_id(IMAGE)
    torch.manual_seed(recipe.seed)
    task_head.grow_vocabulary(decoder, marked.vocab_size, [mark] if mark >= tokenizer.vocab_size else [])
    tower_weights, eyes = new_eyes(recipe, questions) if recipe.tower is None else take_tower(recipe.tower)
    config = replace(eyes, text=decoder.config, image_token=mark)
    model = llava.attach(config, cast(Any, finetuning.to_train(decoder, recipe.lora, recipe.seed)))
    if tower_weights:
        model.tower.load_state_dict(tower_weights)
    return model, marked


def measured(questions: Questions, side: int) -> Pixels:
    """Return preprocessing with the mean and standard deviation of the training pictures, or of 500 of them. Then the
    background is near 0, and a new tower learns sooner."""
    names = sorted({question.image for question in questions.learned})[:: max(1, len(questions.learned) // 5000)][:500]
    plain = Preprocessing(**vars(Pixels(side, side, squash=True)))
    values = torch.stack([plain.cut(questions.picture(name)) for name in names]).float() / 255
    mean, std = ([round(float(x), 4) for x in row] for row in (values.mean((0, 2, 3)), values.std((0, 2, 3))))
    return Pixels(side, side, squash=True, mean=tuple(mean), std=tuple(max(channel, 0.01) for channel in std))


def new_eyes(recipe: Recipe, questions: Questions) -> tuple[dict[str, torch.Tensor], llava.Config]:
    """Return empty weights, and a Config with the shape of the recipe's new tower."""
    return {}, LAST_STATES(image=recipe.image, pixels=measured(questions, recipe.image.image_size))


def take_tower(name: str) -> tuple[dict[str, torch.Tensor], llava.Config]:
    """Return the tower's weights from a CLIP or a vision-language model, and a Config with its shape and
    preprocessing."""
    model: Any = checkpoints.load_model(name)
    if vars(model.config).keys() == vars(llava.Config()).keys():
        return {key: value.float() for key, value in model.tower.state_dict().items()}, model.config
    image = vars(model.config).get("image")
    if image is None or vars(image).keys() != vars(clip_image.Config()).keys() or sees(model.config):
        raise UserError(f"{name} has no vision transformer of CLIP or LLaVA: choose another --tower.")
    tower = model.image.state_dict()
    weights = {key: value.float() for key, value in tower.items() if not key.startswith("projection")}
    return weights, LAST_STATES(image=replace(image, projected=False), pixels=model.config.pixels)


def encode(tokenizer: Tokenizer, question: str, answer: str, config: Any) -> tuple[list[int], list[bool]]:
    """Return the ids of a question about a picture with its answer, and the mask of the answer's tokens."""
    user_message = in_parts({"role": "user", "content": question, "images": [None]})
    ids, mask = tokenizer.render_turns([user_message, in_parts({"role": "assistant", "content": answer})])
    times = [config.image_tokens if token == config.image_token else 1 for token in ids]
    longer = [(token, flag) for token, flag, count in zip(ids, mask, times, strict=True) for _ in range(count)]
    return [token for token, _ in longer], [flag for _, flag in longer]


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu chat --image and keifu evaluate read."""
    task = prepare(recipe)

    def save(directory: Path) -> None:
        checkpoints.save(merge(copy.deepcopy(task.model)), task.tokenizer, directory)

    ready = Preprocessing(**vars(task.model.config.pixels))
    shares = (("tower.", recipe.tower_rate),) if recipe.tower_rate not in (0, 1) else ()
    settings = finetuning.epoch_settings(recipe, task.data, (5e-4, 1e-3), weight_decay=0.01, rate_shares=shares)
    left_out = list(recipe.left_out)
    facts = RunFacts(
        title=f"{recipe.model} learns to see",
        about={"paper": "Liu et al., LLaVA (2023)", "held_out": {"left_out": left_out}},
        data={"questions to learn from": len(task.data.rows[0])},
        options={"left_out": left_out, "tower": recipe.tower, "template": task.tokenizer.chat_template},
    )
    objective = answers_about_pictures(ready.normalised)
    out = (yield finetuning.finetuning_job(recipe, task, objective, settings, facts, save=save)).directory
    print(f"The model is in {out}: keifu chat {shell(out)} --image FILE QUESTION")
