"""Recall by hand-made points, zero-shot labels, and the verbs for pictures on a CLIP of a few thousand weights."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from keifu import checkpoints
from keifu.cli import parse
from keifu.data.tokenizers.bpe import learn
from keifu.errors import UserError
from keifu.evaluation.images.retrieval import (
    embed_pictures,
    embed_texts,
    equal,
    label_points,
    label_shares,
    preprocessing,
    ranks,
    recall,
    recall_both_ways,
)
from keifu.models.clip import clip
from keifu.models.clip import image as clip_image
from keifu.models.clip import text as clip_text

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of pictures goes into a folder of the tests."""
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures of odd sizes with captions, and the same in a folder for each class."""
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    for number, (name, colour) in enumerate(COLOURS.items()):
        for size in ("small", "large"):
            pixels = np.full((31 + number, 40 if size == "large" else 17, 3), colour, np.uint8)
            pixels[::3] //= 2
            file = folder / f"{size}-{name}.png"
            Image.fromarray(pixels).save(file)
            rows.append({"file_name": file.name, "text": f"a {size} {name} thing", "label": name})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = learn([f"a {size} {name} thing" for size in ("small", "large") for name in COLOURS] * 3, 560)
    text = clip_text.Config(tokenizer.vocab_size, 12, 16, 24, 1, 2, end_id=tokenizer.eos_id, embedding_dim=8)
    image = clip_image.Config(16, 4, 3, 16, 24, 1, 2, embedding_dim=8)
    folder = tmp_path_factory.mktemp("run")
    checkpoints.save(clip.build(clip.Config(text, image, clip.Pixels(16, 16))), tokenizer, folder)
    return folder


def words(*arguments: object) -> None:
    parse([str(each) for each in arguments])()


def test_ranks_by_hand() -> None:
    among = torch.eye(3)
    queries = torch.tensor([[1.0, 0.5, 0.0], [0.9, 0.0, 0.1], [0.5, 0.5, 0.5]])
    places = ranks(queries, among, torch.arange(3), torch.arange(3))
    assert places.tolist() == [1, 3, 3]  # the second's answer is last; in the third all are as near
    found = recall(places)
    assert found.shares == {1: pytest.approx(1 / 3), 5: 1.0, 10: 1.0} and found.median == 3.0


def test_any_of_several_captions_is_right() -> None:
    torch.manual_seed(1)
    pictures = torch.nn.functional.normalize(torch.randn(20, 6), dim=-1)
    owners = torch.arange(20).repeat_interleave(2)
    texts = torch.nn.functional.normalize(pictures[owners] + torch.randn(40, 6) * 0.4, dim=-1)
    captions, found = recall_both_ways(pictures, texts, owners)
    order = (pictures @ texts.T).argsort(1, descending=True)
    among = (owners[order[:, :5]] == torch.arange(20)[:, None]).any(1)
    assert captions.shares[5] == pytest.approx(float(among.float().mean()))
    order = (texts @ pictures.T).argsort(1, descending=True)
    assert found.shares[1] == pytest.approx(float((order[:, 0] == owners).float().mean()))


@torch.no_grad()
def test_points_and_shares_are_transformers(run, pictures) -> None:
    """The whole way, from files and words to probabilities, beside CLIPProcessor and CLIPModel on the saved run."""
    model, tokenizer = checkpoints.load(run)
    images = [Image.open(file) for file in sorted(pictures.glob("*.png"))]
    labels = ["a red thing", "something large and BLUE"]
    theirs = transformers.CLIPModel.from_pretrained(run)
    processor = transformers.CLIPProcessor(
        transformers.CLIPImageProcessorPil.from_pretrained(run), transformers.AutoTokenizer.from_pretrained(run)
    )
    given = processor(text=labels, images=images, return_tensors="pt", padding=True)
    expected = theirs(**given)
    assert torch.equal(preprocessing(model)(images), given["pixel_values"])
    points = embed_pictures(model, iter(images), batch_size=4)
    assert torch.allclose(points, expected.image_embeds, atol=1e-6)
    assert torch.allclose(embed_texts(model, tokenizer, labels), expected.text_embeds, atol=1e-6)
    shares = label_shares(model, points, label_points(model, tokenizer, labels, ["{}"]))
    assert torch.allclose(shares, expected.logits_per_image.softmax(-1), atol=1e-5)
    assert not model.training


def test_templates_are_averaged(run) -> None:
    model, tokenizer = checkpoints.load(run)
    both = label_points(model, tokenizer, ["red", "blue"], ["a {} thing", "{}"])
    texts = ["a red thing", "a blue thing"], ["red", "blue"]
    each = [embed_texts(model, tokenizer, some) for some in texts]
    assert torch.allclose(both, torch.nn.functional.normalize(sum(each), dim=-1), atol=1e-6)
    with pytest.raises(UserError, match="no {} for the label"):
        label_points(model, tokenizer, ["red"], ["a photo"])


def test_classify_and_embed_pictures(run, pictures, capsys) -> None:
    files = [pictures / "small-red.png", pictures / "large-blue.png"]
    words("classify", run, *files, "--labels", "red,green,blue", "--json")
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["picture"] for line in told] == list(map(str, files))
    assert sum(told[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    words("classify", run, "--on", pictures, "--template", "a small {} thing")
    assert "of 6 pictures" in capsys.readouterr().out
    words("embed", run, files[0], "a small red thing", "--nearest", "2", "--among", pictures)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split("\t") == [str(files[0]), "1.000", str(files[0])] and len(lines) == 5
    words("embed", run, "a red thing", files[1])
    vectors = [json.loads(line)["vector"] for line in capsys.readouterr().out.splitlines()]
    assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1, 1], abs=1e-5)


def test_the_languages_of_the_run_are_evaluated(run, pictures, capsys) -> None:
    (run / "recipe.json").write_text('{"languages": ["und", "ja"]}')
    words("evaluate", run, "--on", pictures, "--json")
    assert "und captions R@1" in json.loads(capsys.readouterr().out)
    (run / "recipe.json").unlink()


def test_evaluate_tells_recall_for_each_language(run, pictures, capsys, tmp_path) -> None:
    words("evaluate", run, "--on", pictures, "--json", "--output", tmp_path / "items.tsv")
    told = json.loads(capsys.readouterr().out)
    assert told["pictures"] == 6 and told["und captions R@10"] == told["und pictures R@10"] == 1.0
    assert len((tmp_path / "items.tsv").read_text().splitlines()) == 7


WRONG = [
    (["classify", "RUN", "missing.png", "--labels", "a,b"], "There is no picture missing.png"),
    (["classify", "RUN", "PICTURES/small-red.png"], "no labels of its own"),
    (["classify", "RUN", "PICTURES/small-red.png", "--labels", "red"], "give two at least"),
    (["classify", "RUN", "a text", "--labels", "a,b"], "'a text' is no picture's file"),
    (["classify", "RUN", "--on", "PICTURES", "--labels", "a,b"], "2 labels were given for the classes"),
    (["classify", "RUN", "a text"], "tells pictures apart"),
    (["embed", "RUN", "word " * 40], "tokens; the model takes 12"),
    (["evaluate", "RUN", "--on", "PICTURES", "--language", "fr"], "no language of the captions"),
    (["evaluate", "RUN", "--on", "mnist.csv"], "There is no task 'mnist.csv'"),
]


@pytest.mark.parametrize(("arguments", "sentence"), WRONG)
def test_what_is_wrong_is_said_in_a_sentence(arguments, sentence, run, pictures) -> None:
    filled = [each.replace("RUN", str(run)).replace("PICTURES", str(pictures)) for each in arguments]
    with pytest.raises(UserError, match=sentence):
        words(*filled)


def test_pictures_with_the_same_caption_are_all_right_for_it() -> None:
    assert equal(["a", "b", "a", "c", "b"]).tolist() == [0, 1, 0, 3, 1]
    points = torch.eye(3)
    texts = torch.tensor([[0.6, 0.0, 0.8], [0.0, 1.0, 0.0], [0.6, 0.0, 0.8]])  # the first is the last, and nearer to it
    alike = equal(["a", "b", "a"])
    assert [found.shares[1] for found in recall_both_ways(points, texts, alike, alike)] == [1.0, 1.0]
    assert recall_both_ways(points, texts)[1].shares[1] < 1
