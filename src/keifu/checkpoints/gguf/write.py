"""Writing GGUF files that llama.cpp loads."""

import errno
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keifu.checkpoints.gguf.config import architecture_for, rotary_head_dim, write_config
from keifu.checkpoints.hf.weight_names import Link, links
from keifu.checkpoints.plan import check_tokenizer, permute_rotary
from keifu.errors import unknown
from keifu.files import replacing

# llama.cpp's number for a file whose matrices are mostly of a type
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
BLOCK = 32  # numbers in a block of Q8_0
UNUSED = 5  # the type of a token that no text has
ALWAYS_EXACT = "position_embd"


def save_gguf(model: nn.Module, tokenizer: Any, path: Path, dtype: str | None = None) -> None:
    """Writes a model and its tokenizer as one GGUF file.

    dtype: f32, f16, bf16 or q8_0 for the matrices, the model's own where None is given; vectors and positions stay
    float32, as llama.cpp wants them. Rows that do not come in blocks of 32 are float32 where q8_0 is asked for.
    """
    config: Any = model.config
    name, fields, settings = write_config(config)
    architecture = architecture_for(config)[1]
    found = permute_rotary(links(model, architecture.names), rotary_head_dim(architecture, config))
    kind = _kind(dtype, next(model.parameters()).dtype)
    fields = {
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        **fields,
        **_vocabulary(tokenizer, config.vocab_size),
    }
    with replacing(path) as temporary:
        try:
            _write(temporary, name, fields, settings, model.state_dict(), found, kind)
        except OSError as error:
            if error.errno is None:  # numpy's words for a disk that took only part of an array
                raise OSError(errno.ENOSPC, str(error), str(path)) from error
            raise


def _kind(dtype: str | None, own: torch.dtype) -> str:
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    kind = names.get(own, "F32") if dtype is None else dtype.upper()
    if kind not in FILE_TYPES:
        raise unknown("GGUF number format to write called", str(dtype), [name.lower() for name in FILE_TYPES])
    return kind


def _vocabulary(tokenizer: Any, size: int) -> dict[str, Any]:
    """The tokenizer's fields, filled up with unused tokens to the size of the embedding, as llama.cpp asks."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    from keifu.data.tokenizers.gguf import to_gguf_fields

    check_tokenizer(tokenizer, size)
    fields = dict(to_gguf_fields(tokenizer))
    unused = range(len(fields["tokenizer.ggml.tokens"]), size)
    filling = {"tokens": [f"[unused {n}]" for n in unused], "token_type": [UNUSED] * len(unused)}
    filling |= {"scores": [-1e9] * len(unused)} if "tokenizer.ggml.scores" in fields else {}
    for key, more in filling.items():
        fields[f"tokenizer.ggml.{key}"] = [*fields[f"tokenizer.ggml.{key}"], *more]
    return fields


def _write(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    settings: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    found: list[Link],
    kind: str,
) -> None:
    """Header first, then one tensor after the other, so that no second copy of the model is made."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(None, architecture)
    for key, value in fields.items():
        _adder(writer, value)(key, value)
    shapes = {name: shape for link in found for name, shape in zip(link.theirs, link.stored_shapes(), strict=True)}
    shapes |= {name: tuple(tensor.shape) for name, tensor in settings.items()}
    for name, shape in shapes.items():
        own = tensor_kind(name, shape, kind)
        probe = encode_tensor(torch.empty(0, shape[-1]), own)
        bytes_shape = (*shape[:-1], probe.shape[-1])
        size = int(np.prod(bytes_shape, dtype=np.int64)) * probe.itemsize
        writer.add_tensor_info(name, bytes_shape, probe.dtype, size, GGMLQuantizationType[own])
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for link in found:
        for name, tensor in zip(link.theirs, link.split(state[link.ours].detach().cpu()), strict=True):
            writer.write_tensor_data(encode_tensor(tensor, tensor_kind(name, tuple(tensor.shape), kind)))
    for tensor in settings.values():
        writer.write_tensor_data(encode_tensor(tensor, "F32"))
    writer.close()


def tensor_kind(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The number format of one tensor in a file whose matrices are of this kind."""
    if len(shape) == 1 or name.startswith(ALWAYS_EXACT):
        return "F32"
    return "F32" if kind == "Q8_0" and shape[-1] % BLOCK else kind


def encode_tensor(tensor: Tensor, kind: str) -> np.ndarray:
    """The numbers as the file holds them: float32, float16, or bytes."""
    if kind in ("F32", "F16"):
        return tensor.to({"F32": torch.float32, "F16": torch.float16}[kind]).numpy()
    if kind == "BF16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    from gguf import GGMLQuantizationType, quantize

    return quantize(tensor.float().numpy(), GGMLQuantizationType[kind])


def _adder(writer: Any, value: Any) -> Callable[[str, Any], None]:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    return writer.add_array if isinstance(value, list) else adders[type(value)]
