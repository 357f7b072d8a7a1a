"""DDPM's U-Net for CIFAR-10 (35.7 M parameters): pictures per second forward and in training, compared with diffusers.

python benchmarks/unet.py [--dtype float32 bfloat16] [--rounds 5] [--batch 1 16] [--training-batch 16]
    [--json FILE]

Both have the same random weights and see the same noisy pictures. In bfloat16 the forward pass has bfloat16 weights,
and training has autocast over float32 weights, as is usual; a further row gives diffusers channels-last weights, which
its users must request. A training step is the squared error of the noise, its gradient clipped at 1, and AdamW.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import typed, usual, write_timing
from _rounds import interleaved, machine
from _training import ours, peer
from diffusers import UNet2DModel
from torch import Tensor

from keifu.checkpoints.hf.weight_names import links
from keifu.checkpoints.hf.write import published_tensors
from keifu.layers.diffusion.noise_schedule import add_noise
from keifu.layers.unet.prepacked_conv import prepack
from keifu.models.diffusion import ddpm
from keifu.training.objectives.diffusion import DiffusionLoss, draw_noise
from keifu.training.protocols import Batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECTION = "DDPM's U-Net and diffusers"
BASE, LAST, OWN, PACKED = "diffusers", "diffusers, channels-last", "keifu", "keifu, packed"
CONFIG = ddpm.Config(dropout=0.0)  # without dropout, whose random numbers would differ between the sides


def models() -> tuple[ddpm.DDPM, UNet2DModel, UNet2DModel]:
    """Build keifu's model and two of diffusers', the second channels-last, with the same weights."""
    torch.manual_seed(0)
    own = ddpm.build(CONFIG)
    for parameter in own.parameters():  # the last layers are zero in a new network
        if not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    told = {key: value for key, value in ddpm.to_published(CONFIG).items() if key not in ("model_type", "scheduler")}
    weights = dict(published_tensors(own, links(own, ddpm.WEIGHT_NAMES)))
    plain, last = UNet2DModel.from_config(told), UNet2DModel.from_config(told)
    plain.load_state_dict(weights)
    last.load_state_dict(weights)
    return own, plain, last.to(memory_format=torch.channels_last)


def pictures(batch: int, seed: int = 0) -> Tensor:
    """Draw random pictures [batch, 3, 32, 32]."""
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


@torch.inference_mode()
def forward(dtype: torch.dtype, batch: int, rounds: int) -> dict[str, Any]:
    """Return the task of forward passes."""
    own, plain, last = (model.to(dtype).eval() for model in models())
    fast = prepack(own)
    x, timestep = pictures(batch).to(dtype), torch.arange(batch) * 1000 // batch
    contenders: dict[str, Callable[[], Tensor]] = {
        BASE: lambda: plain(x, timestep).sample,
        LAST: lambda: last(x.to(memory_format=torch.channels_last), timestep).sample,
        OWN: lambda: own(x, timestep),
        PACKED: lambda: fast(x, timestep),  # as keifu draw has it
    }
    base = contenders[BASE]().float()
    apart = max(float((work().float() - base).abs().max() / base.abs().max()) for work in contenders.values())
    print(f"{dtype}, forward, {batch} at a time; results within {apart:.1e} of the largest", flush=True)
    return {"amount": batch, "seconds": interleaved(contenders, rounds)}


def training(dtype: torch.dtype, batch: int, rounds: int) -> dict[str, Any]:
    """Return the task of training steps."""
    own, plain, last = (model.train() for model in models())
    objective, losses = DiffusionLoss(CONFIG.noise), {name: [] for name in (BASE, LAST, OWN)}

    def given(step: int) -> Batch:
        return {"pictures": pictures(batch, step), "draws": draw_noise(0, step, batch)}

    def loss(model: UNet2DModel, rows: Batch) -> Tensor:
        """Return the same loss with torch's noise, so that the cost of keifu's noise is not included."""
        timestep, added = torch.randint(0, 1000, (batch,)), torch.randn_like(rows["pictures"])
        noisy = add_noise(rows["pictures"], added, CONFIG.noise.alpha_bar, timestep)
        return torch.nn.functional.mse_loss(model(noisy, timestep).sample.float(), added)

    contenders = {
        BASE: peer(plain, loss, given, dtype, True, losses[BASE]),
        LAST: peer(last, loss, given, dtype, True, losses[LAST]),
        OWN: ours(own, objective, given, dtype, False, losses[OWN]),
    }
    seconds = interleaved(contenders, rounds)
    print(f"{dtype}, training, last losses", {name: round(own[-1], 3) for name, own in losses.items()}, flush=True)
    return {"amount": batch, "seconds": seconds}


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=[*DTYPES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--training-batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    count = sum(parameter.numel() for parameter in ddpm.build(CONFIG).parameters())
    print(f"{machine()}; {count:,} parameters, 3 x 32 x 32, {options.rounds} interleaved rounds")
    tasks = dict[str, dict[str, Any]]()
    for name in options.dtype:
        for batch in options.batch:
            tasks[f"{name}, {batch}"] = forward(DTYPES[name], batch, options.rounds)
    for name in options.dtype:
        tasks[f"training, {name}"] = training(DTYPES[name], options.training_batch, options.rounds)
    values = {"tasks": tasks, "against": dict.fromkeys([LAST, OWN, PACKED], [BASE])}
    columns = ["pictures/s; ratio to diffusers", *tasks]
    write_timing(options.json, SECTION, typed("unet.py", vars(options), usual(parser)), columns, values)


if __name__ == "__main__":
    main()
