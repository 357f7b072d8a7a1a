"""The page of file formats says what the loaders and writers do: every form, field, type and file that it names."""

import json
import re
import sys
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from PIL import Image

from keifu.checkpoints import hub, loading
from keifu.checkpoints.diffusers import pipeline
from keifu.checkpoints.gguf import read as gguf
from keifu.checkpoints.gguf.config import ARCHITECTURES
from keifu.checkpoints.hf import read as hf, write as hf_write
from keifu.checkpoints.lora import diffusion, peft
from keifu.checkpoints.registry import FAMILIES
from keifu.cli import main
from keifu.commands import convert
from keifu.data import records
from keifu.data.chat import conversations, preferences, prompts
from keifu.data.classification import tables
from keifu.data.images import sources as images
from keifu.data.text import documents, mixture
from keifu.data.tokenizers import formats, seq2seq
from keifu.data.translation.pairs import read_pairs
from keifu.errors import UserError
from keifu.evaluation.text import tasks
from keifu.inference.images.png_metadata import CHUNK
from keifu.models.hf import open_clip
from keifu.native.library import Library
from keifu.untrusted import read_json_object

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs/_site"))

import reference  # noqa: E402 # pyright: ignore[reportMissingImports] (its folder is no package)

PAGE = reference.fill((ROOT / "docs/reference/formats.md").read_text(encoding="utf-8"))


def section(title: str) -> str:
    """Return the text below a heading."""
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> list[list[str]]:
    """Return the cells of the rows of a section's table, without its head."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def row(title: str, start: str) -> str:
    """Return the second cell of the row whose first cell has this start."""
    (found,) = [cells[1] for cells in rows(title) if cells[0].startswith(start)]
    return found


def names(text: str) -> set[str]:
    """Return the texts in backquotes."""
    return set(re.findall(r"`([^`]*)`", text))


def endings(text: str) -> set[str]:
    """Return the endings of files, such as .csv, that are outside of backquotes."""
    return set(re.findall(r"(?<![\w.])\.[a-z]+\b", re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)))


def types(cell: str) -> set[str]:
    """Return GGUF's types among the words of a cell."""
    return set(re.findall(r"\b[A-Z][A-Z0-9_]*\d(?:_[A-Z0-9]+)*\b", cell))


def test_every_file_of_a_model_is_one_that_is_looked_for() -> None:
    read = "Models that are read"
    directory = {"config.json", hf.WEIGHTS, hf.INDEX, f"{hf.PREPROCESSOR}.json", "processor_config.json"}
    assert names(row(read, "a Hugging Face")) == directory | {formats.GENERATION_CONFIG}
    assert names(row(read, "a diffusers")) == {pipeline.PIPELINE, pipeline.CONFIG, pipeline.WEIGHTS}
    assert names(row(read, "open_clip's")) == {*open_clip.FILES}
    assert names(row(read, "a folder of PEFT's")) == {peft.CONFIG, peft.WEIGHTS}
    assert names(row(read, "a LoRA")) == {".safetensors", diffusion.FILE}
    assert [*diffusion.WRITTEN] == ["peft", "diffusers", "kohya"]
    assert set(re.findall(r"\b[FB]+\d+\b", section(read).rpartition("|")[2])) == {*hf.DTYPES} - {"I64"}


def test_files_of_a_model_are_fetched_from_the_hub() -> None:
    from huggingface_hub.utils import filter_repo_objects

    whole = "Models that are read"
    said = [
        name for start in ("a Hugging Face", "open_clip's", "a folder of PEFT's") for name in names(row(whole, start))
    ]
    towers = [f"{part}/{hf.WEIGHTS}" for part in pipeline.OF_TRANSFORMERS]
    wanted = [*said, *towers, pipeline.PIPELINE, f"unet/{pipeline.WEIGHTS}", "chat_template.jinja"]
    assert [*filter_repo_objects(wanted, allow_patterns=[*hub.WANTED])] == wanted
    assert [*filter_repo_objects(["pytorch_model.bin", "flax_model.msgpack"], allow_patterns=[*hub.WANTED])] == []


