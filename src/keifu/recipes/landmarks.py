"""The demonstration's landmarks: each is shown by a small pretrained model of the package, as text and as a picture.

Each model's answer is compared with the known one, so that a machine that computes wrongly is noticed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor

from keifu import checkpoints
from keifu.data.catalogue import catalogue
from keifu.data.classification.tables import logic, toy_dataset
from keifu.data.images.grid import grid
from keifu.evaluation.images.text_to_image import cosines
from keifu.evaluation.plots.attention_maps import draw_maps
from keifu.evaluation.plots.decision_boundary import canvas, png
from keifu.inference.embeddings.attention_maps import inspect_translation
from keifu.inference.images.pipeline import text_to_image_pipeline
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline, to_pixels
from keifu.inference.text.fill import Guess, fill
from keifu.inference.text.translation import TranslationParams, translate_texts
from keifu.recipes.neurons import perceptron

WIDE = 14  # characters across a drawn digit
BLOCKS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}
SENTENCES = {
    "ja-en": ["この川の水はとても冷たい。", "昨日の夜、弟は宿題を忘れた。"],  # no near copies of training pairs
    "en-ja": ["There is a small library near our school.", "My brother forgot his homework last night."],
}
KNOWN_WORDS = {"ja-en": ("river", "cold"), "en-ja": ("学校", "図書館")}  # of the first sentence's translation
GAPS = ["The president of the united [MASK].", "Cook for ten [MASK], then add salt."]
KNOWN_FILLINGS = ["states", "minutes"]
DIGIT, SEED = "7", 1  # of the picture drawn from noise
LEARNED = "red heart", "cat face", "Christmas tree", "ヒマワリ"
UNSEEN = "sleeping face", "green book", "白鳥", "桜"  # emoji without a relative in training
PROMPTS = (*LEARNED, *UNSEEN)


class Shown(NamedTuple):
    """PNG pictures of a landmark by name, and whether the model answered as it is known to."""

    pictures: dict[str, bytes]
    is_right: bool


def show() -> tuple[dict[str, bytes], list[str]]:
    """Show the landmarks in order of years, each by a model of the package. Print the names of missing models. Return
    PNG pictures by name, and the names of the models whose answer is not the known one."""
    missing_names = [name for name in SHOWN if not catalogue.is_cached(name, catalogue.MODELS)]
    pictures: dict[str, bytes] = {}
    differing_models: list[str] = []
    for name in [name for name in SHOWN if name not in missing_names]:
        result = SHOWN[name](name)
        pictures |= result.pictures
        if not result.is_right:
            differing_models.append(name)
    if missing_names:
        print(f"   Left out: {', '.join(missing_names)} ({catalogue.how_to_install()} brings them).")
    return pictures, differing_models


def _learn(name: str) -> Shown:
    """Train a perceptron on AND, and compute AND with the pretrained one."""
    recipe = perceptron.Recipe()
    lesson = perceptron.prepare(recipe)
    stages = list(perceptron.learn(lesson, recipe))
    line = perceptron.formula(stages[-1][1], lesson.table.columns)
    print(f"   1958, a neuron learns AND in {stages[-1][0]} corrections, until it says 1 where {line}:")
    rows = logic("and")[0]
    answers: Any = checkpoints.load(name)[0](rows.double())
    print("   " + ", ".join(f"{int(a)} AND {int(b)} = {int(y)}" for (a, b), y in zip(rows, answers, strict=True)))
    pictures = {"1958 a neuron learns AND": perceptron.draw(lesson, stages)}
    return Shown(pictures, [int(y) for y in answers] == [0, 0, 0, 1])


def _read_digits(name: str) -> Shown:
    table = toy_dataset("mnist").held_out
    digits = table.inputs[:8]
    print("   1986, a network reads digits that it has not seen before:", flush=True)
    print(_character_picture(digits))
    readings = _readings(name, digits)
    print("".join(f"{word:^{WIDE + 1}}" for word in readings))
    right = sum(text.split()[0] == str(label) for text, label in zip(readings, table.targets[:8].tolist(), strict=True))
    return Shown({"1986 a network reads digits": grid(_pixels(digits), readings, columns=8)}, right >= 7)


def _readings(name: str, digits: Float[Tensor, "digit pixels"]) -> list[str]:
    """Return a text for each digit: the class predicted by the model of that name, and its probability."""
    network: Any = checkpoints.load(name)[0]
    shares, predicted = network.predict_proba(digits).max(-1)
    return [f"{digit} ({share:.0%})" for digit, share in zip(predicted.tolist(), shares.tolist(), strict=True)]


def _translate(name: str) -> Shown:
    """Translate and print two sentences. The picture shows the last layer's attention for the last one."""
    translator, tokenizer = checkpoints.load(name)
    translations = [pair for [pair] in translate_texts(translator, tokenizer, SENTENCES[name], TranslationParams())]
    for pair in translations:
        print(f"   2017, a Transformer, a sentence that it has not seen before: {pair.source} → {pair.text}")
    sentence, config = translations[-1].source, cast(Any, translator).config
    inspection = inspect_translation(translator, [*tokenizer.encode(sentence), config.end_id])
    rows, columns = (
        [tokenizer.decode([token]) or "(end)" for token in ids] for ids in (inspection.rows, inspection.columns)
    )
    last = {"last layer, mean of its heads": [*inspection.attention.values()][-1].mean(0)}
    picture = draw_maps(last, rows, columns, f"{sentence}\n→ {translations[-1].text}")
    is_right = all(word in translations[0].text for word in KNOWN_WORDS[name])
    return Shown({f"2017 attention of {name}": picture}, is_right)


