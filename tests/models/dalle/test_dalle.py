"""DALL-E: its autoencoder beside the one that transformers has of it, its decoder, its losses and what it draws."""

import math

import pytest
import torch

from keifu.errors import UserError
from keifu.inference.images.autoregressive import real_tokens, sample_image_tokens
from keifu.layers.counter_rng import gumbel
from keifu.models.dalle import dalle, discrete_vae
from keifu.models.sizes import count
from keifu.training.objectives.autoencoders import Ramp, TextImageLoss, discrete_vae_loss
from keifu.training.objectives.diffusion import draw_noise

VAE = discrete_vae.Config(12, 3, 9, (8, 12), 2, 5)
SMALL = dalle.Config(31, 5, 24, 40, 6, 3, kernel=3, vae=VAE)


@pytest.fixture
def vae() -> discrete_vae.DiscreteVAE:
    return discrete_vae.build(VAE)


@pytest.fixture
def model() -> dalle.Dalle:
    made = dalle.build(SMALL)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made.eval()


@torch.no_grad()
def test_the_encoder_is_the_one_that_transformers_has() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.flava.modeling_flava import FlavaImageCodebook

    config = transformers.FlavaImageCodebookConfig(hidden_size=8, vocab_size=37, num_blocks_per_group=2)
    theirs = FlavaImageCodebook(config).eval()
    ours = discrete_vae.build(discrete_vae.Config(24, 3, 37, (8, 16, 32, 64), 2, 5)).encoder
    state = {"first": theirs.blocks.input, "last": theirs.blocks.output.conv}
    for level in range(4):
        group = getattr(theirs.blocks, f"group_{level + 1}")
        for number in range(2):
            block, here = getattr(group.group, f"block_{number + 1}"), f"levels.{level}.{number}"
            state |= {f"{here}.convolutions.{n}": getattr(block.res_path.path, f"conv_{n + 1}") for n in range(4)}
            state |= {f"{here}.shortcut": block.id_path} if len(block.id_path.state_dict()) else {}
    ours.load_state_dict({f"{to}.{name}": t for to, module in state.items() for name, t in module.state_dict().items()})
    for parameter in theirs.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    ours.load_state_dict({f"{to}.{name}": t for to, module in state.items() for name, t in module.state_dict().items()})
    pixels = torch.rand(2, 3, 24, 40)
    expected = theirs.blocks(pixels)
    assert (ours(pixels) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(ours(pixels).argmax(1), theirs.get_codebook_indices(pixels))


@torch.no_grad()
def test_one_entry_a_place_is_a_share_of_one(vae) -> None:
    codes = torch.randint(0, 9, (2, 6, 6))
    shares = torch.nn.functional.one_hot(codes, 9).permute(0, 3, 1, 2).float()
    location = vae.relaxed(shares).location
    assert torch.allclose(location, vae.decoder.of_codes(codes).chunk(2, 1)[0], atol=1e-6)
    values = (vae.decode(codes) + 1) / 2 * 0.8 + 0.1
    assert torch.allclose(values, location.sigmoid().clamp(0.1, 0.9), atol=1e-6)


def test_the_logit_laplace_distribution() -> None:
    values = torch.linspace(1e-4, 1 - 1e-4, 200_001, dtype=torch.float64)
    said = discrete_vae.Laplace(torch.tensor(0.4, dtype=torch.float64), torch.tensor(-0.7, dtype=torch.float64))
    density = said.log_likelihood(values).exp()
    assert abs(float(torch.trapezoid(density, values)) - 1) < 2e-4
    x, b = 0.3, math.exp(-0.7)
    direct = math.exp(-abs(math.log(x / (1 - x)) - 0.4) / b) / (2 * b * x * (1 - x))
    assert math.isclose(float(said.log_likelihood(torch.tensor(x, dtype=torch.float64)).exp()), direct, rel_tol=1e-9)


def test_gumbel_noise() -> None:
    drawn = gumbel(torch.arange(200), (50, 20))
    assert abs(float(drawn.mean()) - 0.5772) < 0.01 and abs(float(drawn.std()) - math.pi / 6**0.5) < 0.01
    assert torch.equal(drawn[3:5], gumbel(torch.arange(3, 5), (50, 20)))


def test_the_bound_is_the_papers(vae) -> None:
    pictures = torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8)
    batch = {"pictures": pictures, "draws": draw_noise(0, 0, 4), "temperature": torch.full((4,), 0.3),
             "kl_weight": torch.full((4,), 2.0)}  # fmt: skip
    whole = discrete_vae_loss(vae, batch)
    parts = [discrete_vae_loss(vae, {n: t[rows] for n, t in batch.items()}) for rows in (slice(0, 1), slice(1, 4))]
    assert torch.allclose(whole.total, parts[0].total + parts[1].total, rtol=1e-5)
    logits = vae.logits(pictures.float() / 127.5 - 1)
    shares = ((logits + gumbel(batch["draws"], logits.shape[1:])) / 0.3).softmax(1)
    values = vae.values(pictures.float() / 127.5 - 1)
    q = logits.softmax(1)
    kl = (q * (q / (1 / 9)).log()).sum(1).mean()
    places = 3 * 12 * 12 / 36  # numbers of a picture for each place: the paper's 192
    expected = -vae.relaxed(shares).log_likelihood(values).mean() + 2.0 * kl / places
    assert torch.allclose(whole.total / 4, expected, rtol=1e-5)
    assert 1 <= float(whole.figures["used"]) / 4 <= 9