def test_tokenizer_files_are_named_in_the_order_of_the_search() -> None:
    text = section("Models that are read").partition("A folder's tokenizer")[2].partition("\n\n")[0]
    searched, rest = (re.findall(r"`([^`]*)`", part) for part in text.split("Before them all"))
    assert [name for name in searched if name not in ("merges.txt", "vocab.bpe")] == [*formats.READERS]
    first = [seq2seq.SOURCE, seq2seq.TARGET, seq2seq.VOCABULARY]
    assert rest == [*first, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]


def test_pickled_files_are_refused(tmp_path: Path) -> None:
    last = section("Models that are read").rpartition("unpickled:")[2]
    assert names(last) == {*hf.PICKLED}
    for ending in hf.PICKLED:
        (tmp_path / f"model{ending}").write_bytes(b"\x80\x02.")
        with pytest.raises(UserError):
            loading.load(tmp_path / f"model{ending}")


def test_every_kind_of_model_is_named() -> None:
    table = "Which models"
    networks = {kind for kind in FAMILIES if pipeline.diffusers_files(FAMILIES[kind])} - {*pipeline.PIPELINES}
    published = {kind for kind in FAMILIES if not kind.startswith("keifu_")}
    of_diffusers = {kind for kind in published if kind[0].isupper()}
    models = [cells for cells in rows(table) if len(cells) == 5 and cells[0].startswith("[")]
    of_language = names(" ".join(cells[1] for cells in models))
    others = names(row(table, "`model_type`"))
    assert not of_language & others
    assert of_language | others == published - of_diffusers - {"open_clip"}
    assert names(" ".join(cells[2] for cells in models)) == {*ARCHITECTURES}
    assert names(row(table, "`_class_name` of a pipeline")) == {*pipeline.KINDS, *pipeline._NETWORK}
    shown = {kind for kind in networks if not kind.startswith("keifu_")} - {pipeline.SIMPLE}
    assert names(row(table, "`_class_name` of a network")) == shown


def test_gguf_types_are_read(opened: Library) -> None:
    from gguf import GGMLQuantizationType

    plain, packed, others = (types(cells[0]) for cells in rows("Numbers of GGUF files"))
    assert plain == {*gguf.PLAIN}
    assert packed == {kind.name for kind in GGMLQuantizationType if opened.gguf_format(kind.value) is not None}
    assert {kind for kind in others if gguf._read_array(kind) is not torch.float32} == set()
    assert others and not others & packed


def test_convert_writes_what_is_named() -> None:
    hints = get_type_hints(convert.Options)
    formats_written = {cells[0].strip("`").removeprefix("--to ") for cells in rows("Models that are written")}
    (names,) = [each for each in get_args(hints["to"]) if each is not type(None)]
    assert formats_written == {*get_args(names)}
    kinds = {each for cells in rows("Models that are written") for each in cells[2].split(", ")}
    dtypes = {each for each in get_args(get_args(hints["dtype"])[0])}
    assert kinds == dtypes
    assert signature(hf_write.save).parameters["max_shard_bytes"].default == 5e9
    with pytest.raises(UserError, match="q8_0"):
        loading.convert("nothing", "out", "hf", "q8_0")


