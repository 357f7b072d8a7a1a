"""The Python interface as its page and its docstrings show it, and what of a user's own it takes or refuses."""

import doctest
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import keifu
from keifu import interface
from keifu.data.epochs import OwnBatches
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.text import model as interfaces
from keifu.models import llama
from keifu.training.signals import Interrupted

PAGE = Path(__file__).parent.parent / "docs" / "python.md"
EXAMPLES = ["keifu", "keifu.interface",
            "keifu.recipes.own", "keifu.checkpoints.own_module", "keifu.checkpoints.loading",
            "keifu.checkpoints.hf.write", "keifu.inference.text.generate", "keifu.data.epochs"]  # fmt: skip
REFERENCE = PAGE.parent / "reference" / "python.md"
X = torch.linspace(-1, 1, 60).unsqueeze(-1)
DATA = {"x": X, "y": X**2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a language model of a few weights, and return its folder."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("bpe", ["one two three four"] * 9, 270)
    path = tmp_path_factory.mktemp("tiny")
    keifu.save(llama.build(llama.Config(tokenizer.vocab_size, 24, 16, 32, n_layers=1, n_heads=2)), tokenizer, path)
    return path


def test_the_first_guesses_of_other_libraries_get_advice(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = keifu.load(folder)
    with pytest.raises(UserError, match=r"tokenizer\.encode\(text\)"):
        tokenizer("one", return_tensors="pt")
    with pytest.raises(UserError, match=r"keifu\.generate\(model, tokenizer, prompt"):
        model.generate(input_ids=torch.tensor([[1]]), max_new_tokens=3)
    with pytest.raises(UserError, match=r"or a model's name and a prompt"):
        keifu.generate(model, "one")
    model.blocks[0].feedforward = nn.ModuleDict({"inner": model.blocks[0].feedforward})
    with pytest.raises(UserError, match=r"a layer was wrapped, added or renamed\. Put the original layer back"):
        keifu.save(model, tokenizer, tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_model_generates_by_its_name(folder: Path) -> None:
    model, tokenizer = keifu.load(folder)
    options = {"max_tokens": 5, "temperature": 1.0, "seed": 3}
    wanted = keifu.generate(model, tokenizer, "one two", **options)
    assert keifu.generate(str(folder), "one two", **options) == wanted
    assert keifu.generate(folder, "one two", **options) == wanted
    assert keifu.generate(folder, ["one two"], **options) == [wanted]


def test_a_recipe_trains_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert keifu.train("mlp", data="xor", steps=4, hidden=(3,)) == Path("runs/mlp")
    record = json.loads(Path("runs/mlp/recipe.json").read_text())["recipe"]
    assert record["name"] == "mlp" and record["options"]["hidden"] == [3]
    with pytest.raises(UserError, match="already holds a run"):
        keifu.train("mlp", data="xor", steps=4)
    assert keifu.train("mlp", out="runs/mlp", resume=True, steps=12) == Path("runs/mlp")
    assert json.loads(Path("runs/mlp/recipe.json").read_text())["recipe"]["steps"] == 12
    with pytest.raises(UserError, match=r"There is no option of the recipe mlp 'step'. Did you mean 'steps'"):
        keifu.train("mlp", step=4)
    with pytest.raises(UserError, match="There is no recipe 'mpl'"):
        keifu.train("mpl")
    with pytest.raises(UserError, match="must be"):
        keifu.train("mlp", data="xor", steps=-1, out="other")
    with pytest.raises(UserError, match="given by name"):
        keifu.train("mlp", "xor")


def loss(model: nn.Module, batch: dict) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


def settings(**changes) -> keifu.Settings:
    return keifu.Settings(**{"steps": 6, "batch_size": 7, "learning_rate": 0.01, "precision": "float32"} | changes)


LOADED_ONCE = cache(keifu.load)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keifu, "load", LOADED_ONCE)
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "runs/mine/report.html").exists()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_in_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # a saved model is half a gigabyte
    for module in (keifu, interface):  # which load the same model
        monkeypatch.setattr(module, "load", LOADED_ONCE)
    failed, tried = doctest.testmod(import_module(name))
    assert tried and not failed


def test_every_public_name_has_an_example_or_is_a_record() -> None:
    functions = [keifu.generate, keifu.load, keifu.load_weights, keifu.save, keifu.train]
    assert all(">>>" in (function.__doc__ or "") for function in functions)
    assert (Path(keifu.__file__).parent / "py.typed").exists()


WRONG = """
import keifu
import keifu.errors
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models import bert, gpt2
encoder = bert.build(bert.Config(vocab_size=260, context_length=8, dim=8, hidden_dim=8, n_layers=1, n_heads=1))
model = gpt2.build(gpt2.Config(vocab_size=260, context_length=8, dim=8, hidden_dim=8, n_layers=1, n_heads=1))
tokenizer = train_tokenizer("bpe", ["ab"], 257)
for prompt, options in (5, {}), (None, {}), ([5, 6], {}), (b"ab", {}), ([["a"]], {}), ("a", {"stop": [5]}):
    try:
        keifu.generate(model, tokenizer, prompt, **options)
    except keifu.errors.UserError as error:
        print(error)
for call in (
    lambda: keifu.generate(keifu, tokenizer, "a"),
    lambda: keifu.generate(model, None, "a"),
    lambda: keifu.load(None),
    lambda: keifu.load(3),
    lambda: keifu.save(None, None, "x"),
    lambda: keifu.save(model, tokenizer, None),
    lambda: keifu.load_weights(model, None),
    lambda: keifu.train("mlp", data="xor", steps="many"),
    lambda: keifu.train("mlp", data=None),
    lambda: keifu.train("mlp", data="xor", out=3),
    lambda: keifu.train(None),
    lambda: keifu.embed(encoder, tokenizer, "one text"),
    lambda: keifu.embed(encoder, tokenizer, ["a", 3]),
    lambda: keifu.embed(encoder, tokenizer, None),
):
    try:
        print("no error:", call())
    except keifu.errors.UserError as error:
        print(error)
"""
WRONG_TYPES = (
    "writes no text", "the one that keifu.load returned", "None is no name of a model", "3 is no name of a model",
    "the model is None", "The folder to save in is None", "The folder of the weights is None",
    "'many' for steps, which must be int", "None for data, which must be", "out is 3", "and not None",
    "which must be a list of texts", "Text 2 of 2 is 3", "which must be a list of texts",
)  # fmt: skip


def test_arguments_of_other_types_are_told() -> None:
    """In a process of its own: here, types are checked before."""
    keep = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, env=keep, timeout=300)
    lines = done.stdout.splitlines() or pytest.fail(done.stderr)
    assert all("must be a text or a list of token ids" in line for line in lines[:5])
    assert "must be strings" in lines[5] and len(lines) == 6 + len(WRONG_TYPES), done.stderr
    for line, expected in zip(lines[6:], WRONG_TYPES, strict=True):
        assert expected in line