def test_ramps() -> None:
    ramp = Ramp(1.0, 1 / 16, 150)
    assert ramp.at(0) == 1.0 and ramp.at(150) == ramp.at(1000) == 1 / 16
    assert math.isclose(ramp.at(75), (1 + 1 / 16) / 2) and ramp.at(40) > ramp.at(41)
    assert Ramp(0.0, 6.6, 0).at(0) == 0.0 and Ramp(0.0, 6.6, 0).at(1) == 6.6


def test_the_papers_layers_and_size() -> None:
    paper = dalle.SIZES["dall-e"]
    patterns = [paper.pattern(layer) for layer in range(1, 65)]
    assert patterns[:7] == ["row", "column", "row", "row", "row", "column", "row"]
    assert patterns[-1] == "convolution" and patterns.count("column") == 16 and paper.grid.cells == 1024
    assert abs(count(dalle, paper) / 12e9 - 1) < 0.05
    assert paper.vae == discrete_vae.SIZES["dall-e-dvae"]
    assert count(discrete_vae, paper.vae) == 53_786_240 + 43_829_766  # the released encoder's and decoder's


@torch.no_grad()
@pytest.mark.parametrize("sparse", [True, False])
def test_entry_by_entry_is_the_whole(sparse) -> None:
    model = dalle.build(dalle.Config(31, 5, 24, 40, 6, 3, kernel=3, sparse=sparse, vae=VAE)).eval()
    tokens, codes = torch.randint(0, 31, (2, 5)), torch.randint(0, 9, (2, 6, 6))
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    whole = model(tokens, real, codes).picture
    logits, state = model.prefill(tokens, real)
    found = [logits]
    found += [model.decode(codes.flatten(1)[:, place], place, state) for place in range(35)]
    assert (torch.stack(found, 1) - whole).abs().max() < 1e-5


