"""The codebook of moving averages: the paper's update, moved codes, and what is saved."""

from pathlib import Path
from typing import Any

import torch

from keifu import checkpoints
from keifu.data.images.io import to_signed
from keifu.models.diffusion import vq_vae
from keifu.recipes.images import vq
from keifu.training.objectives.autoencoders import VQLoss

SMALL = vq_vae.Config(8, 1, 4, (4, 6), 1, codebook_size=5, norm_groups=2)


def averaged(least: float = 0.0) -> Any:
    torch.manual_seed(0)
    model = vq_vae.build(SMALL)
    model.codebook.weight.data.normal_()
    model.codebook = vq_vae.AveragedCodebook(model.codebook.weight, 0.9, least)
    return model.train()


def test_codes_are_the_papers_moving_averages() -> None:
    """Appendix A.1: N ← γN + (1 - γ)n and m ← γm + (1 - γ)Σz, and a code is m / N."""
    codebook = averaged().codebook
    number, total = torch.ones(5), codebook.weight.clone()
    for step in range(3):
        vectors = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(step))
        codes = codebook.nearest(vectors)
        flat, index = vectors.movedim(1, -1).reshape(-1, 4), codes.flatten()
        for code in range(5):
            number[code] = 0.9 * number[code] + 0.1 * (index == code).sum()
            total[code] = 0.9 * total[code] + 0.1 * flat[index == code].sum(0)
        codebook.update(vectors, codes)
        torch.testing.assert_close(codebook.weight, total / number[:, None])
        torch.testing.assert_close(codebook.usage, number)


def test_an_unused_code_moves_to_a_vector_of_the_batch() -> None:
    codebook = averaged(least=0.95).codebook
    codebook.weight[3] = 100.0  # far from everything
    vectors = torch.randn(2, 4, 3, 3)
    codebook.update(vectors, codebook.nearest(vectors))
    flat = vectors.movedim(1, -1).reshape(-1, 4)
    assert (flat == codebook.weight[3]).all(1).any() and codebook.usage[3] == 1.0


def test_the_objective_updates_the_codes_in_training_alone() -> None:
    model, batch = averaged(), {"pictures": torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)}
    before = model.codebook.weight.clone()
    VQLoss()(model.eval(), batch)
    assert torch.equal(model.codebook.weight, before)
    VQLoss()(model.train(), batch).total.backward()
    assert not torch.equal(model.codebook.weight, before)
    assert model.to_vectors.weight.grad.abs().sum() > 0


def test_the_codes_in_use_are_those_of_the_batch() -> None:
    """The figure is divided by the number of pictures, as all figures are."""
    model, batch = averaged().eval(), {"pictures": torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)}
    vectors = model.vectors(to_signed(batch["pictures"])).detach().movedim(1, -1)
    model.codebook.weight[:3] = vectors[:, 0, 0]
    different = len(model.encode(to_signed(batch["pictures"])).unique())
    found = VQLoss()(model, batch)
    assert float(found.figures["used"]) / found.weight == different and different >= 3


def test_a_model_is_saved_without_the_usage_of_its_codes(tmp_path: Path) -> None:
    model = averaged()
    vq.save(model, tmp_path)
    loaded: Any = checkpoints.load_model(tmp_path)
    assert "codebook.usage" not in loaded.state_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
