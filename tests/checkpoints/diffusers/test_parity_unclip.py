"""The parts of unCLIP give diffusers' numbers from diffusers' folders, and back: prior, decoder, what it is told, and
the network that enlarges."""

import json
from typing import Any

import pytest
import torch

from keifu import checkpoints
from keifu.errors import UserError
from keifu.models.unclip import decoder as unclip_decoder, prior as unclip_prior

diffusers = pytest.importorskip("diffusers")
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel  # noqa: E402

PRIOR = {
    "num_attention_heads": 3, "attention_head_dim": 7, "num_layers": 2, "embedding_dim": 13, "num_embeddings": 9,
}  # fmt: skip
PRIORS = {
    "karlo": {},
    "norms": {"norm_in_type": "layer", "embedding_proj_norm_type": "layer"},
    "without-a-query": {"added_emb_type": None, "additional_embeddings": 3},
    "other-sizes": {"embedding_proj_dim": 11, "clip_embed_dim": 5, "time_embed_dim": 10, "num_embeddings": 4},
    "one-layer": {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 6},
}
DECODER = {
    "sample_size": 8, "in_channels": 3, "out_channels": 6, "block_out_channels": (12, 20), "layers_per_block": 1,
    "norm_num_groups": 4, "attention_head_dim": 5, "cross_attention_dim": 11, "class_embed_type": "identity",
    "resnet_time_scale_shift": "scale_shift", "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}  # fmt: skip
DECODERS = {
    "karlo": {},
    "projected": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 7},
    "classes": {"class_embed_type": None, "num_class_embeds": 6, "resnet_time_scale_shift": "default"},
    "three-levels": {
        "block_out_channels": (6, 12, 18), "layers_per_block": 2, "norm_num_groups": 2, "attention_head_dim": 6,
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    },
    "no-middle": {"mid_block_type": None},
    "other-numbers": {
        "norm_eps": 1e-3, "freq_shift": 1, "flip_sin_to_cos": False, "time_embedding_dim": 30, "out_channels": 3,
        "in_channels": 5, "sample_size": (8, 16),
    },
}  # fmt: skip
UPSAMPLERS = {
    "karlo": {"layers_per_block": 1, "block_out_channels": (8, 12)},
    "deeper": {
        "layers_per_block": 2, "block_out_channels": (6, 9, 15), "norm_num_groups": 3,
        "resnet_time_scale_shift": "scale_shift",
    },
}  # fmt: skip


def shaken(make, *, seed: int = 1):
    """Return a model with every weight random, biases, norms and embeddings too."""
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    return model.eval()


def close(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((ours - expected).abs().max() <= 1e-5 * expected.abs().max())


def same_files(weights, ours, theirs) -> bool:
    saved, original = weights(ours), weights(theirs)
    assert saved.keys() == original.keys()
    return all(saved[n].dtype == original[n].dtype and torch.equal(saved[n], original[n]) for n in original)


def both_ways(reference, kind, weights, folder) -> Any:
    """Return our model of diffusers' folder, after it was saved, and diffusers has loaded that."""
    reference.save_pretrained(folder / "theirs")
    model = checkpoints.load_model(folder / "theirs")
    checkpoints.save(model, None, folder / "ours")
    assert same_files(weights, folder / "ours", folder / "theirs")
    again = kind.from_pretrained(folder / "ours")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), reference.parameters(), strict=True))
    told, own = (json.loads(json.dumps(dict(each.config), default=str)) for each in (again, reference))
    assert {name for name in own if name[0] != "_" and told[name] != own[name]} == set()
    assert checkpoints.load_model(folder / "ours").config == model.config
    return model


