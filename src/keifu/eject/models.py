"""`eject`: a model as one file that needs torch alone."""

import ast
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from keifu import __version__
from keifu.eject.executed import record
from keifu.eject.writing import FileWriter, Name
from keifu.layers import linear

LENGTH, ROWS = 7, 2
HEADER = '''"""{title}

`keifu eject {name}` (keifu {version}) wrote this file: the code that the model executes, without branches for other
models, without caches and kernels. It needs torch alone. Its argument may be a file of weights that
`keifu eject MODEL --weights FILE` has written.
"""

from __future__ import annotations

import json
import sys
'''
FOOTER = '''


CONFIG = {config}
TYPES = {{"F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "BOOL": torch.bool}}


def read_weights(path: str) -> dict[str, torch.Tensor]:
    """Read a file of safetensors: the length of a JSON header, the header, and the numbers."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        numbers = bytearray(file.read())
    header.pop("__metadata__", None)
    weights = {{}}
    for name, row in header.items():
        begin, end = row["data_offsets"]
        weights[name] = torch.frombuffer(numbers[begin:end], dtype=TYPES[row["dtype"]]).view(row["shape"])
    return weights


if __name__ == "__main__":
    model = build(CONFIG).eval()
    if len(sys.argv) > 1:
        model.load_state_dict(read_weights(sys.argv[1]))
    print(f"{{sum(weight.numel() for weight in model.parameters()):,}} parameters")
    with torch.no_grad():
        print(model({inputs}))
'''


def tokens(length: int = LENGTH) -> Tensor:
    """Return rows of the token 1."""
    return torch.ones(ROWS, length, dtype=torch.long)


def picture(config: Any) -> Tensor:
    """Return pictures of a config's size and channels."""
    size = config.size if isinstance(config.size, tuple) else (config.size or 32,) * 2
    return torch.zeros(ROWS, config.channels, *size)


def times() -> Tensor:
    """Return a noise level for each row."""
    return torch.ones(ROWS, dtype=torch.long)


def denoised(config: Any) -> tuple[Tensor, Tensor]:
    """Return noisy pictures and their noise levels."""
    return picture(config), times()


def _ddpm(config: Any) -> tuple[Tensor, ...]:
    return (*denoised(config), times()) if config.n_classes else denoised(config)


def _dit(config: Any) -> tuple[Tensor, ...]:
    return (*denoised(config.transformer), times())


def _prior(config: Any) -> tuple[Tensor, ...]:
    size = config.embedding_dim
    caption = torch.zeros(ROWS, config.caption_dim or size)
    return torch.zeros(ROWS, size), times(), caption, torch.zeros(ROWS, config.context_length, size)


def _unclip_decoder(config: Any) -> tuple[Tensor, ...]:
    label = times() if config.label == "class" else torch.zeros(ROWS, config.label_dim or 4 * config.widths[0])
    return torch.zeros(ROWS, config.channels, 64, 64), times(), label, torch.zeros(ROWS, 3, config.context_dim)


def _dalle(config: Any) -> tuple[Tensor, ...]:
    side = config.vae.size // config.vae.factor
    length = config.context_length
    return tokens(length), torch.ones(ROWS, length, dtype=torch.bool), torch.ones(ROWS, side, side, dtype=torch.long)


def _clip(config: Any) -> tuple[Tensor, ...]:
    side = config.image.image_size
    return torch.zeros(ROWS, 3, side, side), tokens()


def _with_pictures(config: Any) -> tuple[Tensor | None, ...]:
    """Return sequences with the tokens of one picture each, and the pictures."""
    before, places = tokens(1), torch.full((ROWS, config.image_tokens), config.image_token)
    side = config.image.image_size
    return torch.cat([before, places, before], 1), None, None, torch.zeros(ROWS, config.image.channels, side, side)


def _stable_diffusion_3(config: Any) -> tuple[Tensor, ...]:
    pooled = torch.zeros(ROWS, config.pooled_dim)
    return (*denoised(config), torch.zeros(ROWS, LENGTH, config.text_dim), pooled)


def _unclip_conditioning(config: Any) -> tuple[Tensor, ...]:
    one = torch.zeros(ROWS, config.embedding_dim)
    return one, one, torch.zeros(ROWS, LENGTH, config.embedding_dim)


# module of a model → inputs of its forward pass by its Config; language models read tokens
INPUTS: dict[str, Callable[[Any], tuple[Tensor | None, ...]]] = {
    "mlp": lambda config: (torch.zeros(ROWS, config.dim),),
    "perceptron": lambda config: (torch.zeros(ROWS, config.dim, dtype=torch.float64),),
    "seq2seq": lambda config: (tokens(), tokens(LENGTH - 2)),
    "transformer": lambda config: (tokens(), tokens(LENGTH - 2)),
    "classic.word2vec": lambda config: (times(), tokens()),
    "classic.gan": lambda config: (torch.zeros(ROWS, config.latent_dim),),
    "variants.t5": lambda config: (tokens(), tokens(LENGTH - 2)),
    "speech.whisper": lambda config: (torch.zeros(ROWS, config.n_mels, 2 * config.audio_length), tokens()),
    "clip.clip": _clip,
    "clip.image": lambda config: (torch.zeros(ROWS, config.channels, config.image_size, config.image_size),),
    "multimodal.llava": _with_pictures,
    "multimodal.smolvlm": _with_pictures,
    "dalle.dalle": _dalle,
    "dalle.discrete_vae": lambda config: (picture(config),),
    "diffusion.ddpm": _ddpm,
    "diffusion.autoencoder_kl": lambda config: (picture(config),),
    "diffusion.vq_vae": lambda config: (picture(config),),
    "diffusion.score": lambda config: (torch.zeros(ROWS, config.dim), times(), times()),
    "diffusion.conditioned_unet": lambda config: (*denoised(config), torch.zeros(ROWS, LENGTH, config.context_dim)),
    "diffusion.dit": _dit,
    "diffusion.mean_flow": lambda config: (picture(config), times().float(), times().float(), times()),
    "diffusion.sd3": _stable_diffusion_3,
    "unclip.prior": _prior,
    "unclip.decoder": _unclip_decoder,
    "unclip.conditioning": _unclip_conditioning,
}


