"""Writing GGUF files that llama.cpp loads."""

import errno
import math
import re
import sys
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from keifu.checkpoints.gguf.config import architecture_for, rotary_head_dim, write_config
from keifu.checkpoints.hf.stacked_experts import stack
from keifu.checkpoints.hf.weight_names import Link, links
from keifu.checkpoints.hf.write import published_tensors
from keifu.checkpoints.plan import check_tokenizer, permute_rotary
from keifu.errors import unknown
from keifu.files import remove_abandoned, replacing

# llama.cpp's number for the type of most matrices of a file
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}
PACKED = ("Q4_0", "Q4_1", "Q8_0")
BLOCK = 32  # numbers per block of a packed format
UNUSED = 5  # the type of a token that never occurs
EMBEDDINGS = re.compile(r"(token_embd|output)\.weight")  # 4 bits would change too many predictions
ALWAYS_EXACT = re.compile(r"position_embd|.*\.(ffn_gate_inp|shortconv\.conv|ssm_conv1d)\.|.*_exps\.bias")
EXPERT = re.compile(r"(.*_exps)\.\d+(\.weight|\.bias)")


def save_gguf(model: nn.Module, tokenizer: Any, path: Path, dtype: str | None = None) -> None:
    """Write a model and its tokenizer as one GGUF file.

    dtype: f32, f16, bf16, q8_0, q4_0 or q4_1 for the matrices; None: the model's dtype. Vectors, positions and routers
    stay float32, as llama.cpp requires, and so do matrices whose rows are not a multiple of 32, with the packed formats
    (q). With 4 bits, the embedding and the output layer have q8_0.
    """
    config: Any = model.config
    name, architecture = architecture_for(config)
    settings, extra = write_config(name, architecture, config)
    if (length := settings[f"{name}.context_length"]) < config.context_length:
        print(
            f"llama.cpp ignores this model's sliding window of {length:,} tokens, so the file's context length is "
            f"{length:,} and not {config.context_length:,}: within it the results agree.",
            file=sys.stderr,
        )
    if settings.get(f"{name}.rope.scaling.type") == "yarn" and not architecture.truncate:
        print(
            "llama.cpp rounds the bounds of this model's yarn scaling, so its logits differ slightly from keifu's.",
            file=sys.stderr,
        )
    arrangements = architecture.arrangements(vars(config))
    tensor_links = permute_rotary(links(model, architecture.names, arrangements), rotary_head_dim(architecture, config))
    format = _format(dtype, next(model.parameters()).dtype)
    fields = {
        "general.type": "model",
        "general.name": path.stem,
        "general.file_type": FILE_TYPES[format],
        "general.quantization_version": 2,
        **settings,
        **_vocabulary(tokenizer, config.vocab_size),
    }
    shapes = _stacked_shapes(tensor_links) | {name: tuple(tensor.shape) for name, tensor in extra.items()}
    tensors = chain(stack(published_tensors(model, tensor_links), stack_of, lambda _, stacked: stacked), extra.items())
    remove_abandoned(path.parent)
    with replacing(path) as temporary:
        try:
            _write(temporary, name, fields, shapes, tensors, format)
        except OSError as error:
            if error.errno is None:  # numpy raises it if the disk took only part of an array
                raise OSError(errno.ENOSPC, str(error), str(path)) from error
            raise


def stack_of(name: str) -> str:
    """Return the name of the tensor that stacks an expert's matrix with others; return other names unchanged."""
    return EXPERT.sub(r"\1\2", name)


def _stacked_shapes(tensor_links: Iterable[Link]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors in their order, with the experts of a layer stacked."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in (pair for link in tensor_links for pair in zip(link.theirs, link.stored_shapes(), strict=True)):
        stack = stack_of(name)
        count = shapes[stack][0] if stack in shapes else 0
        shapes[stack] = shape if stack == name else (count + 1, *shape)
    return shapes


def _format(dtype: str | None, default: torch.dtype) -> str:
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    format = names.get(default, "F32") if dtype is None else dtype.upper()
    if format not in FILE_TYPES:
        raise unknown("GGUF number format to write called", str(dtype), [name.lower() for name in FILE_TYPES])
    return format


def _vocabulary(tokenizer: Any, size: int) -> dict[str, Any]:
    """Return the tokenizer's fields, padded with unused tokens to the size of the embedding, as llama.cpp requires."""
    if tokenizer is None:
        return {"tokenizer.ggml.model": "none"}
    from keifu.data.tokenizers.gguf import to_gguf_fields

    check_tokenizer(tokenizer, size)
    fields = dict(to_gguf_fields(tokenizer))
    unused = range(len(fields["tokenizer.ggml.tokens"]), size)
    filling = {"tokens": [f"[unused {n}]" for n in unused], "token_type": [UNUSED] * len(unused)}
    filling |= {"scores": [-1e9] * len(unused)} if "tokenizer.ggml.scores" in fields else {}
    for key, padding in filling.items():
        fields[f"tokenizer.ggml.{key}"] = [*fields[f"tokenizer.ggml.{key}"], *padding]
    return fields


def _write(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    format: str,
) -> None:
    """Write the header, then one tensor after the other, so that no second copy of the model is in memory."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(None, architecture)
    adders = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    for key, value in fields.items():
        adders[type(value)](key, value)
    for name, shape in shapes.items():
        stored = GGMLQuantizationType[tensor_format(name, shape, format)]
        block, size = GGML_QUANT_SIZES[stored]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * size, stored)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors:
        writer.write_tensor_data(encode_tensor(tensor, tensor_format(name, tuple(tensor.shape), format)))
    writer.close()


def tensor_format(name: str, shape: tuple[int, ...], format: str) -> str:
    """Return the number type of one tensor in a file whose matrices have the type `format`."""
    if len(shape) == 1 or ALWAYS_EXACT.match(name):
        return "F32"
    if format in PACKED and shape[-1] % BLOCK:
        return "F32"
    return "Q8_0" if format in PACKED and EMBEDDINGS.fullmatch(name) else format


def encode_tensor(tensor: Tensor, format: str) -> np.ndarray:
    """Return the numbers in the file's form: float32, float16, or bytes."""
    if format in ("F32", "F16"):
        return tensor.to({"F32": torch.float32, "F16": torch.float16}[format]).numpy()
    if format == "BF16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    from gguf import GGMLQuantizationType, quantize

    return quantize(tensor.float().numpy(), GGMLQuantizationType[format])