@pytest.mark.parametrize("case", PRIORS)
@torch.no_grad()
def test_prior_both_ways(case, weights, tmp_path) -> None:
    reference = shaken(lambda: diffusers.PriorTransformer(**PRIOR | PRIORS[case]))
    model = both_ways(reference, diffusers.PriorTransformer, weights, tmp_path)
    config, own = reference.config, PRIORS[case]
    length, caption_dim = config.num_embeddings, own.get("embedding_proj_dim", 13)
    given = torch.randn(3, 13), torch.tensor([5, 999, 0]), torch.randn(3, caption_dim), torch.randn(3, length, 13)
    real = torch.arange(length) < torch.tensor([[length], [1], [3]])
    for mask in (None, real):
        expected = reference(*given, mask).predicted_image_embedding.reshape(3, -1)
        assert expected.std() > 0.1 and close(model(*given, mask), expected)
    other = given[3].masked_fill(~real[..., None], 7.0)  # what padding holds is seen by nobody
    assert torch.equal(model(*given[:3], other, real), model(*given, real))
    if config.clip_embed_dim is None:
        assert close(model.restored(given[0]), reference.post_process_latents(given[0]))
        torch.testing.assert_close(model.normalised(model.restored(given[0])), given[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", DECODERS)
@torch.no_grad()
def test_decoder_both_ways(case, weights, tmp_path) -> None:
    reference = shaken(lambda: diffusers.UNet2DConditionModel(**DECODER | DECODERS[case]))
    model = both_ways(reference, diffusers.UNet2DConditionModel, weights, tmp_path)
    assert isinstance(model, unclip_decoder.Decoder)
    x, timestep, context = torch.randn(2, model.config.channels, 8, 12), torch.tensor([7, 899]), torch.randn(2, 9, 11)
    if model.config.label == "class":
        label = torch.tensor([0, 5])
    else:
        label = torch.randn(2, model.config.label_dim or model.config.time_width)
    real = torch.arange(9) < torch.tensor([[9], [4]])
    for mask in (None, real):
        expected = reference(x, timestep, context, class_labels=label, encoder_attention_mask=mask).sample
        assert expected.std() > 0.1 and close(model(x, timestep, label, context, mask), expected)
    if model.config.middle:
        alone = model(x[1:], timestep[1:], label[1:], context[1:, :4])  # padding is as if it were not there
        assert close(alone, expected[1:])


@torch.no_grad()
def test_what_the_decoder_is_told_both_ways(weights, tmp_path) -> None:
    sizes = {"clip_extra_context_tokens": 3, "clip_embeddings_dim": 7, "time_embed_dim": 10, "cross_attention_dim": 5}
    reference = shaken(lambda: UnCLIPTextProjModel(**sizes))
    model = both_ways(reference, UnCLIPTextProjModel, weights, tmp_path)
    image, caption, tokens = torch.randn(2, 7), torch.randn(4, 7), torch.randn(4, 6, 7)
    context, beside = reference(
        image_embeddings=image, prompt_embeds=caption, text_encoder_hidden_states=tokens,
        do_classifier_free_guidance=True,
    )  # fmt: skip
    ours = model(torch.cat([model.none.expand(2, -1), image]), caption, tokens)
    assert close(ours[0], beside) and close(ours[1], context) and context.shape == (4, 9, 5)


@pytest.mark.parametrize("case", UPSAMPLERS)
@torch.no_grad()
def test_upsampler_both_ways(case, weights, tmp_path) -> None:
    sizes = {"sample_size": 16, "in_channels": 6, "out_channels": 3, "norm_num_groups": 4, "add_attention": False}
    sizes |= UPSAMPLERS[case]
    ways = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}
    sizes |= {f"{way}_block_types": [name] * len(sizes["block_out_channels"]) for way, name in ways.items()}
    reference = shaken(lambda: diffusers.UNet2DModel(**sizes))
    reference.save_pretrained(tmp_path / "theirs")
    model: Any = checkpoints.load_model(tmp_path / "theirs")
    x, timestep = torch.randn(2, 6, 12, 20), torch.tensor([0, 899])
    expected = reference(x, timestep).sample
    assert expected.std() > 0.1 and close(model(x, timestep), expected) and model.config.predicted_channels == 3


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"norm_in_type": "batch"}, "norm_in_type is 'batch'"),
        ({"added_emb_type": "image"}, "added_emb_type is 'image'"),
        ({"encoder_hid_proj_type": None}, "reads no caption"),
        ({"additional_embeddings": 0}, "additional_embeddings are 0, and there are 4"),
        ({"time_embed_act_fn": "gelu"}, "time_embed_act_fn"),
        ({"num_layers": 0}, "at least 1"),
        ({"attention_head_dim": 8}, "of another shape"),
    ],
)
def test_a_prior_that_is_not_implemented_is_named(changed, named, tmp_path) -> None:
    diffusers.PriorTransformer(**PRIOR).save_pretrained(tmp_path)
    refused(tmp_path, changed, named)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"only_cross_attention": True}, "only_cross_attention"),
        ({"class_embed_type": "projection"}, "class_embed_type is 'projection'"),
        ({"class_embed_type": None}, "class_embed_type is None"),
        ({"down_block_types": ["DownBlock2D", "SimpleCrossAttnDownBlock2D"]}, "no block of the way down 'DownBlock2D'"),
        ({"up_block_types": ["SimpleCrossAttnUpBlock2D", "UpBlock2D"]}, "UpBlock2D"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm"),
        ({"attention_head_dim": [5, 5]}, "head_dim"),
        ({"attention_head_dim": 50}, "head_dim \\(50\\) must divide 20 channels"),
        ({"resnet_time_scale_shift": "spatial"}, "spatial"),
    ],
)
def test_a_decoder_that_is_not_implemented_is_named(changed, named, tmp_path) -> None:
    diffusers.UNet2DConditionModel(**DECODER).save_pretrained(tmp_path)
    refused(tmp_path, changed, named)


def refused(folder, changed, named) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=named):
        checkpoints.load_model(folder)


def test_sizes_that_the_parts_cannot_take() -> None:
    prior = unclip_prior.build(unclip_prior.Config(9, 13, n_layers=1, n_heads=1, head_dim=4))
    with pytest.raises(ValueError, match="captions of 9 tokens, not 8"):
        prior(torch.randn(1, 13), torch.tensor([0]), torch.randn(1, 13), torch.randn(1, 8, 13))
    config = unclip_decoder.Config(
        widths=(4, 4), attention=(1,), up_attention=(1,), norm_groups=2, head_dim=4, context_dim=5
    )
    decoder = unclip_decoder.build(config)
    with pytest.raises(UserError, match="7 x 4 does not fit .* nearest size that does is 8 x 4"):
        decoder(torch.randn(1, 3, 7, 4), torch.tensor([0]), torch.randn(1, 16), torch.randn(1, 2, 5))
    with pytest.raises(ValueError, match="'class' does not go with label_dim None"):
        unclip_decoder.Config(label="class")
