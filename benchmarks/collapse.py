"""A GAN that collapses: two pictures of 8 x 8 to learn, by the fully connected GAN and by DCGAN.

python benchmarks/collapse.py [--seeds 0 1 2] [--write JSON] [--picture PNG]

One picture is white on the left, the other one at the top, and every batch has 16 of each. After each 100 steps, 40
drawings are compared with both. The table has the share of drawings that are nearer to the picture which is drawn more
often: 50% if both are drawn equally often, 100% after a collapse. The picture has 20 drawings of the first seed, from
the same noise, in a row for each network and number of steps.
"""

import argparse
from pathlib import Path

import torch
from _results import of_seeds, print_rows, typed, usual, write_table
from _rounds import machine
from torch import Tensor

from keifu.data.images.grid import grid
from keifu.inference.images.pixel_diffusion import ImageRequest
from keifu.inference.images.single_pass import GeneratorPipeline
from keifu.models.classic import gan
from keifu.training.objectives.adversarial import adversarial_loss
from keifu.training.objectives.diffusion import draw_noise
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

STEPS, DRAWN, SHOWN, LARGER = (100, 200, 300, 400), 40, 20, 3  # LARGER: times that the shown pictures are enlarged
WAYS = {"GAN (2014)": "mlp", "DCGAN": "dcgan"}


def two_pictures() -> Tensor:
    """Return the two pictures, as bytes."""
    made = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    made[0, 0, :, :4] = made[1, 0, :4] = 255
    return made


def learned(network: str, seed: int) -> list[Tensor]:
    """Train a network, and return its drawings at each of `STEPS`."""
    torch.manual_seed(seed)
    model = gan.build(gan.Config(size=8, latent_dim=4, network=network, widths=(16, 32), hidden_dim=64)).train()
    settings = Settings(
        steps=STEPS[-1], batch_size=32, micro_batch=32, learning_rate=3e-3, betas=(0.5, 0.999), schedule="constant",
        weight_decay=0.0, clip=0.0, precision="float32", seed=seed,
    )  # fmt: skip
    trainer, drawings = Trainer(model, adversarial_loss, settings), list[Tensor]()
    pictures = two_pictures()[torch.arange(32) % 2]
    for step in range(STEPS[-1]):
        gradient = trainer.gradient(step, {"pictures": pictures, "draws": draw_noise(seed, step, 32)})
        assert gradient is not None
        trainer.update(gradient)
        if step + 1 in STEPS:
            drawings.append(GeneratorPipeline(model.eval()).draw(ImageRequest(seed=0), range(DRAWN)))
            model.train()
    return drawings


def share(drawn: Tensor) -> float:
    """Return the share of drawings, in percent, that are nearer to the more frequent one of the two pictures."""
    apart = (drawn[:, None].float() - two_pictures()).abs().mean((2, 3, 4))
    second = float(apart.argmin(1).float().mean())
    return 100 * max(second, 1 - second)


def main() -> None:
    """Train, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--write", type=Path, help="a data file of docs/results/data")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[list[float]]] = {}
    shown = list[Tensor]()
    for name, network in WAYS.items():
        runs = [learned(network, seed) for seed in options.seeds]
        found[name] = [[share(run[index]) for run in runs] for index in range(len(STEPS))]
        shown += [drawn[:SHOWN] for drawn in runs[0]]
    rows, values = of_seeds(found, ".0f")
    columns = ["% of the more frequent picture", *(f"{steps} steps" for steps in STEPS)]
    print(f"{machine()}\n")
    print_rows([columns, *rows])
    if options.write:
        command = typed("collapse.py", vars(options), usual(parser))
        write_table(options.write, "A collapse", command, columns, rows, values)
    if options.picture:
        large = torch.cat(shown).repeat_interleave(LARGER, 2).repeat_interleave(LARGER, 3)
        options.picture.write_bytes(grid(large, columns=SHOWN))


if __name__ == "__main__":
    main()
