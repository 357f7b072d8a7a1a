"""CLIP: transformers' features and logits from transformers' files, open_clip's from open_clip's, and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from keifu import checkpoints
from keifu.checkpoints.registry import describe, read_config
from keifu.errors import UserError
from keifu.models.clip import clip, image as clip_image, text as clip_text

TEXT = {
    "vocab_size": 97, "hidden_size": 30, "intermediate_size": 42, "num_hidden_layers": 3, "num_attention_heads": 5,
    "max_position_embeddings": 13, "eos_token_id": 96, "bos_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 34, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 23,
    "patch_size": 5,
}  # fmt: skip
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as-published": ({"eos_token_id": 2}, {}),
    "newer-end": ({}, {}),
    "exact-gelu": ({"hidden_act": "gelu"}, {"hidden_act": "gelu"}),
    "two-activations": ({"hidden_act": "gelu_new"}, {"hidden_act": "relu"}),
    "wide-epsilon": ({"layer_norm_eps": 0.1}, {"layer_norm_eps": 0.3, "image_size": 20}),
    "grey": ({"eos_token_id": 50}, {"num_channels": 1, "patch_size": 23}),
}


def shaken(model: Any) -> Any:
    """Return the model with every weight random, biases, norms and statistics too."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor += torch.randn_like(tensor) * (0.1 if tensor.ndim < 2 else 0.15)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.1)
    return model.eval()


def made(case: str) -> Any:
    text, vision = CASES[case]
    config = transformers.CLIPConfig(text_config=TEXT | text, vision_config=VISION | vision, projection_dim=17)
    return shaken(transformers.CLIPModel._from_config(config, attn_implementation="eager"))


def captions(end: int = 96, rows: int = 4, length: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    """Return captions of unequal length that end with `end`, padded with it, and their mask."""
    tokens, lengths = torch.randint(3, end, (rows, length)), torch.tensor([length, 7, 2, 5])[:rows]
    real = torch.arange(length) < lengths[:, None]
    return tokens.where(torch.arange(length) < lengths[:, None] - 1, torch.tensor(end)), real


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= 1e-5 * theirs.abs().max())


def same_files(ours: Path, theirs: Path, name: str = "model.safetensors") -> bool:
    """Return whether both hold the same tensors, bit for bit."""
    saved, original = load_file(ours / name), load_file(theirs / name)
    return saved.keys() == original.keys() and all(torch.equal(saved[n], original[n]) for n in original)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_clip_both_ways(case, tmp_path) -> None:
    reference = made(case)
    reference.save_pretrained(tmp_path / "theirs")
    model = checkpoints.load_model(tmp_path / "theirs")
    assert isinstance(model, clip.Clip)
    vision = VISION | CASES[case][1]
    size, end = vision["image_size"], (TEXT | CASES[case][0])["eos_token_id"]
    pixels = torch.randn(3, vision.get("num_channels", 3), size, size)
    tokens, real = captions(end if end > 2 else 96)
    for mask in (None, real):
        given = {} if mask is None else {"attention_mask": mask.long()}
        expected = reference(input_ids=tokens, pixel_values=pixels, **given)
        assert close(model(pixels, tokens, mask), expected.logits_per_image)
        assert close(model.encode_text(tokens, mask), reference.get_text_features(tokens, **given).pooler_output)
        hidden = model.text.encode(tokens, mask)
        assert close(hidden[real], expected.text_model_output.last_hidden_state[real])
    assert close(model.encode_image(pixels), reference.get_image_features(pixels).pooler_output)
    assert close(model.image.encode(pixels), expected.vision_model_output.last_hidden_state)

    checkpoints.save(model, None, tmp_path / "ours")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    again = transformers.AutoModel.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert isinstance(again, transformers.CLIPModel)
    assert torch.equal(again(tokens, pixels).logits_per_text, reference(tokens, pixels).logits_per_text)
    assert checkpoints.load_model(tmp_path / "ours").config == model.config


@torch.no_grad()
def test_a_mask_of_any_shape(tmp_path) -> None:
    """Padding on the left, and a hole: transformers hides those tokens from all later ones."""
    reference = made("newer-end")
    reference.save_pretrained(tmp_path)
    model = checkpoints.load_model(tmp_path)
    tokens = torch.cat([torch.randint(1, 96, (3, 10)), torch.full((3, 1), 96)], 1)
    real = torch.ones(3, 11, dtype=torch.bool)
    real[0, :4], real[1, 5:7] = False, False
    expected = reference.get_text_features(tokens, attention_mask=real.long()).pooler_output
    assert close(model.encode_text(tokens, real), expected)
    assert not close(model.encode_text(tokens), expected)


