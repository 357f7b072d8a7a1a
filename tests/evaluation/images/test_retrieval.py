"""Recall by hand-made points, zero-shot labels, and the verbs for pictures on a CLIP of a few thousand weights."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.feature_extraction.text import TfidfVectorizer

from keifu import checkpoints
from keifu.checkpoints.hub import locate
from keifu.cli import parse
from keifu.commands.evaluate import training_facts
from keifu.data.images.dataset import read_images
from keifu.data.images.splits import split
from keifu.data.tokenizers.bpe import learn
from keifu.errors import UserError
from keifu.evaluation.images.counting import WordCounter, color_histograms, nearest_mean
from keifu.evaluation.images.retrieval import both_ranks, equal, figures_of, ranks, recall, split_pairs
from keifu.inference.embeddings.clip import embed_pictures, embed_texts, label_points, label_shares, preprocessing
from keifu.models.clip import clip, image as clip_image, text as clip_text

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a cache in a folder of the tests, for data computed from pictures."""
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return six pictures of odd sizes with captions, and the same in a folder for each class."""
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
    found = recall(places.tolist())
    assert found.shares == {1: pytest.approx(1 / 3), 5: 1.0, 10: 1.0} and found.median == 3.0


def test_any_of_several_captions_is_right() -> None:
    torch.manual_seed(1)
    pictures = torch.nn.functional.normalize(torch.randn(20, 6), dim=-1)
    owners = torch.arange(20).repeat_interleave(2)
    texts = torch.nn.functional.normalize(pictures[owners] + torch.randn(40, 6) * 0.4, dim=-1)
    captions = recall(ranks(pictures, texts, torch.arange(20), owners).tolist())
    found = recall(ranks(texts, pictures, owners, torch.arange(20)).tolist())
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
    points = embed_pictures(model, iter(images))
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
    shares = [line["probabilities"] for line in told]
    assert [line["label"] for line in told] == [max(each, key=each.get) for each in shares]
    assert [sum(each.values()) for each in shares] == pytest.approx([1, 1], abs=1e-5)
    words("classify", run, *files, "--labels", "red,green,blue", "--json", "--template", "a small {} thing")
    others = [json.loads(line)["probabilities"] for line in capsys.readouterr().out.splitlines()]
    assert [*others[0]] == [*shares[0]] and others != shares
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
    words("evaluate", run, "--on", pictures, "--output", tmp_path / "items.json")
    written = json.loads((tmp_path / "items.json").read_text())
    assert len(written["rows"]) == 6 and len(written["rows"][0]) == len(written["columns"])
    assert written["figures"]["und captions R@1"] == told["und captions R@1"]
    assert written["options"] == {"on": str(pictures), "model": str(run)}


WRONG = [
    (["classify", "RUN", "missing.png", "--labels", "a,b"], "There is no picture missing.png"),
    (["classify", "RUN", "PICTURES/small-red.png"], "no labels of its own"),
    (["classify", "RUN", "PICTURES/small-red.png", "--labels", "red"], "give two at least"),
    (["classify", "RUN", "a text", "--labels", "a,b"], "'a text' is no picture's file"),
    (["classify", "RUN", "--on", "PICTURES", "--labels", "a,b"], "2 labels were given for the classes"),
    (["classify", "RUN", "a text"], "tells images apart"),
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
    both = (points, texts), (points, texts)
    assert both_ranks(*both, alike) == {"captions": [1, 1, 1], "pictures": [1, 1, 1]}
    assert both_ranks(*both, torch.arange(3))["pictures"] != [1, 1, 1]


def test_words_weigh_as_in_scikit_learn() -> None:
    texts = ["red heart", "red cat face with a tear", "ネコの顔", "顔"]
    for language, analyzer, spans in (("en", "word", (1, 1)), ("ja", "char", (1, 3))):
        theirs = TfidfVectorizer(analyzer=analyzer, ngram_range=spans).fit(texts[:3])
        ours = WordCounter(texts[:3], language)
        columns = [ours.index[word] for word in theirs.get_feature_names_out()]
        assert len(columns) == len(ours.index)
        expected = torch.from_numpy(theirs.transform(texts).toarray()).float()
        assert torch.allclose(ours(texts)[:, columns], expected, atol=1e-6)


def test_counting_by_hand() -> None:
    """Colours are counted in 4 x 4 x 4 boxes; a query has the mean of what its nearest neighbours have."""
    values, known = torch.eye(7), torch.eye(7).roll(1, 0)
    assert torch.allclose(nearest_mean(known[2:3] * 2 + known[:1], known, values)[0, [2, 0]], torch.full((2,), 5**-0.5))


def test_histograms_have_the_roots_of_the_shares(pictures) -> None:
    whole = read_images(pictures, 12, 3)
    pixels = whole.take(slice(0, 1))[0].flatten(1).T // 64
    counts = Counter(int(r) * 16 + int(g) * 4 + int(b) for r, g, b in pixels)
    found = color_histograms(whole)[0]
    assert {place: round(float(found[place]) ** 2 * 144) for place in found.nonzero().flatten().tolist()} == counts


def test_intervals_and_the_difference_to_counting_follow_from_the_ranks() -> None:
    columns = {
        "captions": [1, 1, 2, 1],
        "pictures": [3, 1, 1, 1],
        "captions, counted": [1, 2, 2, 2],
        "pictures, counted": [1] * 4,
    }
    found = figures_of("en", columns, [0, 1, 2, 3])
    assert found["en captions R@1"] == 0.75 and found["en captions R@1 by counting"] == 0.25
    assert found["en captions R@1 above counting, 95% interval"] == "0.0000 to 1.0000"
    assert figures_of("en", columns, [0, 0, 0, 0])["en captions R@1, 95% interval"] == "0.7500 to 0.7500"


@pytest.mark.slow
def test_published_weights_are_tested_on_pictures_without_relatives_in_training() -> None:
    pictures = read_images("emoji", 16, 3)
    old = split(pictures, whole_families=False)
    parts = split_pairs("emoji", 16, training_facts(locate("emoji-clip"))["held_out"])
    assert parts.train.names == old.train.names and {*parts.test.names} == {*old.clean_test().names}
    assert not {*parts.test.families.tolist()} & {*parts.train.families.tolist()}
    assert len(parts.test) == 83 and len(parts.test.distinct()) == 73


RAW = Path(__file__).parents[3] / "docs/results/data"


@pytest.mark.parametrize("name", ["emoji-clip", "clip-taught-1", "clip-taught-2"])
def test_published_figures_follow_from_the_ranks_that_were_written(name: str) -> None:
    published = json.loads((RAW / f"{name}.json").read_text(encoding="utf-8"))
    rows = [dict(zip(published["columns"], row, strict=True)) for row in published["rows"]]
    families = {row["family"] for row in rows}
    again: dict[str, object] = {"pictures": len({row["picture"] for row in rows}), "families": len(families)}
    for language in ("en", "ja", "zh"):
        some = [row for row in rows if row["language"] == language]
        columns = {column: [row[column] for row in some] for column in published["columns"][6:]}
        again |= figures_of(language, columns, [row["family"] for row in some])
    assert again == published["figures"]


def test_the_table_of_taught_clips_has_the_figures_of_their_files() -> None:
    tables = json.loads((RAW / "text_and_pictures.json").read_text(encoding="utf-8"))
    (table,) = [table for table in tables if "clip-taught-1" in table["command"]]
    for seed in (1, 2):
        figures = json.loads((RAW / f"clip-taught-{seed}.json").read_text(encoding="utf-8"))["figures"]
        assert table["values"][f"seed {seed}"] == figures
        for row in table["rows"]:
            language, asked = row[0].split(", ")
            key = f"{language} {'captions' if asked == 'name by picture' else 'pictures'} R@1"
            low, high = (100 * float(end) for end in figures[f"{key}, 95% interval"].split(" to "))
            assert row[seed] == f"{figures[key]:.1%} ({low:.1f} to {high:.1f})"
            hits = round(figures["pictures"] * figures[f"{key} by counting"])  # the figure is rounded to four digits
            assert row[3] == f"{hits / figures['pictures']:.1%}"
