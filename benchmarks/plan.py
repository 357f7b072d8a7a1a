"""`keifu plan` compared with published figures (LLaMA-65B, PaLM-540B, GPT-3 175B, Llama 2 70B and Stable Diffusion 1),
and with training steps on this machine.

python benchmarks/plan.py
python benchmarks/plan.py --here --json docs/results/data/plan.json

One set of constants is used for all GPUs. For Stable Diffusion, torch counts the operations of the U-Net and of the
image encoder on the meta device, for the steps and sizes of its model card (237,000 steps of 2,048 pictures at 256
pixels, 934,000 at 512). They are assumed to run at the plans' share of peak speed for large matrices. MosaicML's
repository diffusion reports the time for the U-Net of Stable Diffusion 2 on 8 A100 (81.33 days), with precomputed
latents.

On this machine, three models are trained in separate processes: the median of five steps after the first two, and the
peak of the process's memory minus that before the model was built.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from keifu.commands.reference.plan import architecture
from keifu.layers.meta import on_meta
from keifu.models import gpt2, llama
from keifu.models.diffusion import autoencoder_kl, conditioned_unet
from keifu.models.sizes import published_sizes
from keifu.training.hardware import plan
from keifu.training.hardware.flops import count_flops, time_call
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

SIZES = {size.name: size for size in published_sizes()}


TORCHTITAN = {  # published tokens/s per H100 (benchmarks/llama3_h100_202412); the plans are in bfloat16
    ("llama3.1-8b", 8, 131e3, "not compiled"): 5762, ("llama3.1-8b", 8, 131e3, "compiled"): 6667,
    ("llama3.1-8b", 128, 2e6, "not compiled"): 5605, ("llama3.1-8b", 128, 2e6, "compiled"): 6514,
    ("llama3.1-70b", 256, 4e6, "float8"): 829, ("llama3.1-405b", 512, 4e6, "float8, pipeline"): 128,
}  # fmt: skip


def planned(name: str, devices: str, batch: float) -> plan.Plan:
    """Return the plan of a published size."""
    return plan.plan(architecture(SIZES[name]), *plan.parse_devices(devices), batch)


def diffusion_hours(unet: str, pictures: dict[int, int], encodes: bool) -> float:
    """Return the A100 hours of a U-Net for this many pictures of each side.

    Its forward pass is counted; its backward pass takes twice as much. encodes: include the forward pass of the
    autoencoder's encoder.
    """
    with on_meta():
        model = conditioned_unet.build(config := conditioned_unet.SIZES[unet])
        vae = autoencoder_kl.build(autoencoder_kl.SIZES["stable-diffusion-autoencoder"])
        total = 0.0
        for side, count in pictures.items():
            x, text = torch.zeros(1, 4, side // 8, side // 8), torch.zeros(1, 77, config.context_dim)
            forward = count_flops(lambda: model(x, torch.zeros(1), text))  # noqa: B023
            encoded = count_flops(lambda: vae.encode(torch.zeros(1, 3, side, side))) if encodes else 0  # noqa: B023
            total += count * (3 * forward + encoded)
    device = plan.DEVICES["A100-40G"]
    return total / (device.flops * device.products) / 3600


MODELS: dict[str, tuple[Any, Any, int]] = {  # and rows of a step
    "a LLaMA of 14 M": (llama, llama.Config(6000, 256, 320, 896, 8, 5), 16),
    "a LLaMA of 52 M": (llama, llama.Config(20_000, 512, 512, 1376, 10, 8), 6),
    "GPT-2 of 124 M": (gpt2, gpt2.Config(dropout=0.0), 3),
}
STEPS, WARM = 5, 2


def expected(name: str) -> tuple[plan.Plan, int]:
    """Return the plan of a model on this machine, and its number of parameters."""
    module, config, rows = MODELS[name]
    with on_meta():
        count = sum(parameter.numel() for parameter in module.build(config).parameters())
    sizes = config.n_layers, config.dim, config.dim, config.dim, config.n_heads, config.vocab_size
    model = plan.Architecture(count, *sizes, config.context_length)
    return plan.plan(model, *plan.parse_devices("1xthis-CPU"), rows * config.context_length), count


def train(name: str, micro_batch: int) -> None:
    """Print the seconds of a training step of this model, and the bytes of memory that it used."""
    module, config, rows = MODELS[name]
    torch.ones(256, 256) @ torch.ones(256, 256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = module.build(config).train()
    trainer = Trainer(model, causal_language_modeling, Settings(batch_size=rows, micro_batch=micro_batch))
    batch = {"tokens": torch.randint(config.vocab_size, (rows, config.context_length + 1))}

    def step() -> None:
        gradient = trainer.gradient(0, batch)
        assert gradient
        trainer.update(gradient)

    seconds = [time_call(step, trainer.device) for _ in range(WARM + STEPS)][WARM:]
    print(median(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def here(to: Path | None) -> None:
    """Print the table of this machine, and write it to `to` if a path is given."""
    table = {}
    print(f"{'':18} {'s a step':>9} {'measured':>9} {'ratio':>6} {'GB':>7} {'measured':>9} {'ratio':>6}")
    for name in MODELS:
        made, count = expected(name)
        words = [sys.executable, __file__, "--model", name, "--micro-batch", str(made.layout.rows)]
        found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        seconds, size, planned = float(found[0]), int(found[1]), sum(made.memory.values())
        table[name] = {"parameters": count, "tokens": made.tokens, "planned_seconds": made.step, "seconds": seconds,
                       "planned_bytes": planned, "bytes": size, "flops_per_second": made.kind.flops,
                       "bytes_per_second": made.kind.bandwidth, "parts": made.seconds | made.memory}  # fmt: skip
        print(f"{name:18} {made.step:9.3f} {seconds:9.3f} {made.step / seconds:6.2f} {planned / 1e9:7.2f} "
              f"{size / 1e9:9.2f} {planned / size:6.2f}", flush=True)  # fmt: skip
    if to:
        to.write_text(json.dumps(table, indent=1) + "\n")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--here", action="store_true", help="Beside this machine, in place of what was published.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", choices=MODELS, help="Of a process: what it trains.")
    parser.add_argument("--micro-batch", type=int)
    options = parser.parse_args()
    if options.model:
        return train(options.model, options.micro_batch)
    if options.here:
        return here(options.json)
    llama1, llama2 = planned("llama-65b", "2048xA100-80G", 4e6), planned("llama2-70b", "2000xA100-80G", 4e6)
    palm = planned("palm-540b", "6144xTPU-v4", 2048 * 2048)
    first = diffusion_hours("stable-diffusion-1-unet", {256: 237_000 * 2048, 512: 934_000 * 2048}, encodes=True)
    second = diffusion_hours("stable-diffusion-2-base-unet", {256: 1_126_400_000, 512: 1_740_800_000}, encodes=False)
    rows = [
        ("LLaMA-65B, 2,048 A100-80G: tokens/s a GPU", llama1.rate, 380),
        ("LLaMA-65B, 1.4 T tokens: days", llama1.hours(1.4e12) / 24 / 2048, 21),
        ("PaLM-540B, 6,144 TPU v4: MFU in %", 100 * palm.utilisation, 46.2),
        ("GPT-3 175B, 300 B tokens: PF-days", architecture(SIZES["gpt3-175b"]).flops * 300e9 / 8.64e19, 3640),
        ("Llama 2 70B, 2 T tokens: M GPU hours", llama2.hours(2e12) / 1e6, 1.72),
        *(
            (f"{name}, {count} H100 ({how}): tokens/s a GPU", planned(name, f"{count}xH100-80G", batch).rate, rate)
            for (name, count, batch, how), rate in TORCHTITAN.items()
        ),
        ("Stable Diffusion 1: thousand A100 hours", first / 1e3, 150),
        ("Stable Diffusion 2 by MosaicML: thousand A100 hours", second / 1e3, 81.33 * 8 * 24 / 1e3),
    ]
    print(f"{'':52} {'planned':>9} {'published':>9} {'ratio':>6}")
    for name, found, figure in rows:
        outside = "" if abs(found / figure - 1) <= 0.25 else "  not within 25%"
        print(f"{name:52} {found:9,.4g} {figure:9,.4g} {found / figure:6.2f}{outside}")


if __name__ == "__main__":
    main()
