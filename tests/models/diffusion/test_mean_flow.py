"""MeanFlow: the target of its loss by an independent derivative, jumps that add up, and a learned pair of pictures."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from keifu import checkpoints
from keifu.data.images.io import to_signed
from keifu.errors import UserError
from keifu.inference.images.flow_map import FlowMapPipeline
from keifu.inference.images.pipeline import image_pipeline, is_text_to_image
from keifu.inference.images.pixel_diffusion import ImageRequest, SeededNoise
from keifu.layers.counter_rng import normal
from keifu.models.diffusion import mean_flow
from keifu.training.objectives.mean_flow import MeanFlowLoss

SMALL = mean_flow.Config(size=6, patch_size=2, channels=3, n_heads=2, head_dim=4, n_layers=2, n_classes=3)


def small(config: mean_flow.Config = SMALL) -> mean_flow.MeanFlow:
    """Return a model whose weights are all random, so that each input matters."""
    torch.manual_seed(0)
    model = mean_flow.build(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return model


def batch(rows: int) -> dict[str, Tensor]:
    """Return random pictures with labels and seeds."""
    random = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (rows, 3, 6, 6), dtype=torch.uint8, generator=random)
    return {"pictures": pictures, "draws": torch.arange(rows) * 7919 + 3, "labels": torch.arange(rows) % 3}


@pytest.mark.parametrize("moving", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("power", [1.0, 0.0, 0.5])
def test_the_loss_is_the_papers(moving: float, power: float) -> None:
    """Algorithm 1, with the derivative along the path by reverse differentiation, twice, for each row."""
    model, rows = small(), batch(9)
    objective = MeanFlowLoss(moving, power)
    found = objective(model, rows)
    (gradient,) = torch.autograd.grad(found.total, model.last.weight)

    later, span = objective.times(rows["draws"])
    picture, noise = to_signed(rows["pictures"]), normal(rows["draws"], (3, 6, 6))
    share = later[:, None, None, None]
    x, velocity, one = (1 - share) * picture + share * noise, noise - picture, torch.ones(9)

    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = torch.autograd.functional.jvp(
            lambda x, later, span: model(x, later, span, rows["labels"]), (x, later, span), (velocity, one, one)
        )
    target = (velocity - span[:, None, None, None] * derivative).detach()
    error = (model(x, later, span, rows["labels"]) - target).square().flatten(1).sum(1)
    expected = (error / (error.detach() + 1e-3) ** power).sum()
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-5)
    (expected_gradient,) = torch.autograd.grad(expected, model.last.weight)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4 * float(expected_gradient.abs().max()))
    torch.testing.assert_close(found.figures["squared_error"], error.sum() / (3 * 6 * 6), rtol=1e-4, atol=1e-5)


def test_times_are_two_draws_in_order_for_a_share_of_the_rows() -> None:
    """The logits of a row with one time are normal with mean -0.4; of two draws, the later is the larger."""
    later, span = MeanFlowLoss(moving=0.3).times(torch.arange(20_000))
    moves = span > 0
    assert abs(moves.float().mean() - 0.3) < 0.01
    assert (later - span >= 0).all() and (later < 1).all()
    alone = torch.logit(later[~moves].double())
    assert abs(alone.mean() + 0.4) < 0.03 and abs(alone.std() - 1) < 0.03
    pair = torch.logit(torch.stack([later[moves], (later - span)[moves]]).double())
    assert abs(pair.mean() + 0.4) < 0.03
    assert abs((pair[0] - pair[1]).mean() - 2 / math.pi**0.5) < 0.05  # mean distance of two standard normal numbers


def test_a_batch_may_be_split_anywhere() -> None:
    model, rows = small(), batch(7)
    whole = MeanFlowLoss(0.5)(model, rows).total
    parts = [MeanFlowLoss(0.5)(model, {name: value[part] for name, value in rows.items()}).total
             for part in (slice(0, 3), slice(3, 7))]  # fmt: skip
    torch.testing.assert_close(whole, parts[0] + parts[1])


@pytest.mark.parametrize("steps", [1, 3])
def test_jumps_go_from_noise_to_the_picture(steps: int) -> None:
    """Section 4.2: x at the earlier time is x - span · u."""
    model = small().eval()
    pipeline = image_pipeline(model, lambda: None)
    assert isinstance(pipeline, FlowMapPipeline) and not is_text_to_image(model)
    request = pipeline.resolved(ImageRequest(seed=5, steps=steps, label=2))
    assert (request.sampler, request.steps, request.size) == ("by jumps", steps, (6, 6))
    states = []
    found = pipeline.draw(request, [5, 8], states.append)
    x = SeededNoise([5, 8])(torch.empty(2, 3, 6, 6))
    label, span = torch.tensor([2, 2]), torch.full((2,), 1 / steps)
    with torch.no_grad():
        for step in range(steps):
            x = x - model(x, 1 - step * span, span, label) / steps
    torch.testing.assert_close(states[-1].x, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[-1].picture, x, rtol=1e-5, atol=1e-5)
    assert (len(states), found.dtype) == (steps, torch.uint8)
    assert torch.equal(found, ((x.clamp(-1, 1) + 1) * 127.5).round().byte())
    assert torch.equal(pipeline.draw(request, [8])[0], found[1])


def test_a_jump_is_one_by_default() -> None:
    pipeline = FlowMapPipeline(small(mean_flow.Config(6, 2, 3, 2, 4, 1)))
    assert pipeline.resolved(ImageRequest()).steps == 1


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (ImageRequest(text="a cat", label=1), "reads no text"),
        (ImageRequest(sampler="euler", label=1), "sampler mean nothing"),
        (ImageRequest(eta=0.5, karras=True, label=1), "karras and eta mean nothing"),
        (ImageRequest(size=(8, 8), label=1), "always"),
        (ImageRequest(), "draws one of 3 classes"),
        (ImageRequest(label=3), "classes are 0 to 2"),
        (ImageRequest(label=1, guidance=2.0), "trained with labels alone"),
    ],
)
def test_settings_of_other_models_are_refused(request_: ImageRequest, said: str) -> None:
    with pytest.raises(UserError, match=said):
        FlowMapPipeline(small()).resolved(request_)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="do not fill a side of 7"):
        mean_flow.Config(size=7)
    with pytest.raises(UserError, match="multiple of 4"):
        mean_flow.Config(n_heads=2, head_dim=3)
    with pytest.raises(UserError, match="2 classes and 1 names"):
        mean_flow.Config(n_classes=2, classes=("a",))


def test_a_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = small(mean_flow.Config(6, 2, 3, 2, 4, 2, 3, ("one", "two", "three"))).eval()
    checkpoints.save(model, None, tmp_path)
    loaded = checkpoints.load_model(tmp_path)
    assert loaded.config == model.config
    assert FlowMapPipeline(loaded).label("two") == 1
    request = ImageRequest(seed=0, label=1, steps=2)
    assert torch.equal(*(FlowMapPipeline(each.eval()).draw(request, [0, 1]) for each in (model, loaded)))