# models whose code looks at numbers, so that they run with small sizes on the CPU
WITH_NUMBERS = ("mixture.", "hybrid.qwen3", "seq2seq", "multimodal.")
# models that are written without the parts that have files of their own
ADAPTED: dict[str, Callable[[Any], Any]] = {"diffusion.dit": lambda config: replace(config, autoencoder=None)}


def smaller(config: Any) -> Any:
    """Return a Config with the same layers, few of them, and small sizes."""
    if "image_token" in vars(config):  # a decoder that reads pictures
        text = smaller(config.text)
        return replace(config, text=text, image=smaller(config.image), image_token=text.vocab_size - 1)
    most = {"n_layers": 4, "n_shared_layers": 1, "vocab_size": 64, "n_experts": 16}
    changes = dict[str, Any]()
    for each in fields(config):
        value = getattr(config, each.name)
        largest = most.get(each.name, 64 if "hidden" in each.name or each.name.endswith("dim") else None)
        if largest and isinstance(value, int) and not isinstance(value, bool) and each.name not in ("dim", "head_dim"):
            changes[each.name] = min(value, largest)
    before = getattr(config, "n_heads", 1)
    n_heads = min(before, 8)
    if before > n_heads:
        changes["n_heads"] = n_heads
        if kv_heads := getattr(config, "n_kv_heads", None):
            changes["n_kv_heads"] = max(1, kv_heads * n_heads // before)
    return replace(config, **changes, dim=64 if getattr(config, "head_dim", None) else 16 * n_heads)


def inputs_of(module: str, config: Any) -> tuple[Tensor | None, ...]:
    """Return inputs of the forward pass of a model."""
    return INPUTS[module](config) if module in INPUTS else (tokens(),)


def eject(module: str, config: Any, name: str) -> str:
    """Return the text of one file with the model of a module under keifu.models.

    The model is built and runs on the meta device, in evaluation and in training, so that nothing is computed. name: of
    the model, for the title.
    """
    origin = import_module(f"keifu.models.{module}")

    if module in ADAPTED:
        config = ADAPTED[module](config)
    meta = not any(module.startswith(each) for each in WITH_NUMBERS)
    small = config if meta else smaller(config)

    def run() -> None:
        with torch.device("meta" if meta else "cpu"), torch.no_grad():
            model: nn.Module = origin.build(small)
            for training in (False, True):
                model.train(training)(*inputs_of(module, small))

    before, linear.USES_ONEDNN = linear.USES_ONEDNN, False
    try:
        executed = record(run)
    finally:
        linear.USES_ONEDNN = before
    place = f"keifu.models.{module}"
    writer = FileWriter(executed)
    body = writer.file([Name(place, "Config"), Name(place, "build")])
    title = " ".join((origin.__doc__ or name).split("\n\n")[0].split("\n"))
    with torch.device("cpu"):
        shown = ", ".join(map(_creation, inputs_of(module, config)))
    header = HEADER.format(title=title, version=__version__, name=name)
    return header + body.rstrip() + FOOTER.format(config=written(config, writer, body), inputs=shown)


def _creation(tensor: Tensor | None) -> str:
    """Return the expression that makes an input: None, zeros, ones, or rows that are equal."""
    if tensor is None:
        return "None"
    shape = ", ".join(map(str, tensor.shape))
    if tensor.dtype == torch.float32:
        return f"torch.zeros({shape})"
    if bool((tensor == 1).all()):
        return f"torch.ones({shape}, dtype={tensor.dtype})"
    runs = [(number, len([*equal])) for number, equal in groupby(tensor[0].tolist())]
    parts = [f"[{number}] * {count}" if count > 1 else f"[{number}]" for number, count in runs]
    return f"torch.tensor([{' + '.join(parts)}] * {len(tensor)})"


def written(value: Any, writer: FileWriter, body: str) -> str:
    """Return the expression that makes a Config: the fields that the file has and that differ from the defaults."""
    if not is_dataclass(value) or isinstance(value, type):
        if isinstance(value, tuple) and any(map(is_dataclass, value)):
            return f"({''.join(f'{written(each, writer, body)}, ' for each in value)})"
        return repr(value)
    kind = type(value)
    changed, present = list[str](), fields_of(kind, writer, body)
    for each in fields(value):
        own = getattr(value, each.name)
        if each.init and each.name in present and (not hasattr(kind, each.name) or getattr(kind, each.name) != own):
            changed.append(f"{each.name}={written(own, writer, body)}")
    return f"{writer.titles[Name(kind.__module__, kind.__name__)]}({', '.join(changed)})"


def fields_of(kind: type, writer: FileWriter, body: str) -> set[str]:
    """Return the fields that a dataclass and its bases have in the file."""
    titles = {writer.titles.get(Name(each.__module__, each.__name__)) for each in kind.__mro__}
    classes = [node for node in ast.parse(body).body if isinstance(node, ast.ClassDef) and node.name in titles]
    return {
        each.target.id
        for node in classes
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
