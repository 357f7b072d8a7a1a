"""SmolVLM: transformers' logits, tiles and prompts from transformers' files of Idefics3 and SmolVLM, and back."""

import json
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image

from keifu import checkpoints
from keifu.checkpoints.registry import describe, read_config
from keifu.data.images.preprocessing import TiledPreprocessing
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.chat.prompts import ImagePrompt, InsertedImages, render
from keifu.models.hf.image_processor import Tiles
from keifu.models.multimodal import smolvlm

VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 50, "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 273_768.0,
}  # fmt: skip
IMAGE = 60
KINDS: dict[str, Any] = {
    "idefics3": (transformers.Idefics3Config, transformers.Idefics3VisionConfig,
                 transformers.Idefics3ForConditionalGeneration),
    "smolvlm": (transformers.SmolVLMConfig, transformers.SmolVLMVisionConfig,
                transformers.SmolVLMForConditionalGeneration),
}  # fmt: skip
CASES: dict[str, Any] = {  # model_type, decoder, changes to the encoder, fields
    "idefics3": ("idefics3", transformers.LlamaConfig(**TEXT), {}, {"scale_factor": 3}),
    "smolvlm-tied": ("smolvlm", transformers.LlamaConfig(**TEXT), {}, {"scale_factor": 2, "tie_word_embeddings": True}),
    "idefics3-qwen2-one-channel": (
        "idefics3", transformers.Qwen2Config(**TEXT), {"num_channels": 1, "image_size": 40, "hidden_act": "gelu"},
        {"scale_factor": 1},
    ),
}  # fmt: skip


def made(case: str) -> Any:
    torch.manual_seed(0)
    kind, text, changes, fields = CASES[case]
    config_class, vision_class, model_class = KINDS[kind]
    vision = vision_class(**{**VISION, **changes})
    config = config_class(vision_config=vision, text_config=text, image_token_id=IMAGE, pad_token_id=0, **fields)
    model = model_class._from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1)
    return model.eval()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_smolvlm_both_ways(case, check_saved, tmp_path) -> None:
    reference = made(case)
    reference.save_pretrained(tmp_path / "theirs")
    model: Any = checkpoints.load_model(tmp_path / "theirs")
    assert isinstance(model, smolvlm.SmolVLM)
    count, image = model.config.image_tokens, model.config.image
    tokens = torch.randint(0, 59, (2, 9 + 2 * count))
    tokens[:, 3 : 3 + count] = tokens[:, 5 + count : 5 + 2 * count] = IMAGE
    pixels = torch.randn(2, 2, image.channels, image.image_size, image.image_size)
    expected = reference(input_ids=tokens, pixel_values=pixels).logits
    assert expected.std() > 0.1
    ours = model(tokens, pixels=pixels.flatten(0, 1))
    assert close(ours, expected)
    assert not close(model(tokens, pixels=pixels.flatten(0, 1).flip(0)), expected)
    state, read = model.new_state(1, tokens.shape[1]), tokens.shape[1] - 3
    parts = [model(tokens[:1, :read], state, pixels=pixels[0])]
    parts += [model(tokens[:1, i : i + 1], state) for i in range(read, read + 3)]
    assert close(torch.cat(parts, 1), expected[:1])
    check_saved(model, tokens, pixels, expected)