def test_a_run_leaves_the_files_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    data = str(ROOT / "examples/data/my-texts")
    main(["train", "gpt", "--depth", "1", "--data", data, "--steps", "20", "--device", "cpu",
          "--out", str(tmp_path / "run")])  # fmt: skip
    text = section("A run's folder")
    named = {name for name in names(text) if "/" not in name and "." in name}
    folder = tmp_path / "run"
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert named - files == {peft.CONFIG, peft.WEIGHTS}  # of a LoRA's run
    assert {name for name in files if not name.startswith("step-00000000")} <= named
    assert {name.rstrip("/") for name in names(text) if name.endswith("/")} == {"samples", "state"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    fields = {name for line in lines for name in line} - {"matrix_rate"}
    assert names(row("A run's folder", "`metrics.jsonl`")) == fields
    assert read_json_object(folder / "config.json")["model_type"] in FAMILIES


VALUES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
    "answers": ["good", "bad"],
    "label": True,
}
FORMS = {"conversations": conversations.FORMS, "preferences": preferences.FORMS}
READ = {
    "conversations": lambda path: conversations.read(str(path)), "prompts": prompts.read_prompts,
    "preferences": partial(preferences.read_preferences, single=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_of_chat_data_is_named_and_read(kind: str, tmp_path: Path) -> None:
    said = names(row("Data", kind))
    assert {name for form in FORMS[kind] for name in form} <= said
    for number, form in enumerate(FORMS[kind]):
        record = {name: VALUES.get(name, name) for name in form}
        if form == ("chosen", "rejected"):
            talks = [[*VALUES["messages"][:1], {"role": "assistant", "content": each}] for each in ("a", "b")]
            record = dict(zip(form, talks, strict=True))
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(record) + "\n", encoding="utf-8")
        assert len([*READ[kind](file)]) == 1


def test_endings_of_data_are_those_that_are_read() -> None:
    tables_read = {*records.SUFFIXES}
    text = row("Data", "language models")
    assert endings(text) == {*documents.SUFFIXES} | tables_read
    assert endings(text.partition("(")[2]) == tables_read - {*documents.SUFFIXES}
    assert endings(row("Data", "mixtures")) == {*mixture.SUFFIXES}
    for kind in ("translation", "conversations", "classification"):
        assert endings(row("Data", kind)) == tables_read
    assert endings(row("Data", "pictures")) == {*images.SUFFIXES, ".tar"}
    assert {*images.METADATA, "file_name"} == names(row("Data", "pictures"))
    assert endings(row("Data", "tasks")) == {*tasks.SUFFIXES}


@pytest.mark.parametrize("ending", sorted(endings(row("Data", "language models"))))
def test_a_text_of_every_ending_is_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    write(path, [{"text": "The cat sleeps."}])
    assert "".join(documents.documents(path)).strip().endswith("The cat sleeps.")


def write(path: Path, found: list[dict[str, str]]) -> None:
    """Write the records in the format of the file's ending. A plain text file gets the first field of each."""
    names = [*found[0]]
    between = {".csv": ",", ".tsv": "\t"}.get(path.suffix)
    if path.suffix == ".parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(found), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(found), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(each) + "\n" for each in found), encoding="utf-8")
    elif between:
        path.write_text("".join(between.join(line) + "\n" for line in [names, *(each.values() for each in found)]))
    else:
        path.write_text("".join(f"{each[names[0]]}\n" for each in found), encoding="utf-8")


@pytest.mark.parametrize("ending", sorted(endings(row("Data", "translation"))))
def test_pairs_and_labels_of_every_ending_are_read(ending: str, tmp_path: Path) -> None:
    write(tmp_path / f"pairs{ending}", [{"source": "cat", "target": "猫"}, {"source": "dog", "target": "犬"}])
    assert read_pairs(tmp_path / f"pairs{ending}").rows == [("cat", "猫"), ("dog", "犬")]
    write(tmp_path / f"labels{ending}", [{"text": "good", "label": "+"}, {"text": "bad", "label": "-"}])
    assert tables.read(tmp_path / f"labels{ending}").labels == ("+", "-")


@pytest.mark.parametrize("ending", sorted(endings(row("Data", "pictures")) - {".tar"}))
def test_a_picture_of_every_ending_is_read(ending: str, tmp_path: Path) -> None:
    mode = "L" if ending == ".pgm" else "RGB"
    Image.new(mode, (8, 8)).save(tmp_path / f"a{ending}")
    (item,) = images.items(tmp_path, problem=lambda text: pytest.fail(text))
    assert item.read(None).image.size == (8, 8)


def test_the_field_of_a_picture_is_named() -> None:
    assert CHUNK in names(section("Pictures that are drawn"))
