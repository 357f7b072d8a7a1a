"""Whisper models in CTranslate2's file format, in which faster-whisper publishes them.

A file has the name, shape, type and bytes of each variable. Queries, keys and values are joined, and so are their
biases; the keys' biases are zeros. All integers are little-endian.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from keifu.checkpoints.plan import Source, StoredTensor
from keifu.checkpoints.registry import describe
from keifu.data.tokenizers.load import load_tokenizer
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.models.speech import whisper
from keifu.untrusted import plain_file, read_json_object

VERSION, SPEC = 6, "WhisperSpec"
TYPES = ("float32", "int8", "int16", "int32", "float16")  # indexed by the type's number in a file
READ = {"float32": torch.float32, "float16": torch.float16}
MULTILINGUAL = 51_865  # size of the smallest vocabulary with several languages
PARTS = {  # CTranslate2's name, inside or outside of a layer → Hugging Face's names
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "ffn/layer_norm": ("final_layer_norm",),
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "position_encodings": ("embed_positions",),
    "embeddings": ("embed_tokens",),
}
SIDES = "encoder", "decoder"
LEAVES = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def open_ctranslate2(path: Path) -> Source:
    """Open the Whisper model in a file, with the tokenizer.json and config.json of its folder. Raises UserError for
    other models."""
    arrays = _read(path)
    weights = {ours: part for name, array in arrays.items() if array.ndim for ours, part in _parts(name, array)}
    if other := next((f"{n} as {part.dtype}" for n, part in weights.items() if str(part.dtype) not in READ), None):
        convert = "convert the model to float16 with ct2-transformers-converter"
        raise UserError(f"{path} has {other}, and keifu reads float32 and float16: {convert}.")
    config = _config(arrays, path)
    family, _ = describe(config)
    stored = {name: StoredTensor(part.shape, str(part.dtype), READ[str(part.dtype)]) for name, part in weights.items()}
    tokenizer = partial(_tokenizer, path.parent, config.vocab_size >= MULTILINGUAL)
    return Source(path, "CTranslate2", family, config, stored, lambda n: torch.from_numpy(weights[n]), tokenizer,
                  family.names)  # fmt: skip


def _read(path: Path) -> Mapping[str, np.ndarray]:
    """Return the arrays of a file, memory-mapped. Raises UserError for a truncated file, or one of another model."""
    arrays, name = dict[str, np.ndarray](), ""
    with plain_file(path).open("rb") as file:
        try:
            if (_integer(file, 4), _text(file)) != (VERSION, SPEC):
                raise UserError(f"{path} is no Whisper in CTranslate2's format {VERSION}, and no other is read.")
            _integer(file, 4)  # the revision of the specification
            for _ in range(_integer(file, 4)):
                name, rank = _text(file), _integer(file, 1)
                shape = tuple(_integer(file, 4) for _ in range(rank))
                dtype, length, begin = TYPES[_integer(file, 1)], _integer(file, 4), file.tell()
                arrays[name] = np.memmap(file, dtype, "c", begin, shape)
                if arrays[name].nbytes != length:
                    raise ValueError
                file.seek(begin + length)
        except (ValueError, IndexError, OverflowError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is truncated or corrupt, near the variable {name[:99]!r}.") from error
    return arrays


def _integer(file: BinaryIO, length: int) -> int:
    if len(data := file.read(length)) < length:
        raise ValueError
    return int.from_bytes(data, "little")


def _text(file: BinaryIO) -> str:
    return file.read(_integer(file, 2)).removesuffix(b"\0").decode()


def _parts(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a variable with Hugging Face's names, without the keys' biases, which are zeros."""
    side, *middle, leaf = name.split("/")
    layer = [f"layers.{middle.pop(0)[6:]}"] if middle and middle[0].startswith("layer_") and len(middle) > 1 else []
    parts, leaf = PARTS.get("/".join(middle), ("/".join(middle),)), LEAVES.get(leaf, leaf)
    for ours, part in zip(parts, np.split(array, len(parts)), strict=True):
        if middle and (leaf, ours[-6:]) != ("bias", "k_proj"):
            yield ".".join(["model", side, *layer, ours, leaf]), part


def _config(arrays: Mapping[str, np.ndarray], path: Path) -> whisper.Config:
    """Return the Config inferred from the arrays' shapes."""
    try:
        vocab_size, dim = arrays["decoder/embeddings/weight"].shape
        context, heard = (len(arrays[f"{side}/position_encodings/encodings"]) for side in ("decoder", "encoder"))
        hidden, n_mels = len(arrays["encoder/layer_0/ffn/linear_0/bias"]), arrays["encoder/conv1/weight"].shape[1]
        layers, depth = (
            sum(f"{side}/layer_{n}/ffn/linear_0/bias" in arrays for n in range(len(arrays))) for side in SIDES
        )  # fmt: skip
        end = 50_256 + (vocab_size >= MULTILINGUAL)
        heads = int(arrays["encoder/num_heads"])
        return whisper.Config(vocab_size, context, heard, n_mels, dim, hidden, layers, depth, heads,
                              start_id=end + 1, end_id=end, pad_id=end)  # fmt: skip
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"{path} lacks a variable of Whisper's: {error}.") from error


def _tokenizer(folder: Path, is_multilingual: bool) -> Tokenizer:
    """Return the tokenizer with the generation settings that transformers would read from generation_config.json.
    is_multilingual: whether it has several languages."""
    config, tokenizer = read_json_object(folder / "config.json"), load_tokenizer(folder / "tokenizer.json")
    settings: dict[str, Any] = {
        "is_multilingual": is_multilingual, "no_timestamps_token_id": tokenizer.token_id("<|notimestamps|>"),
        "suppress_tokens": config.get("suppress_ids"), "begin_suppress_tokens": config.get("suppress_ids_begin"),
        "max_initial_timestamp_index": 50,
    }  # fmt: skip
    if is_multilingual:
        settings["lang_to_id"] = {tokenizer.backend.id_to_token(token): token for token in config.get("lang_ids", [])}
        settings["task_to_id"] = {task: tokenizer.token_id(f"<|{task}|>") for task in ("transcribe", "translate")}
    return tokenizer.replace(special=dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>"),
                         generation_config=settings)  # fmt: skip