TOWERS = {
    "CLIPTextModel": (transformers.CLIPTextConfig, TEXT),
    "CLIPTextModelWithProjection": (transformers.CLIPTextConfig, TEXT | {"projection_dim": 19, "eos_token_id": 2}),
    "CLIPVisionModel": (transformers.CLIPVisionConfig, VISION),
    "CLIPVisionModelWithProjection": (transformers.CLIPVisionConfig, VISION | {"projection_dim": 19}),
}


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_tower_alone_both_ways(name, tmp_path) -> None:
    kind, sizes = TOWERS[name]
    reference = shaken(getattr(transformers, name)._from_config(kind(**sizes), attn_implementation="eager"))
    reference.save_pretrained(tmp_path / "theirs")
    tower = checkpoints.load_model(tmp_path / "theirs")
    given = captions()[0] if "Text" in name else torch.randn(3, 3, 23, 23)
    theirs = reference(given)
    assert close(tower.encode(given), theirs.last_hidden_state)
    assert close(tower(given), theirs.get("text_embeds", theirs.get("image_embeds", theirs.get("pooler_output"))))
    checkpoints.save(tower, None, tmp_path / "ours")
    assert same_files(tmp_path / "ours", tmp_path / "theirs")
    again = getattr(transformers, name).from_pretrained(tmp_path / "ours", attn_implementation="eager")
    assert torch.equal(again(given)[0], theirs[0])


@torch.no_grad()
def test_stable_diffusion_s_text_encoder_has_a_prefix(tmp_path) -> None:
    """Files of transformers 4 have text_model. before every name, and positions that are no weights."""
    config = transformers.CLIPTextConfig(**TEXT | {"eos_token_id": 2})
    reference = shaken(transformers.CLIPTextModel._from_config(config, attn_implementation="eager"))
    reference.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    named = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(named | {"text_model.embeddings.position_ids": torch.arange(13)[None]}, file)
    tower, tokens = checkpoints.load_model(tmp_path), captions()[0]
    assert close(tower.encode(tokens), reference(tokens).last_hidden_state)


@pytest.fixture(scope="module")
def open_clip() -> Any:
    return pytest.importorskip("open_clip")


OPEN_TEXT = {"context_length": 13, "vocab_size": 97, "width": 24, "heads": 3, "layers": 2}
OPEN_VIT = {"image_size": 23, "layers": 2, "width": 32, "head_width": 8, "patch_size": 5}
OPEN_RN = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
OPEN_CASES: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": OPEN_VIT, "text_cfg": OPEN_TEXT},
    "vit-quick": {"vision_cfg": OPEN_VIT, "text_cfg": OPEN_TEXT, "quick_gelu": True},
    "vit-other-sizes": {
        "vision_cfg": OPEN_VIT | {"mlp_ratio": 2.7, "norm_kwargs": {"eps": 0.1}, "act_kwargs": {"approximate": "tanh"}},
        "text_cfg": OPEN_TEXT | {"mlp_ratio": 3.1, "pool_type": "eos", "eos_id": 70},
    },
    "resnet": {"vision_cfg": OPEN_RN, "text_cfg": OPEN_TEXT},
    "resnet-quick-narrow-heads": {
        "vision_cfg": OPEN_RN | {"image_size": 70, "head_width": 64}, "text_cfg": OPEN_TEXT, "quick_gelu": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", OPEN_CASES)
@torch.no_grad()
def test_open_clip_both_ways(case, open_clip, tmp_path) -> None:
    sizes = OPEN_CASES[case]
    reference = shaken(open_clip.CLIP(embed_dim=17, **sizes))
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    pictures = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
    cfg = {"model_cfg": {"embed_dim": 17, **sizes}, "preprocess_cfg": pictures}
    (theirs / "open_clip_config.json").write_text(json.dumps(cfg))
    save_file(reference.state_dict(), theirs / "open_clip_model.safetensors")
    model = checkpoints.load_model(theirs)
    size = sizes["vision_cfg"]["image_size"]
    pixels, tokens = torch.randn(3, 3, size, size), captions(70)[0]
    assert close(model.encode_image(pixels), reference.encode_image(pixels))
    assert close(model.encode_text(tokens), reference.encode_text(tokens))
    assert close(model(pixels, tokens), reference.get_logits(pixels, tokens)[0])
    assert model.config.pixels == clip.Pixels(size, size, "bilinear", True, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))

    family, written = describe(model.config)
    if family.model_type == "open_clip":  # a vision transformer is written for transformers
        checkpoints.save(model, None, ours)
        assert same_files(ours, theirs, "open_clip_model.safetensors")
        again = open_clip.create_model(f"local-dir:{ours}").eval()
        assert torch.equal(again.get_logits(pixels, tokens)[0], reference.get_logits(pixels, tokens)[0])
        assert checkpoints.load_model(ours).config == model.config
    else:
        checkpoints.save(model, None, ours)
        transformer = transformers.CLIPModel.from_pretrained(ours)
        assert close(transformer(tokens, pixels).logits_per_image, reference.get_logits(pixels, tokens)[0])
        checkpoints.save(model, None, ours, kind="open_clip")
        assert not (ours / "config.json").exists()
        assert same_files(ours, theirs, "open_clip_model.safetensors")
        again = open_clip.create_model(f"local-dir:{ours}").eval()
        assert torch.equal(again.get_logits(pixels, tokens)[0], reference.get_logits(pixels, tokens)[0])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"vision_cfg": OPEN_VIT | {"ls_init_value": 0.1}, "text_cfg": OPEN_TEXT}, "ls_init_value to 0.1"),
    ({"vision_cfg": OPEN_VIT | {"timm_model_name": "x"}, "text_cfg": OPEN_TEXT}, "timm_model_name to 'x'"),
    ({"vision_cfg": OPEN_VIT, "text_cfg": OPEN_TEXT | {"no_causal_mask": True}}, "no_causal_mask to True"),
    ({"vision_cfg": OPEN_VIT, "text_cfg": OPEN_TEXT | {"pool_type": "last"}}, "pool_type is 'last'"),
    ({"vision_cfg": OPEN_VIT, "text_cfg": OPEN_TEXT, "init_logit_bias": -10}, "init_logit_bias to -10"),
    ({"vision_cfg": OPEN_VIT | {"image_size": [32, 48]}, "text_cfg": OPEN_TEXT}, "squares only"),
]


