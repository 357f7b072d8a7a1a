"""`keifu convert --to onnx`: onnxruntime computes keifu's numbers for any number of rows and tokens.

Without onnxruntime these tests are left out. Another process writes the graphs, because a checked shape is not traced.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import keifu
from keifu.checkpoints.onnx import write
from keifu.checkpoints.onnx.graphs import BATCH, OnnxGraph, graphs_of
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.layers.attention.positions import RopeScaling
from keifu.models import bert, gpt2, llama, transformer
from keifu.models.diffusion import ddpm

SIZE: dict[str, Any] = {"context_length": 32, "dim": 16, "n_layers": 1, "n_heads": 2}
PACKAGED = Path(__file__).parents[2] / "pretrained/src/keifu_pretrained"
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in write.PACKAGES), reason="onnx or onnxruntime is not installed"
)


def unet_toy() -> nn.Module:
    # 16 x 16 pixels are doubled, where PyTorch computes with four kernels
    size = ddpm.Config(
        size=32, channels=1, dim=8, multipliers=(1, 2), n_residual_blocks=1, attention=(1,), norm_groups=4,
        middle_groups=4, n_classes=3, null_class=True,
    )  # fmt: skip
    return ddpm.build(size)


TOYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (lambda: llama.build(llama.Config(300, **SIZE, hidden_dim=24, n_kv_heads=1)), "f32"),
    "gpt2": (lambda: gpt2.build(gpt2.Config(300, **SIZE)), "f16"),
    "marian": (lambda: transformer.build(transformer.Config(300, **SIZE, hidden_dim=24)), "f32"),
    "words": (lambda: bert.build(bert.Config(300, **SIZE, hidden_dim=24)), "int8"),
    "unet": (unet_toy, "f32"),
}
SCRIPT = """
import sys
from keifu.cli import main
for name, dtype in zip(sys.argv[2::2], sys.argv[3::2]):
    main(["convert", f"{sys.argv[1]}/{name}", f"{sys.argv[1]}/onnx/{name}", "--to", "onnx", "--dtype", dtype])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with each toy model, and in onnx/ what the command writes of it."""
    place = tmp_path_factory.mktemp("onnx")
    words, tokenizer = list[str](), train_tokenizer("bpe", ["the cat and the dog"], vocab_size=270)
    for name, (build, dtype) in TOYS.items():
        torch.manual_seed(3)
        model = build()
        for parameter in model.parameters():  # some layers begin at zero, and would hide errors
            nn.init.normal_(parameter, std=0.2)
        keifu.save(model, None if name == "unet" else tokenizer, place / name)
        words += [name, dtype]
    command = [sys.executable, "-c", SCRIPT, str(place), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    return place


class Written:
    """A toy model, and the graphs that the command wrote of it."""

    def __init__(self, folder: Path, name: str):
        self.place = folder / "onnx" / name
        self.model: Any = keifu.load(folder / name, torch.float32, "cpu")[0].eval()

    def run(self, file: str, **inputs: Any) -> Any:
        """Run a graph. A name's dots are written as __."""
        import onnxruntime

        session = onnxruntime.InferenceSession(str(self.place / file), providers=["CPUExecutionProvider"])
        named = {name.replace("__", "."): torch.as_tensor(value).numpy() for name, value in inputs.items()}
        return session.run(None, named)


def cache(rows: int, layers: int, heads: int, width: int, infix: str = "") -> dict[str, torch.Tensor]:
    """Return an empty cache."""
    names = [f"past_key_values__{i}__{infix}{part}" for i in range(layers) for part in ("key", "value")]
    return {name: torch.zeros(rows, heads, 0, width) for name in names}


