"""What `save` writes: others load it as it is, and a crash or a full disk leaves the old one whole."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from safetensors import SafetensorError

import keifu
from keifu import checkpoints
from keifu.checkpoints.hf.write import INDEX, shards
from keifu.checkpoints.registry import describe
from keifu.data.catalogue import catalogue
from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.models import gpt2, llama, mlp, perceptron

SMALL = {"vocab_size": 320, "dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4}
MODELS = {
    "gpt2": lambda: gpt2.build(gpt2.Config(**SMALL, context_length=64)),
    "llama": lambda: llama.build(llama.Config(**SMALL, context_length=64, n_kv_heads=2, tied=True)),
}


@torch.no_grad()
def test_transformers_loads_model_and_tokenizer(tokenizer, tmp_path) -> None:
    model = MODELS["llama"]().eval()
    tokenizer = tokenizer.with_chat_template(CHATML)
    checkpoints.save(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The capital of Japan is 東京 🙂"
    ids = tokenizer.encode(text)
    assert their_tokenizer(text, add_special_tokens=False).input_ids == ids and their_tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": "Hi"}]
    chat = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat == tokenizer.chat_text(messages)
    expected = theirs(torch.tensor([ids])).logits
    assert (model(torch.tensor([ids])) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == tokenizer.eos_id
    assert theirs.config.bos_token_id == tokenizer.bos_id and theirs.config.pad_token_id == tokenizer.pad_id

    again, same_tokenizer = checkpoints.load(tmp_path)
    assert describe(again.config) == describe(model.config)
    assert same_tokenizer.fingerprint == tokenizer.fingerprint and same_tokenizer.chat_template == CHATML
    assert torch.equal(again(torch.tensor([ids])), model(torch.tensor([ids])))


def test_every_id_that_ends_an_answer_is_kept(tokenizer, tmp_path) -> None:
    several = Tokenizer(tokenizer.backend, tokenizer.special, stop_ids=(3, 7))
    checkpoints.save(MODELS["llama"](), several, tmp_path)
    assert checkpoints.load(tmp_path)[1].stop_ids == several.stop_ids >= {3, 7}


def test_how_to_generate_text_is_kept(tokenizer, tmp_path) -> None:
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "max_new_tokens": 99}
    checkpoints.save(MODELS["llama"](), tokenizer.replace(generation_config=said), tmp_path / "ours")
    assert checkpoints.load(tmp_path / "ours")[1].generation_config.items() >= said.items()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.generation_config.to_diff_dict().items() >= said.items()
    theirs.generation_config.update(top_k=7)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    assert checkpoints.load(tmp_path / "theirs")[1].generation_config.items() >= (said | {"top_k": 7}).items()


def test_the_catalogue_says_it_where_the_files_do_not(tokenizer, tmp_path, monkeypatch) -> None:
    model, entry = MODELS["llama"](), replace(catalogue.entry("smollm2"), generation_config={"do_sample": False})
    monkeypatch.setitem(catalogue.MODELS, "toy", entry)
    monkeypatch.setattr("keifu.checkpoints.hub.fetch", lambda name, table: tmp_path / "plain")
    checkpoints.save(model, tokenizer, tmp_path / "plain")
    assert checkpoints.load("toy")[1].generation_config["do_sample"] is False
    assert "do_sample" not in checkpoints.load(tmp_path / "plain")[1].generation_config  # by its path, it has no entry
    checkpoints.convert("toy", tmp_path / "copy", "hf")
    assert json.loads((tmp_path / "copy/generation_config.json").read_text())["do_sample"] is False
    checkpoints.save(model, tokenizer.replace(generation_config={"do_sample": True}), tmp_path / "plain")
    assert checkpoints.load("toy")[1].generation_config["do_sample"] is True


def test_a_generation_config_that_is_no_object_is_refused(tokenizer, tmp_path) -> None:
    checkpoints.save(MODELS["llama"](), tokenizer, tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"generation_config\.json holds a list where a JSON object is needed"):
        checkpoints.load(tmp_path)


OWN = {
    "gpt2-without-biases": lambda: gpt2.build(gpt2.Config(**SMALL, bias=False)),
    "windowed-and-biased": lambda: llama.build(llama.Config(**SMALL, sliding_window=9, out_bias=True)),
    "mlp": lambda: mlp.build(mlp.Config(dim=3, hidden_dims=(5, 4), n_outputs=2, classes=("no", "yes"))),
    "perceptron": lambda: perceptron.build(perceptron.Config(dim=3)),
}


@pytest.mark.parametrize("kind", OWN)
def test_what_no_published_model_type_says_comes_back_too(kind, tmp_path) -> None:
    model = OWN[kind]()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += torch.randn_like(tensor)
    checkpoints.save(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("keifu_")
    again = checkpoints.load_model(tmp_path)
    assert again.config == model.config and again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_writes_no_text_has_no_tokenizer(tmp_path) -> None:
    checkpoints.save(OWN["mlp"](), None, tmp_path)
    assert checkpoints.load(tmp_path)[1] is None


def test_shards_hold_everything_in_order() -> None:
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 1}
    assert shards(sizes, 7) == [["a", "b"], ["c"], ["d", "e"]]
    assert shards(sizes, 1e9) == [list(sizes)] and shards(sizes, 1) == [[name] for name in sizes]


def state_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def full(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_keeps_the_old_checkpoint(tokenizer, tmp_path, monkeypatch) -> None:
    checkpoints.save(MODELS["llama"](), tokenizer, tmp_path)
    before = state_of(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(UserError, match="disk is full"):
            checkpoints.save(MODELS["gpt2"](), tokenizer, tmp_path)
    assert state_of(tmp_path) == before
    checkpoints.save(MODELS["gpt2"](), tokenizer, tmp_path)
    assert state_of(tmp_path) != before


def test_a_failing_tokenizer_keeps_the_old_checkpoint(tokenizer, tmp_path) -> None:
    class Broken:
        vocab_size = 3

        def save(self, directory):
            raise OSError(5, "Input/output error", str(directory))

    checkpoints.save(MODELS["llama"](), tokenizer, tmp_path)
    before = state_of(tmp_path)
    with pytest.raises(OSError, match="Input/output"):
        checkpoints.save(MODELS["gpt2"](), Broken(), tmp_path)
    assert state_of(tmp_path) == before


def test_other_files_stay_and_a_crash_leaves_nothing_in_the_way(tokenizer, tmp_path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / ".saving-1").mkdir()
    (tmp_path / ".saving-1/model.safetensors").write_bytes(b"half")
    checkpoints.save(MODELS["llama"](), tokenizer, tmp_path)
    assert (tmp_path / "metrics.jsonl").exists() and not list(tmp_path.glob(".saving*"))


KILLED = """
import os, sys
from pathlib import Path
import keifu

