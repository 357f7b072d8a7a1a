"""The package of small models trained here: their cards, their size, what they answer, what they did not see."""

import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, ImageDraw

import keifu
from keifu import cli
from keifu.checkpoints.hub import locate
from keifu.commands.evaluate import training_facts
from keifu.data.catalogue import catalogue
from keifu.data.classification.batches import TensorBatches
from keifu.data.classification.tables import toy_dataset
from keifu.data.images.dataset import read_images
from keifu.data.images.splits import split
from keifu.errors import UserError
from keifu.evaluation.classification import neurons
from keifu.evaluation.registry import EvalRequest

sys.path.insert(0, str(Path(__file__).parent.parent / "pretrained"))

import make  # noqa: E402 # pyright: ignore[reportMissingImports] (its folder is no package)

MOST_BYTES = 95_000_000
ROOT = Path(__file__).parent.parent / "pretrained" / "src" / "keifu_pretrained"
NAMES = sorted(folder.parent.name for folder in ROOT.glob("*/card.json"))
SENTENCES = {"ja-en": ("これはペンです。", "This is a pen."), "en-ja": ("I like cats.", "猫が好きです。")}
SHARES = "accuracy", "asked class seen", "masked words right", "own caption first of 24", "en captions R@1"


def card(name: str) -> dict:
    return json.loads((ROOT / name / "card.json").read_text(encoding="utf-8"))


def test_the_catalogue_has_what_the_package_has() -> None:
    assert sorted(name for name, entry in catalogue.MODELS.items() if entry.package) == NAMES
    assert [name for name in NAMES if not catalogue.is_cached(name, catalogue.MODELS)] == []


def test_no_record_names_a_place_of_a_machine() -> None:
    texts = [file.read_text(encoding="utf-8") for file in ROOT.glob("*/recipe.json")]
    assert texts and not [text for text in texts if re.search(r'": "(/|[A-Z]:\\)', text)]


def test_the_package_is_small() -> None:
    assert sum(file.stat().st_size for file in ROOT.rglob("*") if file.is_file()) <= MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_about_these_weights(name: str) -> None:
    files = sorted((ROOT / name).rglob("*.safetensors"))
    weights = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    text = (ROOT / name / "README.md").read_text(encoding="utf-8")
    assert card(name)["weights_sha256"] == weights
    for key in ("data_sha256", "command", "evaluation"):
        assert card(name)[key] in text
    for word in (weights, "Figures", "Limits", "licence"):
        assert word in text


@pytest.mark.parametrize("name", NAMES)
def test_the_hub_reads_the_cards_metadata(name: str) -> None:
    hub = ModelCard.load(ROOT / name / "README.md", ignore_metadata_errors=False).data
    model, figures = make.MODELS[name], card(name)["figures"]
    assert (hub.license, hub.pipeline_tag, hub.library_name) == (model.licence, model.task, "keifu")
    assert hub.datasets == [model.data.split(": ")[0]] and (hub.language or []) == list(model.languages)
    assert {each.metric_type for each in hub.eval_results} == {*hub.metrics}
    measured = {each.metric_name: each.metric_value for each in hub.eval_results}
    assert measured and measured.items() <= figures.items()
    assert all(isinstance(figures[key], str) or key in make.COUNTS for key in figures.keys() - measured.keys())


@pytest.mark.parametrize("name", NAMES)
def test_the_cards_metadata_is_that_of_its_model(name: str, tmp_path: Path) -> None:
    for file in ("README.md", "card.json"):
        (tmp_path / file).write_bytes((ROOT / name / file).read_bytes())
    make.renew_head(name, make.MODELS[name], tmp_path)
    assert (tmp_path / "README.md").read_bytes() == (ROOT / name / "README.md").read_bytes()


