"""What the fuzzer found, each case once more: the sentence names the file and what is wrong."""

import gzip
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import structure
import torch
from safetensors.torch import load_file, save_file
from targets import TARGETS

from keifu import checkpoints
from keifu.checkpoints.lora.diffusion import attach_lora
from keifu.data.chat import conversations
from keifu.data.images.catalogued import read_idx
from keifu.data.images.dataset import read_images
from keifu.devices import Choice, choosing
from keifu.errors import UserError
from keifu.inference.images.png_metadata import read_record
from keifu.training.run.run_directory import read_recipe
from keifu.untrusted import parse_json, plain_file


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes the files of a kind, and returns their folder."""

    def make(kind: str) -> Path:
        TARGETS[kind].make(tmp_path)
        return tmp_path

    return make


BECOMES: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a pipe or a device": os.mkfifo,
    "a link that leads nowhere": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
@pytest.mark.parametrize("what", BECOMES)
def test_what_is_no_file_is_named(made, file: str, what: str) -> None:
    folder = made("llama")
    (folder / file).unlink()
    BECOMES[what](folder / file)
    gone = what.startswith("a link") and file != "chat_template.jinja"  # a template may be missing
    try:
        checkpoints.load(folder)
    except UserError as error:
        assert file in str(error)
        assert what in str(error) or gone
    else:
        assert what.startswith("a link") and file == "chat_template.jinja"


def test_devices_and_files_that_are_not_there_and_archives_that_are_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="/dev/zero is a pipe or a device"):
        plain_file(Path("/dev/zero"))
    with pytest.raises(UserError, match="There is no file .*nothing"):
        plain_file(tmp_path / "nothing")
    (tmp_path / "a.tar").symlink_to("a.tar")
    with pytest.raises(UserError, match=r"a\.tar"):
        read_images(tmp_path / "a.tar", 6)


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can be another one")
def test_a_file_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("{}")
    file.chmod(0)
    for place in (tmp_path, *tmp_path.parents[:3]):
        place.chmod(stat.S_IMODE(place.stat().st_mode) | 0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="no permission"):
            plain_file(file)
    finally:
        os.seteuid(0)


BLOCKS = {"ddpm": "unet", "latents": "vae", "unclip": "decoder", "autoencoder": ""}


@pytest.mark.parametrize("kind", BLOCKS)
def test_more_blocks_than_there_are_tensors_are_refused_unbuilt(made, kind: str) -> None:
    file = made(kind) / BLOCKS[kind] / "config.json"
    field = "layers_per_block" if BLOCKS[kind] else "n_residual_blocks"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: 2 * 10**9}))
    with pytest.raises(UserError, match="too few for its config's 2000000000 layers"):
        checkpoints.load(file.parents[bool(BLOCKS[kind])])


def test_numbers_of_an_adapter_that_are_not_finite_are_named(made) -> None:
    folder = made("adapter")
    file = folder / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"1 numbers in {name} that are not finite"):
        checkpoints.load(folder / "adapter")
    checkpoints.load(folder / "adapter", allow_nonfinite=True)


def test_a_lora_whose_tensors_have_too_few_axes_is_refused(made) -> None:
    folder = made("picture loras")
    file = folder / "kohya.safetensors"
    save_file({name: tensor.flatten() for name, tensor in load_file(file).items()}, file)
    model, _ = checkpoints.load(folder / "base")
    with pytest.raises(UserError, match="has the shape"), choosing(Choice()):
        attach_lora(model, file)


def test_an_alpha_is_one_number_and_no_matrix_is_there_twice(made: Callable[[str], Path]) -> None:
    folder = made("picture loras")
    kohya, peft, diffusers = (load_file(folder / f"{each}.safetensors") for each in ("kohya", "peft", "diffusers"))
    alphas = {name: torch.ones(2) for name in kohya if name.endswith(".alpha")}
    told = {"has the shape \\(2,\\) instead of one number": kohya | alphas, "in another spelling": peft | diffusers}
    for sentence, tensors in told.items():
        save_file(tensors, folder / "changed.safetensors")
        model, _ = checkpoints.load(folder / "base")
        with pytest.raises(UserError, match=sentence):
            attach_lora(model, folder / "changed.safetensors")


@pytest.mark.parametrize("text", [r'{"a": "\ud83d"}', r'{"\udc00": 1}', rb'{"a": ["\ud83d\ud83d"]}'])
def test_half_a_character_is_refused_and_a_whole_one_is_not(text: str | bytes) -> None:
    with pytest.raises(UserError, match="half of a character"):
        parse_json(text, "a.json")
    assert parse_json(r'{"a": "\ud83d\ude00"}', "a.json") == {"a": "😀"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{"role": ["user"], "content": "a"}]},
        {"conversations": [{"from": ["human"], "value": "a"}]},
        {"instruction": 5, "output": "a"},
        {"instruction": "a", "input": ["b"], "output": "a"},
    ],
)
def test_conversations_of_other_kinds_are_refused(tmp_path: Path, record: dict) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match="line 1"):
        list(conversations.read(str(tmp_path / "a.jsonl")))


NO_RECORDS = [
    5, [], "gpt", {}, {"name": "gpt"}, {"name": 1, "options": {}}, {"name": "gpt", "options": [], "steps": 1},
    {"name": "gpt", "options": {}, "steps": "1"},
]  # fmt: skip


@pytest.mark.parametrize("record", NO_RECORDS)
def test_a_record_of_a_run_that_says_nothing_is_refused(tmp_path: Path, record: object) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps({"recipe": record}))
    with pytest.raises(UserError, match=r"recipe\.json is damaged"):
        read_recipe(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", bytes(3) + b"\x02" + bytes(40)])
def test_arrays_that_are_cut_off_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(content) if content else b"no gzip")
    with pytest.raises(UserError, match=r"a\.gz is (damaged|no file of bytes)"):
        read_idx(tmp_path / "a.gz")


def test_chunks_of_a_records_picture_are_refused_each_in_its_way(made) -> None:
    file = made("record") / "a.png"
    data = file.read_bytes()
    texts = set()
    for seed in range(40):
        file.write_bytes(structure.chunks(data, random.Random(seed)))
        try:
            read_record(file)
        except UserError as error:
            texts.add(str(error).removeprefix(str(file))[:25])
        if len(texts) > 2:
            return
    pytest.fail(f"40 damaged pictures are refused in few ways: {texts}")


@pytest.mark.parametrize(("field", "value"), [("dim", "16"), ("dim", 1.5), ("n_layers", True), ("tied", 1)])
def test_a_value_of_another_kind_is_named_with_its_field(made, field: str, value: object) -> None:
    folder = made("gpt3")
    torch.manual_seed(0)
    names = {"dim": "hidden_size", "n_layers": "num_layers", "tied": "tie_word_embeddings"}
    content = json.loads((folder / "config.json").read_text())
    name = next(each for each in (names[field], field) if each in content)
    (folder / "config.json").write_text(json.dumps(content | {name: value}))
    with pytest.raises(UserError, match=r"config\.json"):
        checkpoints.load(folder)