folder = Path(sys.argv[1])
model, tokenizer = keifu.load(folder)
Path.replace = lambda source, target: os._exit(9) if target == folder / "config.json" else os.replace(source, target)
keifu.save(model, tokenizer, folder)
"""  # a process that is killed while it renames the files


def test_a_folder_that_a_killed_save_left_half_new_is_refused_until_it_is_written_again(tokenizer, tmp_path) -> None:
    checkpoints.save(MODELS["llama"](), tokenizer, tmp_path)
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == 9
    with pytest.raises(UserError, match="has files of two models: a command that wrote it was interrupted"):
        checkpoints.load(tmp_path)
    checkpoints.save(MODELS["llama"](), tokenizer, tmp_path)
    checkpoints.load(tmp_path)


def test_parts_that_a_killed_process_left_are_removed_by_a_later_conversion(tokenizer, tmp_path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = {
        "dead": f".x.gguf.{ended.pid}.part",
        "new": f".y.gguf.{ended.pid}.part",
        "ours": f".z.gguf.{os.getpid()}.part",
    }
    for name in (*names.values(), ".notes.part"):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, None if name == names["new"] else (0, 0))
    checkpoints.save_gguf(MODELS["llama"](), None, tmp_path / "x.gguf")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"x.gguf", ".notes.part", names["new"], names["ours"]}


def test_nothing_of_an_older_tokenizer_stays(tokenizer, tmp_path) -> None:
    checkpoints.save(MODELS["llama"](), tokenizer.with_chat_template("old {{ messages }}"), tmp_path)
    (tmp_path / "chat_template.jinja").write_text("older")
    checkpoints.save(MODELS["llama"](), tokenizer, tmp_path)
    assert checkpoints.load(tmp_path)[1].chat_template is None


def test_a_file_in_the_place_of_the_folder(tmp_path) -> None:
    (tmp_path / "model").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        checkpoints.save(MODELS["llama"](), None, tmp_path / "model")


PROGRAM = """
import itertools, sys, torch
from keifu import checkpoints
from keifu.models import llama
model = llama.build(llama.Config(vocab_size=2000, dim=96, hidden_dim=96, n_layers=2, n_heads=4))
for number in itertools.count():
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, number)
    checkpoints.save(model, None, sys.argv[1])
    print(number, flush=True)
"""


def test_killed_while_saving(tmp_path) -> None:
    """After kill -9 at any time, what is there is one whole checkpoint, or a sentence that helps."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(6):
            process.stdout.readline()
        time.sleep(0.0137)
        process.send_signal(signal.SIGKILL)
    try:
        model = checkpoints.load_model(tmp_path)
    except UserError as error:  # killed between the renaming of the first file and that of the last
        assert "has files of two models" in str(error)
        folder = re.search(r"move the files of (\S+) into", str(error))
        assert folder
        for file in (tmp_path / folder[1]).iterdir():
            file.replace(tmp_path / file.name)
        (tmp_path / folder[1]).rmdir()
        model = checkpoints.load_model(tmp_path)
    values = {value for parameter in model.parameters() for value in parameter.unique().tolist()}
    assert len(values) == 1 and values.pop() >= 5


@pytest.mark.parametrize("limit", [2500, 5e9])
def test_a_smaller_model_over_a_larger_one_leaves_no_weights_of_it(limit: float, tmp_path: Path) -> None:
    """Both models are several files, or the second is one file; no name is of both."""
    sizes: dict[str, Any] = {"vocab_size": 40, "context_length": 16, "n_heads": 2}
    large = llama.build(llama.Config(**sizes, dim=32, hidden_dim=64, n_layers=4))
    small = llama.build(llama.Config(**sizes, dim=8, hidden_dim=16, n_layers=1))
    keifu.save(large, None, tmp_path, max_shard_bytes=20_000)
    first = {path.name for path in tmp_path.glob("*.safetensors")}
    keifu.save(small, None, tmp_path, max_shard_bytes=limit)
    found = {path.name for path in tmp_path.glob("*.safetensors")}
    assert len(first) > 3 and found and not found & first
    index = tmp_path / INDEX
    assert index.exists() == (limit < 1e9) == (len(found) > 1)
    assert not index.exists() or found == {*json.loads(index.read_text())["weight_map"].values()}
    again = checkpoints.load_model(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in small.state_dict().items())