def test_the_list_has_the_figures_of_the_cards() -> None:
    text = (ROOT.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = {cells[1].strip(" `"): line for line in text.splitlines() if len(cells := line.split("|")) > 3}
    for name in NAMES:
        figure, value = next(iter(card(name)["figures"].items()))
        shown = f"{value:.1%}" if figure in SHARES else str(value)
        assert shown in rows[name], f"{name}: {figure} {value}"


@pytest.mark.parametrize("name", SENTENCES)
def test_it_translates_a_simple_sentence(name: str) -> None:
    from keifu.inference.text.translation import TranslationParams, translate_texts

    source, target = SENTENCES[name]
    model, tokenizer = keifu.load(name)
    [[found]] = translate_texts(model, tokenizer, [source], TranslationParams())
    assert found.text == target


def test_it_chats(capsys: pytest.CaptureFixture) -> None:
    for weights in ([], ["--weights", "int8"]):
        cli.main(["chat", "chat-en", "Hello, how are you today?", "--max-tokens", "60", "--seed", "0", *weights])
        said = capsys.readouterr().out.strip()
        assert re.search(r"\b(I|you|help)\b", said) and "<|" not in said


def test_it_sees_a_shape_that_is_drawn_here(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image = Image.new("RGB", (64, 64), (240, 240, 250))
    ImageDraw.Draw(image).ellipse((20, 24, 44, 48), fill=(255, 0, 0))
    image.save(tmp_path / "circle.png")
    asked = {"what color is the shape?": "red", "what shape is in the image?": "circle", "is there a triangle?": "no"}
    for question, answer in asked.items():
        cli.main(["chat", "see", question, "--image", str(tmp_path / "circle.png")])
        said = capsys.readouterr()
        assert said.out.strip() == answer and "--image" not in said.err
    cli.main(["chat", "see", "what color is the shape?"])
    assert "see answers questions about pictures: give one with --image" in capsys.readouterr().err


def test_a_clip_is_asked_the_languages_that_it_learned() -> None:
    assert training_facts(locate("emoji-clip"))["languages"] == ("en", "ja", "zh")
    asked = [name for name in card("emoji-clip")["figures"] if "R@1" in name]
    assert {name.split()[0] for name in asked} <= {"en", "ja", "zh"}


def test_a_clip_classifies_pictures_that_it_did_not_learn(capsys: pytest.CaptureFixture) -> None:
    pictures = split(read_images("emoji", 16, 3), whole_families=False).clean_test()
    cli.main(["classify", "emoji-clip", "--on", "emoji", "--json"])
    found = json.loads(capsys.readouterr().out)
    classes, counts = np.unique(pictures.labels, return_counts=True)
    assert found["texts"] == len(pictures) == 83
    assert found["majority"]["label"] == pictures.classes[classes[counts.argmax()]]
    assert found["majority"]["share"] == pytest.approx(counts.max() / 83)


@pytest.mark.parametrize("name", ["network", "neuron"])
def test_a_network_is_as_right_as_its_card_says(name: str) -> None:
    model, _ = keifu.load(name)
    on = card(name)["evaluation"].split()[4]
    assert neurons.evaluate(model, None, EvalRequest(on)).figures == card(name)["figures"]


def test_it_draws_the_digit_that_is_asked_for() -> None:
    from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline

    model, _ = keifu.load("digits")
    network, _ = keifu.load("network")
    painter = PixelPipeline(model)
    drawn = [
        painter.draw(painter.resolved(ImageRequest("dpm++-2m", label=label, seed=3, guidance=2.0)), [3])
        for label in (2, 7)
    ]
    pictures = torch.cat(drawn)
    assert network.predict_proba(pictures.flatten(1) / 255).argmax(-1).tolist() == [2, 7]
    assert pictures[:, :, 0].float().mean() < 8, "the paper is black"


@pytest.mark.parametrize(("name", "data"), [("network", "mnist"), ("neuron", "and")])
def test_the_card_has_the_hash_of_the_table(name: str, data: str) -> None:
    table = toy_dataset(data)
    assert card(name)["data_sha256"] == TensorBatches(table.training, table.held_out, 1, seed=0).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("name", SENTENCES)
def test_it_was_trained_on_a_part_that_shares_nothing_with_the_test_pairs(name: str) -> None:
    """The pairs are those that were split then, and the split, a function of them alone, keeps the parts apart."""
    from keifu.data.text.normalization import normalize
    from keifu.data.translation.pairs import read_pairs, split

    pairs = read_pairs(f"tatoeba-{name}")
    assert pairs.fingerprint == card(name)["data_sha256"]
    parts = split(pairs)
    trained, tested = ({normalize(side) for pair in part for side in pair} for part in (parts.train, parts.test))
    assert trained.isdisjoint(tested)


@pytest.mark.parametrize(
    ("clone", "package"), [(True, r"\./pretrained"), (False, r"\./pretrained in keifu's checkout")]
)
def test_a_package_that_is_not_installed_is_named(
    clone: bool, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the way to install it: from the clone that keifu runs in, or from a checkout."""
    if not clone:
        monkeypatch.setattr(catalogue, "CLONE", tmp_path)
    with pytest.raises(UserError, match=rf"keifu-pretrained-2 has it, and is not installed: pip install {package}\.$"):
        catalogue._folder("keifu_pretrained_2")


def test_a_model_is_made_and_measured_by_benchmarks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One writes data by name, files are joined, and figures are what a program prints."""
    monkeypatch.chdir(tmp_path)
    line = """{"messages": [{"content": "%s"}]}"""
    Path("write.py").write_text(f"import sys; open(sys.argv[2], 'w').write('{line}' % sys.argv[3])")
    Path("measure.py").write_text("""print('{"bits per byte": 1.5}')""")
    command = "python write.py --out a old && python write.py --out b new && join c a {last}"
    model = dataclasses.replace(make.MODELS["gpt-en"], command=command, evaluation="python measure.py chat-en")
    assert make.trained("chat", model) == Path("c") and make.lines_of(Path("c")) == [line % "old", line % "new"]
    assert make.evaluated(model, tmp_path) == {"bits per byte": 1.5}


def test_conversations_are_joined_without_those_that_are_held_out(tmp_path: Path) -> None:
    held = make.lines_of(make.HELD_CHATS)[:2]
    lines = [json.dumps({"messages": [{"role": "user", "content": f"A line\u2028{n}"}]}) for n in range(3)]
    (tmp_path / "a").write_text("\n".join([lines[0], held[0], lines[1]]) + "\n", encoding="utf-8")
    (tmp_path / "b").write_text("\n".join([held[1].replace("?", "? "), lines[2]]), encoding="utf-8")
    make.join(tmp_path / "c", [tmp_path / "a", tmp_path / "b"])
    assert make.lines_of(tmp_path / "c") == lines