@pytest.mark.parametrize(("sizes", "sentence"), REFUSED)
def test_what_open_clip_has_beyond_is_refused_by_name(sizes, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        read_config({"model_type": "open_clip", "model_cfg": {"embed_dim": 17, **sizes}}, "open_clip_config.json")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"architectures": ["CLIPForImageClassification"]}, "CLIPForImageClassification' is not CLIPModel"),
        ({"text_config": {"eos_token_id": [1, 2]}}, "eos_token_id is \\[1, 2\\]"),
        ({"vision_config": {"hidden_act": "swoosh"}}, "activation 'swoosh' is not supported"),
        ({"vision_config": {"num_hidden_layers": 0}}, "gives 0 for n_layers, which must be at least 1"),
        ({"preprocessor_config": {"do_resize": False}}, "sets do_resize to False"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        read_config({"model_type": "clip", **changes}, "config.json")


def test_published_configs_are_the_sizes_of_those_names() -> None:
    """What transformers takes by default is ViT-B/32; old files say it twice, and the _dict counts."""
    default = clip.SIZES["clip-vit-b32"]
    newer = replace(default, text=replace(default.text, end_id=49_407))
    assert read_config({"model_type": "clip"}, "config.json")[1] == newer
    large = {
        "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 768,
        "text_config": {"hidden_size": 1}, "vision_config": {"hidden_size": 1},
        "text_config_dict": {
            "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "eos_token_id": 2,
        },
        "vision_config_dict": {
            "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
            "patch_size": 14,
        },
    }  # fmt: skip
    assert read_config(large, "config.json")[1] == clip.SIZES["clip-vit-l14"]
    resnet = {
        "embed_dim": 640, "quick_gelu": True,
        "vision_cfg": {"image_size": 288, "layers": [4, 6, 10, 6], "width": 80, "patch_size": None},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 640, "heads": 10, "layers": 12},
    }  # fmt: skip
    assert read_config({"model_type": "open_clip", "model_cfg": resnet}, "x")[1] == clip.SIZES["clip-rn50x4"]
    for name, size in clip.SIZES.items():
        assert describe(size)[0].model_type == ("open_clip" if "rn" in name else "clip")
    assert describe(clip_text.SIZES["stable-diffusion-text"])[0].model_type == "clip_text_model"


def test_the_format_that_is_asked_for_must_have_the_model(tmp_path) -> None:
    tower = clip_text.build(clip_text.Config(11, 8, 12, 24, 1, 3))
    with pytest.raises(UserError, match=r"open_clip has no clip\.text"):
        checkpoints.save(tower, None, tmp_path, kind="open_clip")


def test_what_no_format_has_is_saved_as_keifu_s_own(tmp_path) -> None:
    text = clip_text.Config(11, 8, 12, 24, 1, 3, activation="relu", attention_dropout=0.1, embedding_dim=6)
    image = clip_image.ResNetConfig(32, 4, (1, 1, 1, 1), 2, 6)
    model = clip.build(clip.Config(text, image, clip.Pixels(32, 32)))
    checkpoints.save(model, None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "keifu_clip"
    again = checkpoints.load_model(tmp_path)
    assert again.config == model.config
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_pictures_and_captions_of_the_wrong_size_are_errors() -> None:
    text, image = clip_text.Config(11, 8, 12, 24, 1, 3), clip_image.Config(30, 7, 3, 12, 24, 1, 3)
    model = clip.build(clip.Config(text, image))
    with pytest.raises(ValueError, match="40 x 30 pixels: this network takes 30 x 30"):
        model.encode_image(torch.zeros(1, 3, 30, 40))
    with pytest.raises(ValueError, match="9 tokens does not fit the 8 positions"):
        model.encode_text(torch.zeros(1, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="one space"):
        clip.build(clip.Config(replace(text, embedding_dim=3), image))
