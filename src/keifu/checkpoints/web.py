"""A page with a model of one's own: the engine, the weights in int8 or as they are, the tokenizer, and a live element.

It reads a Hugging Face or diffusers folder and knows no model classes. The engine reads few kinds of models; any other
is refused by name, before something is written.
"""

import html
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from keifu.errors import UserError
from keifu.page import kernel
from keifu.page.single_file import single_file

ELEMENTS = {"llama": "gpt-en", "marian": "ja-en", "bert": "bert-en", "keifu_mlp": "network", "DDPMPipeline": "digits"}
WEIGHTS = "model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = ("config.json", WEIGHTS, "generation_config.json", "tokenizer.json")
FILES = {
    "keifu_mlp": ("config.json", WEIGHTS),
    "DDPMPipeline": ("model_index.json", "unet/config.json", UNET, "scheduler/scheduler_config.json"),
}
SMALLEST = 4096  # numbers of a matrix that is worth scales
PAGE_HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="live/live.css">
<style>
:root {{ color-scheme: light dark; --md-default-fg-color: light-dark(#222, #ddd); --md-default-fg-color--light:
light-dark(#666, #aaa); --md-default-fg-color--lightest: light-dark(#0002, #fff2); }}
body {{ font: 1.4rem system-ui, sans-serif; max-width: 52rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; }} .live {{ font-size: 1rem !important; }}
</style>
<h1>{title}</h1>
<div data-live="{element}" data-own {data}>
<p>This page needs JavaScript, and as a folder a web server: python -m http.server</p></div>
<script type="module" src="live/live.js"></script>
</html>
"""


@dataclass(frozen=True)
class Exported:
    """A model that the engine reads. element: the live element that shows it; data: the element's attributes."""

    element: str
    files: tuple[str, ...]
    data: dict[str, str]


def write_web(model: Path, out: Path, title: str, int8: bool, one_file: bool = False) -> None:
    """Write the page of the model in the folder `model` into the folder `out`, or into the HTML file `out`.

    int8: whether the matrices, which must be float32 in the folder, are stored in int8 with a scale for each output.
    Raises `UserError` for a model or tokenizer that the engine does not read.
    """
    exported = exported_form(model)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        place = Path(folder) / "page"
        _write_folder(model, place, exported, title, int8)
        if one_file:
            text = Path(folder) / "page.html"
            text.write_text(single_file(place), encoding="utf-8")
            text.replace(out)
            return
        out.mkdir(exist_ok=True)
        for part in place.iterdir():
            if (out / part.name).is_dir():
                shutil.rmtree(out / part.name)
            part.replace(out / part.name)


def _write_folder(model: Path, place: Path, exported: Exported, title: str, int8: bool) -> None:
    """Write the page, the engine and the model's files into a new folder."""
    kernel.copy_page(place)
    for file in exported.files:
        target = place / "live/models/own" / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if int8 and file.endswith(".safetensors"):
            save_file(dict(in_int8(model / file)), target)
        else:
            shutil.copyfile(model / file, target)
    size = sum((place / "live/models/own" / file).stat().st_size for file in exported.files)
    data = {**exported.data, "files": " ".join(f"own/{file}" for file in exported.files), "bytes": str(size)}
    attributes = " ".join(f'data-{name}="{html.escape(value)}"' for name, value in data.items())
    page = PAGE_HTML.format(title=html.escape(title), element=exported.element, data=attributes)
    (place / "index.html").write_text(page, encoding="utf-8")


def exported_form(model: Path) -> Exported:
    """Return how the engine shows the model of a folder. Raises `UserError` for one that it does not read."""
    index = _json(model / "model_index.json") if (model / "model_index.json").is_file() else {}
    config = _json(model / ("unet/config.json" if index else "config.json"))
    model_type = str(index.get("_class_name") or config.get("model_type"))
    if model_type not in ELEMENTS:
        raise UserError(f"The engine of the page does not read {model_type} models: it reads {', '.join(ELEMENTS)}.")
    files = tuple(file for file in FILES.get(model_type, TEXT) if (model / file).is_file())
    weights = UNET if index else WEIGHTS
    if weights not in files:
        raise UserError(
            f"The page takes a model in one file {weights}, and this one is in parts: choose a smaller one."
        )
    for unreadable, reason in _limits(model_type, config):
        if unreadable:
            raise UserError(f"The engine of the page does not read this {model_type} model: {reason}.")
    element, data = ELEMENTS[model_type], {"kind": model_type}
    if "tokenizer.json" in files and _check_tokenizer(_json(model / "tokenizer.json")) and model_type == "llama":
        element = "chat-en"
    if index:
        classes = int(config.get("num_class_embeds") or 0) - int(config.get("_null_class", False))
        data |= {"classes": str(classes), "side": str(config["sample_size"])}
    return Exported(element, files, data)


def _limits(model_type: str, config: dict[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield what the engine does not compute: whether the config has it, and a description."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    yield rope.get("rope_type", "default") != "default", "its rotary positions are scaled"
    acts = {"llama": ("hidden_act", "silu"), "bert": ("hidden_act", "gelu"), "marian": ("activation_function", "relu")}
    if model_type in acts:
        field, act = acts[model_type]
        yield config.get(field) != act, f"its activation is {config.get(field)}, and not {act}"
    if model_type == "llama":
        yield bool(config.get("mlp_bias")), "its feed-forward layers have biases"
    if model_type == "marian":
        yield not config.get("share_encoder_decoder_embeddings", True), "it has a vocabulary for each language"
    if model_type == "bert":
        heads = config.get("architectures") or ["none"]
        yield heads[0] != "BertForPreTraining", f"it fills in no words ({heads[0]})"
    if model_type == "keifu_mlp":
        size = config.get("dim"), config.get("n_outputs")
        yield (
            size != (784, 10),
            f"the page draws 784 pixels of 10 digits, and it has {size[0]} inputs, {size[1]} outputs",
        )
    if model_type == "DDPMPipeline":
        yield config.get("in_channels") != 1, "it draws in colour, and the page in grey"
        yield not isinstance(config.get("sample_size"), int), "its pictures are no squares"


def _check_tokenizer(json: dict[str, Any]) -> bool:
    """Return whether the tokenizer has the tokens of conversations. Raises `UserError` if the engine does not read
    it."""
    algorithm = json["model"]["type"]
    steps: dict[str, Any] = json["pre_tokenizer"] or {"type": "unsplit"}
    parts: list[dict[str, Any]] = steps.get("pretokenizers", [steps])
    strange = {part["type"] for part in parts} - {"ByteLevel", "Digits", "Split", "BertPreTokenizer"}
    if algorithm not in ("BPE", "WordPiece") or strange:
        raise UserError(
            f"The engine of the page does not read {' and '.join(sorted(strange) or [algorithm])} tokenizers."
        )
    return "<|im_start|>" in {token["content"] for token in json["added_tokens"]}


def in_int8(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a file, with matrices in int8: a row times its scale (`NAME_scale`) is about the original
    row. Small tensors and vectors stay float32."""
    with safe_open(file, framework="np") as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
            tensor = opened.get_tensor(name)
            if tensor.ndim < 2 or tensor.size < SMALLEST:
                yield name, tensor
                continue
            rows = tensor.reshape(len(tensor), -1)
            scale = np.maximum(np.abs(rows).max(1), 1e-12) / 127
            yield name, np.rint(rows / scale[:, None]).astype(np.int8).reshape(tensor.shape)
            yield f"{name}_scale", scale.astype(np.float32)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