@needs_onnx
@pytest.mark.slow
def test_a_decoder_writes_token_by_token_as_at_once(folder: Path) -> None:
    toy = Written(folder, "llama")
    tokens = torch.randint(0, 300, (3, 7))
    with torch.inference_mode():
        expected = toy.model(tokens)
    state, logits = cache(3, 1, 1, 8), []
    for i, end in ((0, 4), (4, 5), (5, 7)):
        ones = torch.ones(3, end, dtype=torch.long)
        first, *present = toy.run("onnx/model.onnx", input_ids=tokens[:, i:end], attention_mask=ones, **state)
        logits.append(first)
        state = dict(zip(state, map(torch.as_tensor, present), strict=True))
    torch.testing.assert_close(torch.as_tensor(np.concatenate(logits, 1)), expected, atol=1e-4, rtol=1e-4)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(("name", "heads", "ending", "atol"), [("llama", 1, "", 1e-4), ("gpt2", 2, "_fp16", 0.05)])
def test_padding_at_the_left_changes_nothing(folder: Path, name: str, heads: int, ending: str, atol: float) -> None:
    toy, alone = Written(folder, name), torch.randint(0, 300, (1, 4))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), alone], 1)
    batch = torch.cat([torch.randint(0, 300, (1, 7)), padded])
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    logits, *_ = toy.run(f"onnx/model{ending}.onnx", input_ids=batch, attention_mask=mask, **cache(2, 1, heads, 8))
    with torch.inference_mode():
        expected = toy.model(alone)[0]
    torch.testing.assert_close(torch.as_tensor(logits[1, 3:]), expected, atol=atol, rtol=1e-2 if ending else 1e-4)


@needs_onnx
@pytest.mark.slow
def test_a_translator(folder: Path) -> None:
    toy = Written(folder, "marian")
    source, target = torch.randint(0, 300, (3, 6)), torch.randint(0, 300, (3, 5))
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.inference_mode():
        expected = toy.model(source, target, mask.bool())
    (states,) = toy.run("onnx/encoder_model.onnx", input_ids=source, attention_mask=mask)
    inputs = {"encoder_attention_mask": mask, "encoder_hidden_states": states, **cache(3, 1, 2, 8, "decoder__")}
    logits, *_ = toy.run("onnx/decoder_model_merged.onnx", input_ids=target, **inputs)
    torch.testing.assert_close(torch.as_tensor(logits), expected, atol=1e-4, rtol=1e-4)


@needs_onnx
@pytest.mark.slow
def test_bert_in_int8(folder: Path) -> None:
    toy, tokens = Written(folder, "words"), torch.randint(0, 300, (3, 5))
    inputs = {"attention_mask": torch.ones_like(tokens), "token_type_ids": torch.zeros_like(tokens)}
    (found,) = toy.run("onnx/model_quantized.onnx", input_ids=tokens, **inputs)
    with torch.inference_mode():
        expected = toy.model.words(toy.model.encode(tokens))
    assert found.shape == expected.shape == (3, 5, 300)
    assert torch.corrcoef(torch.stack([torch.as_tensor(found).flatten(), expected.flatten()]))[0, 1] > 0.95


@needs_onnx
@pytest.mark.slow
def test_a_unet_draws_any_number_of_pictures(folder: Path) -> None:
    toy = Written(folder, "unet")
    for rows in (1, 5):
        x, times, labels = torch.randn(rows, 1, 32, 32), torch.randint(0, 900, (rows,)), torch.randint(0, 4, (rows,))
        (found,) = toy.run("unet/model.onnx", sample=x, timestep=times, class_labels=labels)
        with torch.inference_mode():
            expected = toy.model(x, times, labels)
        torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-3, rtol=1e-3)


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(("name", "config"), [("llama", "config.json"), ("unet", "model_index.json")])
def test_a_folder_has_its_configs_and_no_weights(folder: Path, name: str, config: str) -> None:
    files = {path.relative_to(folder / "onnx" / name).as_posix() for path in (folder / "onnx" / name).rglob("*.*")}
    assert config in files and not [file for file in files if "safetensors" in file]


