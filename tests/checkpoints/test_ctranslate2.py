"""CTranslate2's Whisper files give the logits of the weights that were written; torn and other files are refused."""

import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from keifu import checkpoints
from keifu.checkpoints.ctranslate2 import PARTS
from keifu.errors import UserError
from keifu.inference.speech.rules import SPECIAL
from keifu.models.speech import whisper
from keifu.recipes.speech.whisper import learn_tokenizer

CONFIG = whisper.Config(
    context_length=20, audio_length=12, n_mels=5, dim=16, hidden_dim=24, n_layers=2, n_decoder_layers=1, n_heads=4,
    vocab_size=270, start_id=50_257, end_id=50_256, pad_id=50_256,
)  # fmt: skip


def text(value: str) -> bytes:
    data = value.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def variable(name: str, value: np.ndarray) -> bytes:
    kind = {"float32": 0, "int8": 1, "int16": 2, "float16": 4}[str(value.dtype)]
    shape = struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
    return text(name) + shape + struct.pack("<BI", kind, value.nbytes) + value.tobytes()


def variables(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Return transformers' tensors as CTranslate2 has them."""
    ours, found = {k: v.half().numpy() for k, v in tensors.items()}, {}
    for side, layers in (("encoder", 2), ("decoder", 1)):
        found[f"{side}/num_heads"] = np.array(4, np.int16)
        found[f"{side}/position_encodings/encodings"] = ours[f"model.{side}.embed_positions.weight"]
        places = {f"{side}/layer_norm": [f"model.{side}.layer_norm"]}
        for n in range(layers):
            for theirs, names in PARTS.items():
                places[f"{side}/layer_{n}/{theirs}"] = [f"model.{side}.layers.{n}.{name}" for name in names]
        for theirs, names in places.items():
            leaves = ("gamma", "beta") if "norm" in theirs else ("weight", "bias")
            for leaf, name in zip(leaves, ("weight", "bias"), strict=True):
                if f"{names[0]}.weight" in ours:
                    parts = [ours.get(f"{each}.{name}", np.zeros(16, np.float16)) for each in names]
                    found[f"{theirs}/{leaf}"] = np.concatenate(parts)
    for n in (1, 2):
        for leaf in ("weight", "bias"):
            found[f"encoder/conv{n}/{leaf}"] = ours[f"model.encoder.conv{n}.{leaf}"]
    return found | {"decoder/embeddings/weight": ours["model.decoder.embed_tokens.weight"]}


def file_of(found: dict[str, np.ndarray], version: int = 6, spec: str = "WhisperSpec") -> bytes:
    head = struct.pack("<I", version) + text(spec) + struct.pack("<II", 3, len(found))
    return head + b"".join(variable(*each) for each in sorted(found.items())) + struct.pack("<I", 0)


@pytest.fixture
def weights(tmp_path):
    """Return the variables of a Whisper, and the model that has these weights."""
    torch.manual_seed(0)
    model = whisper.build(CONFIG)
    for parameter in model.parameters():
        parameter.data = (parameter.data + torch.randn_like(parameter) * 0.1).half().float()
    model.source_positions = model.source_positions.half().float()
    checkpoints.save(model.eval(), None, tmp_path / "hf")
    return variables(load_file(tmp_path / "hf/model.safetensors")), model


@torch.no_grad()
def test_logits_are_those_of_the_weights(weights, tmp_path) -> None:
    found, model = weights
    words = learn_tokenizer(["one two three"], 265, SPECIAL)
    (tmp_path / "tokenizer.json").write_text(words.backend.to_str())
    (tmp_path / "config.json").write_text(json.dumps({"suppress_ids": [1, 2], "suppress_ids_begin": [3]}))
    (tmp_path / "model.bin").write_bytes(file_of(found))
    loaded, tokenizer = checkpoints.load(tmp_path)
    sound, target = torch.randn(2, 5, 24), torch.arange(14).view(2, 7)
    assert torch.equal(loaded(sound, target), model(sound, target))
    assert tokenizer.generation_config["suppress_tokens"] == [1, 2]
    assert checkpoints.inspect(tmp_path / "model.bin").format == "CTranslate2"
    checkpoints.save(loaded, tokenizer, tmp_path / "saved")
    assert torch.equal(checkpoints.load_model(tmp_path / "saved")(sound, target), model(sound, target))


def test_weights_in_shards_come_before_a_file_of_ctranslate2(weights, tmp_path) -> None:
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/model-00001-of-00001.safetensors")
    names = {name: "model-00001-of-00001.safetensors" for name in load_file(*(tmp_path / "hf").glob("*.safetensors"))}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "hf/model.bin").write_bytes(file_of(weights[0]))
    assert checkpoints.inspect(tmp_path / "hf").format == "Hugging Face"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: file_of(found)[:900], "is truncated or corrupt, near"),
        (lambda found: file_of(found, version=5), "no Whisper in CTranslate2's format 6"),
        (lambda found: file_of(found, spec="TransformerSpec"), "no Whisper in CTranslate2's format 6"),
        (lambda found: b"\x80\x02", "truncated or corrupt"),
        (lambda found: file_of(found | {"encoder/conv1/bias": np.zeros(16, np.int8)}), "conv1.bias as int8"),
        (lambda found: file_of({k: v for k, v in found.items() if "num_heads" not in k}), "lacks a variable"),
        (lambda found: file_of({k: v for k, v in found.items() if "conv2/bias" not in k}), "missing.*conv2.bias"),
        (lambda found: file_of(found | {"encoder/other/weight": np.zeros(3, np.float16)}), "not part of the model"),
        (lambda found: file_of(found | {"encoder/conv1/bias": np.zeros(3, np.float16)}), "of another shape"),
    ],
)  # fmt: skip
def test_torn_and_other_files_are_one_sentence(weights, change, message, tmp_path) -> None:
    (tmp_path / "model.bin").write_bytes(change(weights[0]))
    with pytest.raises(UserError, match=message) as refusal:
        checkpoints.load_model(tmp_path / "model.bin")
    assert "\n" not in str(refusal.value)


def test_the_packaged_model_hears(tmp_path) -> None:
    from keifu.data.catalogue.catalogue import is_cached

    if not is_cached("whisper-tiny-en"):
        pytest.skip("whisper-tiny-en was not fetched here")
    model, tokenizer = checkpoints.load("whisper-tiny-en")
    assert model.config == replace(whisper.SIZES["whisper-tiny.en"], n_decoder_layers=4)
    assert tokenizer.vocab_size == 50_363 and tokenizer.generation_config["no_timestamps_token_id"] == 50_362