def test_the_messages_of_a_conversation_are_answered(folder: Path) -> None:
    model, tokenizer = keifu.load(folder)
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"},
                {"role": "user", "content": "three"}]  # fmt: skip
    with pytest.raises(UserError, match="has no chat template"):
        keifu.generate(model, tokenizer, messages)
    chatting = tokenizer.with_chat_template("{% for m in messages %}{{ m.content }} {% endfor %}")
    options = {"max_tokens": 5, "temperature": 0.0}
    answer = keifu.generate(model, tokenizer, "one two three ", **options)
    assert keifu.generate(model, chatting, messages, **options) == answer
    with pytest.raises(UserError, match="leave out raw"):
        keifu.generate(model, chatting, messages, raw=True)
    with pytest.raises(UserError, match="role"):
        keifu.generate(model, chatting, [{}])


def test_a_run_of_ones_own_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, parted = network(), network()
    keifu.train(whole, loss, DATA, settings(), tmp_path / "whole")
    calls = []

    def stopping(model: nn.Module, batch: dict) -> torch.Tensor:
        calls.append(len(batch["x"]))
        if len([size for size in calls if size == 7]) == 5:
            signal.raise_signal(signal.SIGINT)  # Ctrl-C
        return loss(model, batch)

    with pytest.raises(Interrupted, match="To go on:\nthe same call of keifu.train"):
        keifu.train(parted, stopping, DATA, settings(save_every=2), tmp_path / "parted")
    with pytest.raises(UserError, match=r"the same call of keifu.train with out=.*resume=True"):
        keifu.train(network(), loss, DATA, settings(save_every=2), tmp_path / "parted")
    resumed = network()
    keifu.train(resumed, loss, DATA, settings(save_every=2), tmp_path / "parted", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert json.loads((tmp_path / "parted/recipe.json").read_text())["title"] == "Sequential"


def test_a_run_without_a_title_is_called_by_its_folder(tmp_path: Path) -> None:
    from keifu.training.loop import train
    from keifu.training.protocols import Run

    def objective(model, batch) -> keifu.LossOutput:
        return keifu.LossOutput(loss(model, batch) * 7, 7)

    train(network(), objective, OwnBatches(DATA, 7), settings(), Run(tmp_path / "x"))
    assert "<h1>x" in (tmp_path / "x/report.html").read_text()


class Rows:
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int):
        if not 0 <= index < 10:
            raise IndexError(index)
        return {"x": torch.tensor([float(index)]), "y": index}


def test_a_data_set_gives_every_example_once_an_epoch() -> None:
    data = OwnBatches(Rows(), 4, held_out=0.2)
    drawn = torch.cat([data.batch(step)["y"] for step in range(4)])
    held_out = torch.cat([batch["y"] for batch in data.validation()])
    first, second = drawn[:8], drawn[8:]
    assert sorted([*first.tolist(), *held_out.tolist()]) == list(range(10))
    assert sorted(second.tolist()) == sorted(first.tolist()) and first.tolist() != second.tolist()
    assert torch.equal(data.batch(1)["y"], OwnBatches(Rows(), 4, held_out=0.2).batch(1)["y"])
    assert data.batch(0)["x"].shape == (4, 1)
    other = OwnBatches({"x": X + 1}, 4)
    assert other.fingerprint != OwnBatches({"x": X}, 4).fingerprint == OwnBatches({"x": X.clone()}, 4).fingerprint


