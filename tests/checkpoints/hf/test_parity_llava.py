"""LLaVA: transformers' logits from transformers' files, with CLIP's and SigLIP's towers, and back."""

import json
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from keifu import checkpoints
from keifu.checkpoints.registry import read_config
from keifu.data.images.preprocessing import Preprocessing
from keifu.errors import UserError
from keifu.models.multimodal import llava

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
IMAGE = 60


def clip(**changes: Any) -> Any:
    return transformers.CLIPVisionConfig(**{**VISION, "image_size": 26, "patch_size": 8} | changes)


def siglip(**changes: Any) -> Any:
    return transformers.SiglipVisionConfig(
        **{**VISION, "image_size": 24, "patch_size": 8, "vision_use_head": False} | changes
    )


CASES: dict[str, Any] = {  # tower, decoder, fields of LLaVA
    "clip": lambda: (clip(), transformers.LlamaConfig(**TEXT), {}),
    "clip-whole-last": lambda: (
        clip(hidden_act="gelu", num_channels=1), transformers.MistralConfig(**TEXT, sliding_window=11),
        {"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
    "clip-several-layers-no-bias": lambda: (
        clip(), transformers.Qwen2Config(**TEXT, tie_word_embeddings=True),
        {"vision_feature_layer": [-2, 1, 0], "multimodal_projector_bias": False, "projector_hidden_act": "relu",
         "tie_word_embeddings": True},
    ),
    "siglip": lambda: (siglip(), transformers.LlamaConfig(**TEXT), {"vision_feature_select_strategy": "full"}),
}  # fmt: skip


def made(case: str) -> Any:
    torch.manual_seed(0)
    vision, text, fields = CASES[case]()
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **fields}
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, **settings)
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1)
    return model.eval()


def prompt(count: int, *pictures: int) -> torch.Tensor:
    """Return rows of words and pictures of `count` tokens each."""
    rows = [torch.randint(0, 59, (9 + 4 * count,)) for _ in pictures]
    for row, number in zip(rows, pictures, strict=True):
        for picture in range(number):
            start = 3 + picture * (count + 1)
            row[start : start + count] = IMAGE
    return torch.stack(rows)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_llava_both_ways(case, check_saved, tmp_path) -> None:
    reference = made(case)
    reference.save_pretrained(tmp_path / "theirs")
    model = checkpoints.load_model(tmp_path / "theirs")
    assert isinstance(model, llava.Llava)
    image = model.config.image
    tokens = prompt(model.config.image_tokens, 2, 0, 3)
    pixels = torch.randn(5, image.channels, image.image_size, image.image_size)
    expected = reference(input_ids=tokens, pixel_values=pixels).logits
    assert expected.std() > 0.1
    assert close(model(tokens, pixels=pixels), expected)
    assert not close(model(tokens, pixels=pixels.flip(0)), expected)
    assert close(model(tokens[1:2]), reference(input_ids=tokens[1:2]).logits)
    state = model.new_state(1, tokens.shape[1])
    read = tokens.shape[1] - 3
    parts = [model(tokens[:1, :read], state, pixels=pixels[:2])]
    parts += [model(tokens[:1, i : i + 1], state) for i in range(read, read + 3)]
    assert close(torch.cat(parts, 1), expected[:1])
    check_saved(model, tokens, pixels, expected)


@torch.no_grad()
def test_files_of_transformers_4_have_another_prefix(tmp_path) -> None:
    reference = made("clip")
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    old = {n.replace("vision_tower.", "vision_tower.vision_model."): tensor for n, tensor in load_file(file).items()}
    save_file(old | {"vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None]}, file)
    tokens, pixels = prompt(9, 1), torch.randn(1, 3, 26, 26)
    expected = reference(input_ids=tokens, pixel_values=pixels).logits
    assert close(checkpoints.load_model(tmp_path)(tokens, pixels=pixels), expected)


@pytest.mark.parametrize("size", [(26, 26), (61, 40), (17, 90), (200, 27)])
@torch.no_grad()
def test_pictures_of_odd_sizes(size, tmp_path) -> None:
    """The processor of the checkpoint gives transformers' pixels, and its own file is written back."""
    theirs = transformers.CLIPImageProcessorPil(size={"shortest_edge": 26}, crop_size={"height": 26, "width": 26})
    made("clip").save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    model: Any = checkpoints.load_model(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = theirs(picture, return_tensors="pt").pixel_values
    assert torch.equal(Preprocessing(**vars(model.config.pixels))([picture]), expected)
    checkpoints.save(model, None, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/processor_config.json").read_text())["num_additional_image_tokens"] == 1
    assert checkpoints.load_model(tmp_path / "ours").config == model.config


def test_a_wrong_number_of_pictures_is_refused(tmp_path) -> None:
    made("clip").save_pretrained(tmp_path)
    model = checkpoints.load_model(tmp_path)
    with pytest.raises(UserError, match="2 images: 18 tokens; the prompt: 9"):
        model(prompt(9, 1), pixels=torch.randn(2, 3, 26, 26))


LLAMA, CLIP = {"model_type": "llama"}, {"model_type": "clip_vision_model"}
REFUSED = {
    "is of model_type 'mamba'": {"text_config": {"model_type": "mamba"}, "vision_config": CLIP},
    "is of model_type 'vit'": {"text_config": LLAMA, "vision_config": {"model_type": "vit"}},
    "vision_use_head": {"text_config": LLAMA, "vision_config": {"model_type": "siglip_vision_model"}},
    "do_pad": {"text_config": LLAMA, "vision_config": CLIP, "preprocessor_config": {"do_pad": True}},
    "'mean', and what is implemented": {
        "text_config": LLAMA, "vision_config": CLIP, "vision_feature_select_strategy": "mean",
    },
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_not_implemented_is_refused(sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        read_config({"model_type": "llava", **REFUSED[sentence]}, "config.json")


def test_a_published_config_is_read() -> None:
    """The config.json of llava-hf/llava-1.5-7b-hf has few fields: the others are transformers' defaults."""
    vision = {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32_000,
    }  # fmt: skip
    text = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-05, "vocab_size": 32_064}
    json = {
        "model_type": "llava", "image_token_index": 32_000, "text_config": text, "vision_config": vision,
        "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    config = read_config(json, "config.json")[1]
    assert config == llava.SIZES["llava-1.5-7b"]
    assert config.image_tokens == 576
