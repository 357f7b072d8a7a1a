"""LoRAs of text-to-image models: one .safetensors file in any of the published naming schemes, read and written.

peft: `unet.….to_q.lora_A.weight` (diffusers today). diffusers: `unet.….to_q.lora.down.weight`, and the older
`….processor.to_q_lora.down.weight`. kohya: `lora_unet_…_to_q.lora_down.weight` and `.alpha`, and `lora_te_…` for the
text encoder. All are read; names are compared with underscores for dots, as kohya writes them. The family's table of
weight names lists the layers and their published names.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from keifu.checkpoints.lora.peft import ParsedName, attach_tensors, layers, read_tensors, whole_tensors
from keifu.errors import UserError, require_known
from keifu.files import write_atomic
from keifu.layers.lora import Adapter, LoraSettings, merge
from keifu.processes import current

ENDS = {  # end of a tensor's name → its role: the lower matrix, the upper one, their scale, DoRA's lengths
    ".lora_A.weight": "a", ".lora_linear_layer.down.weight": "a", ".lora.down.weight": "a", "_lora.down.weight": "a",
    ".lora_down.weight": "a", ".lora_B.weight": "b", ".lora_linear_layer.up.weight": "b", ".lora.up.weight": "b",
    "_lora.up.weight": "b", ".lora_up.weight": "b", ".alpha": "alpha", ".lora_magnitude_vector": "length",
    ".dora_scale": "length",
}  # fmt: skip
STARTS = {"lora_unet_": "unet_", "lora_te_": "text_encoder_", "lora_te1_": "text_encoder_"}
# diffusers' ends for the text encoder; the U-Net's were .lora.…
OF_TEXT = ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
FILE = "pytorch_lora_weights.safetensors"  # diffusers' file name in a folder
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}
OTHERS = {"hada_": "a LoHa", "lokr_": "a LoKr", "lora_mid": "a LoRA in three parts"}
WRITTEN: Mapping[str, tuple[str, str]] = {
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "diffusers": (".lora.down.weight", ".lora.up.weight"),
    "kohya": (".lora_down.weight", ".lora_up.weight"),
}


def apply_lora(model: nn.Module, path: str | Path, scale: float = 1.0) -> nn.Module:
    """Merge a LoRA into the weights of a model, in place, `scale` times as strongly as it was trained.

    Raises one UserError for all keys or shapes that do not fit.
    """
    return merge(attach_lora(model, path, scale))


def attach_lora(model: nn.Module, path: str | Path, scale: float = 1.0) -> nn.Module:
    """Attach a file's adapters to the layers of a model, in place, and freeze the other weights."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file, and keifu reads LoRAs from no other.")
    layer_of = layers(model)
    parse = partial(_parse, {_weight_name(label): label for label in layer_of})
    return attach_tensors(model, path, layer_of, read_tensors(path), parse, partial(_low, scale), _unknown_weight)


def _low(scale: float, label: str, parts: dict[str, Tensor]) -> LoraSettings:
    """Return the settings of one layer's adapter. Flatten its convolution kernels to matrices in `parts`."""
    alpha = parts.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        raise UserError(f"The alpha of {label} has the shape {tuple(alpha.shape)} instead of one number.")
    rank = len(parts["a"]) if "a" in parts and parts["a"].ndim > 1 else 1
    parts |= {part: t.flatten(1 if part != "length" and t.ndim > 1 else 0) for part, t in parts.items()}
    return LoraSettings(rank, scale * (rank if alpha is None else float(alpha)), dora="length" in parts)


def _parse(spelled: Mapping[str, str], name: str) -> ParsedName:
    """Parse the name of a tensor. spelled: normalised name of a layer (see `_weight_name`) → its published name."""
    end = next((end for end in ENDS if name.endswith(end)), "")
    layer = _weight_name(name.removesuffix(end))
    # older files have to_out for to_out.0
    return spelled.get(layer) or spelled.get(f"{layer}_0", ""), ENDS.get(end, ""), name


def _weight_name(name: str) -> str:
    """Return the normalised form of a name: the pipeline's part first, underscores for dots, no optional prefix."""
    name = name.removeprefix("base_model.model.").replace(".processor.", ".").replace(".", "_")
    start = next((start for start in STARTS if name.startswith(start)), None)
    if start is not None:
        name = STARTS[start] + name.removeprefix(start)
    elif not name.startswith(("unet_", "text_encoder_", "vae_")):
        name = f"unet_{name}"
    if name.startswith("text_encoder_"):
        name = name.replace("text_encoder_text_model_", "text_encoder_")
        for old, new in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")):
            name = name.removesuffix(old) + new if name.endswith(f"self_attn_{old}") else name
    return name


def _unknown_weight(name: str) -> str:
    method = next((what for part, what in OTHERS.items() if f".{part}" in name), None)
    return "belongs to no layer of this model" if method is None else f"is of {method}, which keifu does not implement"


def save_lora(model: nn.Module, path: str | Path, style: str = "peft") -> None:
    """Write a model's adapters as one file, for diffusers (style "peft" or "diffusers") or kohya's tools ("kohya").

    The first two styles do not store alpha: if alpha differs from the rank, the upper matrix is written scaled.
    """
    from safetensors.torch import save

    require_known("spelling of a LoRA", style, WRITTEN)
    adapters = whole_tensors(model)
    if not adapters:
        raise UserError("This model has no adapters to save.")
    if strange := [adapter.target.label for adapter in adapters if adapter.target.label.partition(".")[0] not in KOHYA]:
        raise UserError(f"A LoRA's file holds adapters of the U-Net and the text's encoder, not of {strange[0]}.")
    if style == "diffusers" and any(adapter.length is not None for adapter in adapters):
        raise UserError("The older spelling of diffusers has no word for DoRA's lengths: write it as peft or kohya.")
    if current().is_main:
        tensors = {
            name: t.contiguous() for item in adapters.items() for name, t in _format_weights(*item, style).items()
        }
        write_atomic(Path(path), save(tensors, metadata={"format": "pt"}))


def _format_weights(adapter: Adapter, weights: Mapping[str, Tensor], style: str) -> dict[str, Tensor]:
    """Return the tensors of one adapter by name; those of convolutions have kernel shape."""
    label, (down, up) = adapter.target.label, WRITTEN[style]
    if style == "diffusers" and label.startswith("text_encoder."):
        down, up = OF_TEXT
    a, b = weights["a"], weights["b"]
    scale = adapter.low.scale
    if style == "kohya":
        part, _, path = label.partition(".")
        label = KOHYA[part] + path.replace(".", "_")
    elif scale != 1:
        b = b * scale
    kernel = adapter.kernel
    tensors = {down: a.view(len(a), -1, *kernel), up: b.view(*b.shape, *[1] * len(kernel))}
    if style == "kohya":
        tensors[".alpha"] = torch.tensor(scale * adapter.low.rank)
    if adapter.length is not None:
        length = weights["length"]
        name, shape = (".dora_scale", (-1, 1)) if style == "kohya" else (".lora_magnitude_vector", (-1,))
        tensors[name] = length.view(*shape)
    return {f"{label}{end}": tensor for end, tensor in tensors.items()}