def filled(model: nn.Module) -> Any:
    """Return a model in which no part begins at zero."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def test_the_graph_of_a_bert_reads_segments_and_padding() -> None:
    """Not seen by the comparison at its writing: the examples have one segment."""
    model: Any = filled(bert.build(bert.Config(300, **SIZE, hidden_dim=24)))
    [graph] = graphs_of(model)
    tokens, segments = torch.randint(0, 300, (2, 5)), torch.tensor([[0, 0, 1, 1, 1]] * 2)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    found = graph.module(tokens, mask, segments)
    torch.testing.assert_close(found, model.words(model.encode(tokens, segments, mask.bool())))
    assert not torch.allclose(found, graph.module(tokens, mask, torch.zeros_like(segments)))


@torch.no_grad()
@pytest.mark.parametrize("build", [TOYS["llama"][0], TOYS["gpt2"][0]], ids=["rotary", "learned"])
def test_the_graph_of_a_decoder_counts_positions_from_the_first_real_token(build: Callable[[], nn.Module]) -> None:
    model: Any = filled(build())
    [graph] = graphs_of(model)
    inputs = graph.example(2, 7, 0)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    assert mask.tolist() == [[1] * 7, [0] * 2 + [1] * 5]
    logits, *present = graph.module(*inputs.values())
    torch.testing.assert_close(logits[1, 2:], model(tokens[1:, 2:])[0])
    further = torch.randint(0, 300, (2, 1))
    later, *_ = graph.module(further, torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1), *present)
    torch.testing.assert_close(later[1, 0], model(torch.cat([tokens[1:, 2:], further[1:]], 1))[0, -1])


@pytest.mark.parametrize(("dtype", "fits"), [("f32", False), ("f16", True)])
def test_a_file_in_f16_holds_twice_the_weights(
    dtype: str, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, written = TOYS["llama"][0](), list[str]()
    monkeypatch.setattr(write, "MOST_BYTES", 3 * sum(each.numel() for each in model.parameters()))
    monkeypatch.setattr(write, "check", lambda dtype: None)
    monkeypatch.setattr(write, "_write", lambda graph, place, dtype: written.append(graph.file))
    if fits:
        write.write_onnx(model, None, tmp_path / "out", dtype)
        assert written == ["onnx/model"] and not [*(tmp_path / "out").rglob("*.safetensors")]
    else:
        with pytest.raises(UserError, match="holds 2.1: choose f16"):
            write.write_onnx(model, None, tmp_path / "out", dtype)


class FixedRows(nn.Module):
    """A module whose number of rows the exporter writes into the graph: len is a number of Python."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:1].expand(len(x), 3) + x


@needs_onnx
@pytest.mark.slow
def test_a_graph_for_one_number_of_rows_is_found(tmp_path: Path) -> None:
    example = lambda rows, length, before: {"x": torch.randn(rows, 3)}  # noqa: E731 (as in graphs.py)
    graph = OnnxGraph("model", FixedRows(), example, lambda name: {0: BATCH}, ("y",))
    with pytest.raises(UserError, match=r"model\.onnx does not compute what the model does"):
        write._write(graph, tmp_path, "f32")


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: llama.build(llama.Config(300, **SIZE, hidden_dim=24, sliding_window=4)), "has a sliding window"),
        (lambda: keifu.load(PACKAGED / "emoji-clip")[0], "this is a Clip"),
        (lambda: llama.build(llama.Config(300, **SIZE, rope_scaling=RopeScaling("dynamic", 2.0, 8))), "on the length"),
    ],
    ids=["window", "clip", "length"],
)
def test_other_models_are_refused_by_name(build: Callable[[], nn.Module], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        graphs_of(build())


def test_missing_packages_and_unknown_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="q8_0"):
        write.check("q8_0")
    monkeypatch.setattr(write.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"onnxruntime are missing: pip install '.\[onnx\]'"):
        write.check("int8")
