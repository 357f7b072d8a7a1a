"""GAN and DCGAN: both networks learn from one pass as by turns, and a seed belongs to a picture."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import binary_cross_entropy

from keifu import checkpoints
from keifu.data.images.io import to_signed
from keifu.errors import UserError
from keifu.inference.images.pipeline import image_pipeline, is_text_to_image
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.inference.images.single_pass import GeneratorPipeline
from keifu.layers.counter_rng import normal
from keifu.models.classic import gan
from keifu.recipes.images import gan as recipe
from keifu.training.objectives.adversarial import adversarial_loss

TOYS = {
    "dcgan": gan.Config(size=8, latent_dim=5, widths=(4, 6)),
    "dcgan without norm": gan.Config(size=12, channels=3, latent_dim=5, widths=(4,), norm="none"),
    "mlp": gan.Config(size=7, latent_dim=5, network="mlp", hidden_dim=9),
}


def small(config: gan.Config) -> gan.GAN:
    torch.manual_seed(0)
    return gan.build(config)


@pytest.mark.parametrize("name", TOYS)
def test_each_network_gets_the_gradient_of_its_own_loss(name: str) -> None:
    """As in algorithm 1 of the paper: the discriminator's, then the generator's, each with the other one fixed."""
    config = TOYS[name]
    model = small(config).eval()  # so that normalisation is the same in each pass
    # an odd number, so that as many cannot be seen as not
    pictures = torch.randint(0, 256, (7, config.channels, config.size, config.size), dtype=torch.uint8)
    batch = {"pictures": pictures, "draws": torch.arange(7)}
    found = adversarial_loss(model, batch)
    found.total.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}

    def probability(images: torch.Tensor) -> torch.Tensor:
        return model.discriminator(images).sigmoid()

    made = model.generator(normal(torch.arange(7), (config.latent_dim,)))
    ones, zeros = torch.ones(7), torch.zeros(7)
    first = binary_cross_entropy(probability(to_signed(pictures)), ones, reduction="sum")
    first = first + binary_cross_entropy(probability(made), zeros, reduction="sum")
    second = binary_cross_entropy(probability(made), ones, reduction="sum")
    torch.testing.assert_close(found.total, first + second)
    torch.testing.assert_close(found.figures["discriminator_loss"], first)
    torch.testing.assert_close(found.figures["generator_loss"], second)
    seen = int((model.discriminator(to_signed(pictures)) > 0).sum()), int((model.discriminator(made) < 0).sum())
    assert (int(found.figures["real_seen"]), int(found.figures["generated_seen"])) == seen
    for part, loss in ((model.discriminator, first), (model.generator, second)):
        expected = torch.autograd.grad(loss, [*part.parameters()], retain_graph=True)
        names = [full for full in gradients if full.startswith("gen" if part is model.generator else "dis")]
        for full, value in zip(names, expected, strict=True):
            torch.testing.assert_close(gradients[full], value, atol=1e-5, rtol=1e-4)


def test_the_generator_has_the_papers_shape() -> None:
    """DCGAN, figure 1: 100 numbers become 4 x 4 x 1024, then 512, 256 and 128 channels, and 64 x 64 x 3 pixels."""
    config = gan.SIZES["dcgan-64"]
    with torch.device("meta"):
        generator, discriminator = gan.dcgan_generator(config), gan.dcgan_discriminator(config)
        shapes, x = [], torch.zeros(2, config.latent_dim)
        for layer in generator:
            x = layer(x)
            shapes += [tuple(x.shape[1:])] if x.dim() == 4 and isinstance(layer, torch.nn.ReLU | torch.nn.Tanh) else []
        assert discriminator(x).shape == (2,)
    assert shapes == [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (3, 64, 64)]
    assert isinstance(discriminator[1], torch.nn.LeakyReLU)  # no normalisation after the first convolution


def test_gains_begin_around_1_and_other_weights_around_0() -> None:
    generator = gan.build(gan.Config(size=16, widths=(64, 128))).generator
    gains = torch.cat([layer.weight.detach() for layer in generator if isinstance(layer, torch.nn.BatchNorm2d)])
    others = torch.cat(
        [layer.weight.detach().flatten() for layer in generator if isinstance(layer, torch.nn.ConvTranspose2d)]
    )
    for weights, mean in ((gains, 1.0), (others, 0.0)):
        assert abs(float(weights.mean()) - mean) < 0.01 and float(weights.std()) == pytest.approx(0.02, rel=0.2)


def test_samples_of_a_run_are_of_the_same_noise() -> None:
    model = small(TOYS["dcgan"]).eval()
    for weights in model.generator.parameters():
        torch.nn.init.normal_(weights)
    sample = recipe.sampler(model, 5)
    first, later = (Image.open(io.BytesIO(sample(step))).tobytes() for step in (0, 250))
    assert first == later and len({*first}) > 9
    assert sample(0) != sample(250), "the step is written into the file"


def test_a_seed_belongs_to_a_picture() -> None:
    model = small(TOYS["dcgan"]).eval()
    pipeline = image_pipeline(model, lambda: None)
    assert isinstance(pipeline, GeneratorPipeline) and not is_text_to_image(model)
    request = pipeline.resolved(ImageRequest(seed=3))
    assert (request.sampler, request.steps, request.size) == ("in one pass", 1, (8, 8))
    together = pipeline.draw(request, range(3, 6))
    assert torch.equal(torch.cat([pipeline.draw(request, [seed]) for seed in range(3, 6)]), together)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (ImageRequest(text="a cat"), "reads no text, so 'a cat'"),
        (ImageRequest("ddpm", eta=0.5), "one pass and removes no noise, so eta and sampler mean nothing"),
        (ImageRequest(steps=20), "steps is 20, and this model's is always 1"),
        (ImageRequest(size=(16, 16)), r"size is \(16, 16\), and this model's is always \(8, 8\)"),
    ],
)
def test_settings_of_other_models_are_refused(request_: ImageRequest, said: str) -> None:
    with pytest.raises(UserError, match=said):
        GeneratorPipeline(small(TOYS["dcgan"])).resolved(request_)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="size is 30, and 2 widths need a multiple of 4"):
        gan.Config(size=30)
    with pytest.raises(UserError, match="Did you mean 'dcgan'"):
        gan.Config(network="dcgam")
    with pytest.raises(UserError, match="draws pictures of 1 x 8 x 8 .* not 3 x 8 x 8"):
        small(TOYS["dcgan"]).check_size(3, 8, 8)


@pytest.mark.parametrize("name", TOYS)
def test_a_saved_model_loads_with_the_same_bits(name: str, tmp_path: Path) -> None:
    model = small(TOYS[name])
    model(torch.randn(4, 5))  # changes the running statistics
    checkpoints.save(model, None, tmp_path)
    loaded = checkpoints.load_model(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())