@torch.no_grad()
def test_nobody_sees_what_comes_later_and_padding_is_learned(model) -> None:
    tokens, codes = torch.randint(0, 31, (1, 5)), torch.randint(0, 9, (1, 6, 6))
    real = torch.tensor([[True, True, True, False, False]])
    before = model(tokens, real, codes)
    other, changed = tokens.clone(), codes.clone()
    other[:, 3:] = (other[:, 3:] + 1) % 31  # padding is told by its position alone
    changed[:, 4, 2] = (changed[:, 4, 2] + 1) % 9
    after = model(other, real, changed)
    assert torch.equal(before.text, after.text)
    apart = (before.picture != after.picture).any(-1)[0]
    assert not apart[: 4 * 6 + 3].any() and apart[4 * 6 + 3 :].any()
    assert not torch.equal(before.text, model(tokens, torch.ones_like(real), codes).text)


def test_losses_count_one_and_seven_eighths(model) -> None:
    tokens, codes = torch.randint(0, 31, (3, 5)), torch.randint(0, 9, (3, 6, 6))
    real = torch.arange(5) < torch.tensor([[5], [2], [3]])
    batch = {"tokens": tokens, "real": real, "codes": codes, "text_share": torch.full((3,), 3 / 10)}
    found = TextImageLoss()(model, batch)
    said = model(tokens, real, codes)
    text = torch.nn.functional.cross_entropy(said.text[real], tokens[real])
    picture = torch.nn.functional.cross_entropy(said.picture.flatten(0, 1), codes.flatten())
    assert torch.allclose(found.total / 3, text / 8 + 7 * picture / 8, rtol=1e-5)
    assert torch.allclose(found.figures["text_loss"] / 3, text, rtol=1e-5)
    parts = [TextImageLoss()(model, {n: t[rows] for n, t in batch.items()}) for rows in (slice(0, 2), slice(2, 3))]
    assert torch.allclose(parts[0].total + parts[1].total, found.total, rtol=1e-5)


def test_a_picture_belongs_to_its_seed(model) -> None:
    tokens = torch.randint(0, 31, (3, 5))
    real = torch.ones_like(tokens, dtype=torch.bool)
    together = sample_image_tokens(model, tokens, real, [7, 8, 2**40])
    assert torch.equal(sample_image_tokens(model, tokens[1:2], real[1:2], [8]), together[1:2])
    assert not torch.equal(sample_image_tokens(model, tokens[1:2], real[1:2], [9]), together[1:2])
    assert torch.equal(sample_image_tokens(model, tokens[1:2], real[1:2], [2**64 + 8]), together[1:2])
    sample_image_tokens(model, tokens[:2], real[:2], [2**63 - 1, 2**63])  # a count goes on from the largest seed


def test_drawn_entries_have_the_probabilities_they_are_said_to_have(model) -> None:
    tokens = torch.randint(0, 31, (1, 5)).expand(4000, -1)
    real = torch.ones_like(tokens, dtype=torch.bool)
    tiny = dalle.build(dalle.Config(31, 5, 24, 40, 1, 3, kernel=3, vae=discrete_vae.Config(4, 3, 9, (8, 12), 1, 5)))
    torch.nn.init.normal_(tiny.picture_head.weight, std=0.3)
    with torch.no_grad():
        said = tiny.prefill(tokens[:1], real[:1])[0].softmax(-1)[0]
    first = sample_image_tokens(tiny, tokens, real, range(4000))[:, 0, 0]
    shares = torch.bincount(first, minlength=9) / 4000
    assert (shares - said).abs().max() < 4 * (said * (1 - said) / 4000).sqrt().max()


def test_where_a_text_ends() -> None:
    tokens = torch.tensor([[3, 4, 9, 9, 9], [9, 9, 9, 9, 9], [1, 2, 3, 4, 5]])
    expected = [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert real_tokens(tokens, 9).int().tolist() == expected and real_tokens(tokens, None).all()


def test_what_is_refused(vae) -> None:
    with pytest.raises(UserError, match="nearest size that does is 12 x 12"):
        vae.encode(torch.zeros(1, 3, 12, 13))
    with pytest.raises(ValueError, match="A level has 10 channels"):
        discrete_vae.build(discrete_vae.Config(12, 3, 9, (10, 12)))