@pytest.mark.parametrize(
    ("source", "size", "told"),
    [
        ({"x": X, "y": X[:5]}, 4, r"as many examples each, and they have \{'x': 60, 'y': 5\}"),
        ({}, 4, "as many examples each, and they have none"),
        ({"x": X}, 55, "A batch of 55 cannot be drawn from 54 examples"),
        ([(1, 2)] * 10, 2, "An example of the data is a tuple"),
    ],
)
def test_data_that_cannot_be_are_refused(source, size: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        OwnBatches(source, size).batch(0)


def test_an_objective_that_gives_no_mean_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"The objective gave shape \[\d, 1\]"):
        keifu.train(network(), lambda model, batch: model(batch["x"]), DATA, settings(), tmp_path)


@pytest.mark.parametrize(
    ("parts", "optimizer"),
    [
        ((nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)), "adamw"),  # one row has no variance
        ((nn.Linear(1, 8, bias=False), nn.Linear(8, 1, bias=False)), "muon"),  # which leaves nothing to AdamW
    ],
)
def test_a_network_of_other_layers_learns(parts, optimizer, tmp_path: Path) -> None:
    """A straight line, which both networks can learn."""
    torch.manual_seed(0)
    data = {"x": X, "y": 3 * X}
    model = nn.Sequential(*parts)
    before, first = [parameter.detach().clone() for parameter in model.parameters()], float(loss(model, data))
    keifu.train(model, loss, data, settings(optimizer=optimizer), tmp_path)
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert float(loss(model.train(), data)) < first


@pytest.mark.parametrize(
    ("trained", "told"),
    [(True, "no weight whose name begins with 'heads'.*Known: 0, 2"), (False, "No weight of the model requires a")],
)
def test_weights_that_are_not_there_to_be_trained(trained: bool, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        chosen = settings(rate_shares=(("heads", 0.5),))
        keifu.train(network().requires_grad_(trained), loss, DATA, chosen, tmp_path)


class Tied(nn.Module):
    """Two layers that share a matrix, and a config of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"dim": 3}
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("count", torch.tensor(5))


def test_an_own_module_is_saved_and_filled_again(tmp_path: Path) -> None:
    model = Tied()
    keifu.save(model, None, tmp_path)
    again = keifu.load_weights(Tied(), tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert again.first.weight is again.second.weight and not again.training
    assert json.loads((tmp_path / "config.json").read_text())["config"] == {"dim": 3}
    with pytest.raises(UserError, match=r"2 missing \(bias, weight\); 4 not part of the module \(count, "):
        keifu.load_weights(nn.Linear(3, 3), tmp_path)
    keifu.save(nn.Linear(2, 3), None, tmp_path)
    with pytest.raises(UserError, match=r"weight is \[3, 2\] where the module has \[3, 3\]"):
        keifu.load_weights(nn.Linear(3, 3), tmp_path)
    untied = Tied()
    untied.second = nn.Linear(3, 3)
    keifu.save(untied, None, tmp_path)
    with pytest.raises(UserError, match="different numbers for what this module shares: first.weight and second.weig"):
        keifu.load_weights(again, tmp_path)
    assert torch.equal(again.first.weight, model.first.weight)
    with pytest.raises(UserError, match="it has no model.safetensors"):
        keifu.load_weights(nn.Linear(3, 3), tmp_path / "nothing")


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 3e38])
def test_weights_that_are_not_finite_are_refused_but_masks_are_read(value: float, tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    keifu.save(model, None, tmp_path)
    keifu.load_weights(model, tmp_path)
    with torch.no_grad():
        model.weight[0, 0] = value
    keifu.save(model, None, tmp_path)
    with pytest.raises(UserError, match="has numbers in weight that are not finite, or beyond 1e19: it is damaged"):
        keifu.load_weights(model, tmp_path)


def test_loading_an_own_module_says_how() -> None:
    _, tokenizer = LOADED_ONCE("smollm2")
    assert repr(tokenizer).startswith("Tokenizer(BPE, 49,152 tokens, bos '<|im_start|>'")


@pytest.mark.parametrize("name", ["Model", "Encoder", "TwoTowers", "Translator", "TaskHeadModel"])
def test_an_interface_asks_for_what_every_python_sees_of_a_module(name: str) -> None:
    """From Python 3.12 on isinstance sees no parameter and no part of a module, which are no attributes of its own."""
    assert {*vars(interfaces)[name].__annotations__} == {"config"}


def test_the_names_of_the_reference_are_those_of_import_keifu() -> None:
    entries = re.findall(r"^::: (\S+)\.(\w+)((?:\n +.*)*)", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE)
    public = [(module, name) for module, name, options in entries if "heading:" not in options]
    assert sorted(name for _, name in public) == [name for name in keifu.__all__ if name != "__version__"]
    for module, name in public:
        assert getattr(keifu, name) is getattr(import_module(module), name)