SIZES = [(50, 50), (17, 90), (200, 27), (333, 301), (45, 45), (1, 60), (640, 480)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", [True, False])
@torch.no_grad()
def test_tiles_are_those_of_the_published_processor(size, split, tmp_path) -> None:
    settings = {"size": {"longest_edge": 123}, "max_image_size": {"longest_edge": 50}, "do_image_splitting": split}
    theirs: Any = transformers.Idefics3ImageProcessorPil(**settings)
    made("idefics3").save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    model: Any = checkpoints.load_model(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    expected = theirs(picture, return_row_col_info=True, return_tensors="pt")
    ready = TiledPreprocessing(**vars(model.config.pixels))
    assert torch.equal(ready.normalised(ready.tiles(picture)), expected["pixel_values"][0])
    assert ready.grid(picture) == (expected["rows"][0][0], expected["cols"][0][0])
    checkpoints.save(model, None, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/processor_config.json").read_text())["image_seq_len"] == 4
    again = transformers.Idefics3ImageProcessorPil.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(picture, return_tensors="pt").pixel_values, expected["pixel_values"])
    assert checkpoints.load_model(tmp_path / "ours").config == model.config


TEMPLATE = (  # of the form that the published models have
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"]
GRID = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]


def reader() -> Tokenizer:
    trained = train_tokenizer("bpe", ["What is it? \n\n"] * 9, 290, special_tokens=SPECIAL)
    backend = tokenizers.Tokenizer.from_str(trained.backend.to_str())
    backend.add_special_tokens([tokenizers.AddedToken(each, special=True, normalized=False) for each in GRID])
    return Tokenizer(backend, {"eos_token": "<end_of_utterance>"}, chat_template=TEMPLATE)


@pytest.mark.parametrize("size", [(50, 50), (200, 27), (333, 301)])
def test_prompts_are_those_of_the_published_processor(size, tmp_path) -> None:
    ours = reader()
    ours.save(tmp_path)
    backend = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    seen = transformers.Idefics3ImageProcessorPil(size={"longest_edge": 123}, max_image_size={"longest_edge": 50})
    theirs: Any = transformers.Idefics3Processor(seen, backend, image_seq_len=4, chat_template=TEMPLATE)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = theirs.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    expected = theirs(text=text, images=[picture])["input_ids"][0]
    config = smolvlm.Config(
        image=smolvlm.siglip.Config(50, 8), pixels=Tiles(123, 50), image_token=ours.token_id("<image>"), shuffle=3
    )
    found = render(ours, [{"role": "user", "content": "What is it?", "images": [picture]}], config)
    assert isinstance(found, ImagePrompt)
    assert InsertedImages(found, config).tokens == expected


LLAMA = {"model_type": "llama"}
REFUSED = {
    "is of model_type 'mamba'": {"text_config": {"model_type": "mamba"}, "vision_config": {}},
    "25 x 25 patches, whose positions": {
        "text_config": LLAMA, "vision_config": {"image_size": 400, "patch_size": 16},
    },
    "max_image_size {'longest_edge': 364}": {
        "text_config": LLAMA, "vision_config": {}, "preprocessor_config": {"max_image_size": {"longest_edge": 364}},
    },
    "has the size {'height': 5}": {
        "text_config": LLAMA, "vision_config": {},
        "preprocessor_config": {"max_image_size": {"longest_edge": 224}, "size": {"height": 5}},
    },
    "sets do_resize to False": {
        "text_config": LLAMA, "vision_config": {}, "preprocessor_config": {"do_resize": False},
    },
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_not_implemented_is_refused(sentence) -> None:
    with pytest.raises(UserError, match=sentence.replace("{", r"\{")):
        read_config({"model_type": "idefics3", **REFUSED[sentence]}, "config.json")


def test_patches_that_cannot_be_joined_are_refused() -> None:
    with pytest.raises(UserError, match="6 x 6 patches, and 4 x 4 cannot be joined"):
        smolvlm.build(smolvlm.Config(image=smolvlm.siglip.Config(50, 8)))


def test_a_published_config_is_read() -> None:
    """The config.json of HuggingFaceTB/SmolVLM-256M-Instruct leaves out what transformers has as a default."""
    text = {
        "model_type": "llama", "head_dim": 64, "hidden_size": 576, "intermediate_size": 1536,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5, "rope_theta": 100_000, "vocab_size": 49_280, "pixel_shuffle_factor": 4,
    }  # fmt: skip
    vision = {
        "hidden_size": 768, "image_size": 512, "max_image_size": {"longest_edge": 512}, "model_type": "idefics3",
        "num_attention_heads": 12, "patch_size": 16, "size": {"longest_edge": 2048}, "tie_word_embeddings": False,
    }  # fmt: skip
    json = {
        "model_type": "idefics3", "image_token_id": 49_190, "scale_factor": 4, "text_config": text,
        "vision_config": vision, "tie_word_embeddings": False, "vocab_size": 49_280,
    }  # fmt: skip
    config = read_config(json, "config.json")[1]
    expected = smolvlm.SIZES["smolvlm-256m"]
    assert config.image_tokens == 64
    assert describe(config)[1] == describe(expected)[1] | {"text_config": describe(config)[1]["text_config"]}
    assert (config.image, config.pixels) == (expected.image, expected.pixels)