def _fill(name: str) -> Shown:
    model, tokenizer = checkpoints.load(name)
    fillings = {text: fill(model, tokenizer, text)[0] for text in GAPS}
    for text, guesses in fillings.items():
        words = ", ".join(f"{guess.word} {guess.probability:.0%}" for guess in guesses[:3])
        print(f"   2018, BERT, a sentence that it has not seen before: {text.replace('[MASK]', '___')} {words}")
    words = [guesses[0].word for guesses in fillings.values()]
    return Shown({"2018 a masked word": _bars(fillings)}, words == KNOWN_FILLINGS)


def _bars(fillings: dict[str, list[Guess]]) -> bytes:
    """Draw the likeliest words for each gap as a PNG."""
    figure, panels = canvas(len(fillings), len(fillings), 3.2)
    for axes, (text, guesses) in zip(panels, fillings.items(), strict=True):
        axes.barh([guess.word for guess in reversed(guesses)], [guess.probability for guess in reversed(guesses)])
        axes.set_title(text, fontsize=8)
        axes.set_xlabel("probability", fontsize=8)
    return png(figure)


def _draw(name: str) -> Shown:
    painter = PixelPipeline(checkpoints.load(name)[0])
    request = ImageRequest("dpm++-2m", seed=SEED, label=painter.label(DIGIT), guidance=2.0)
    states = list(painter.drawing(painter.resolved(request), [SEED]))
    indices = [round(index * (len(states) - 1) / 7) for index in range(8)]
    pictures = to_pixels(torch.cat([states[index].x for index in indices])).flatten(1) / 255
    print(f"   2020, a diffusion model: a {DIGIT} forms from noise, in {len(states)} steps:", flush=True)
    print(_character_picture(pictures))
    is_right = True
    if catalogue.is_cached("network", catalogue.MODELS):
        reading = _readings("network", pictures[-1:])[0]
        print(f"   The network of 1986 sees in the last one: {reading}")
        is_right = reading.split()[0] == DIGIT
    sheet = grid(_pixels(pictures), [f"step {index + 1}" for index in indices], 8)
    return Shown({"2020 a digit forms from noise": sheet}, is_right)


def _draw_emoji(name: str) -> Shown:
    """Draw emoji for a few names, and print which of them CLIP recognises in each."""
    painter = text_to_image_pipeline(*checkpoints.load(name))
    request = painter.resolved(ImageRequest("dpm++-2m", 20, SEED, guidance=3.0, text=PROMPTS[0]))
    pictures = painter.draw(request, range(SEED, SEED + len(PROMPTS)), texts=PROMPTS)
    print(f"   2022, latent diffusion draws {', '.join(LEARNED)}; not in its training data: {', '.join(UNSEEN)}.")
    captions, is_right = list(PROMPTS), True
    if catalogue.is_cached("emoji-clip", catalogue.MODELS):
        nearest = cosines(*checkpoints.load("emoji-clip"), pictures, PROMPTS).argmax(1).tolist()
        right = [index == number for number, index in enumerate(nearest)]
        print(f"   2021, CLIP finds the name of {sum(right[:4])} of the first and {sum(right[4:])} of the others.")
        is_right = sum(right[:4]) >= 3
        captions = [f"{prompt} → {PROMPTS[index]}" for prompt, index in zip(PROMPTS, nearest, strict=True)]
    return Shown({"2022 emoji from their names": grid(pictures, captions, columns=4)}, is_right)


SHOWN: dict[str, Callable[[str], Shown]] = {
    "neuron": _learn, "network": _read_digits, "ja-en": _translate, "en-ja": _translate, "bert-en": _fill,
    "digits": _draw, "emoji": _draw_emoji,
}  # fmt: skip


def _pixels(digits: Float[Tensor, "digit pixels"]) -> Tensor:
    """Convert digits to bytes [digit, 1, 28, 28], white on black."""
    return (digits.clamp(0, 1) * 255).round().to(torch.uint8).view(len(digits), 1, 2 * WIDE, 2 * WIDE)


def _character_picture(digits: Float[Tensor, "digit pixels"]) -> str:
    """Draw the digits side by side with characters; a line of text is two rows of pixels."""
    halves = digits.view(len(digits), WIDE, 2, WIDE, 2).amax(-1).transpose(0, 1)  # row, digit, its half, column
    lines = ((zip(*digit, strict=True) for digit in line) for line in halves.gt(0.4).tolist())
    return "\n".join(" ".join("".join(BLOCKS[pair] for pair in digit) for digit in line) for line in lines)
