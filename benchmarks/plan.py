"""`keifu plan` beside what was published: LLaMA-65B, PaLM-540B, GPT-3 175B, Llama 2 70B and Stable Diffusion 1.

python benchmarks/plan.py

One set of constants for all. Of Stable Diffusion the operations of the U-Net and of the encoder of pictures are counted
by torch on the meta device, for the steps and sizes of its model card (237,000 steps of 2,048 pictures at 256 pixels,
934,000 at 512), and taken at the share of the peak that large products have in the plans. MosaicML's repository
diffusion says what the U-Net of Stable Diffusion 2 took them on 8 A100 (81.33 days), latents computed before.
"""

import torch

from keifu.commands.plan import architecture
from keifu.layers.meta import on_meta
from keifu.models.diffusion import autoencoder_kl, conditioned_unet
from keifu.models.sizes import published_sizes
from keifu.training.hardware import plan
from keifu.training.hardware.flops import count_flops

SIZES = {size.name: size for size in published_sizes()}


def planned(name: str, devices: str, batch: float) -> plan.Plan:
    """The plan of a published size."""
    return plan.plan(architecture(SIZES[name]), *plan.parse_devices(devices), batch)


def diffusion_hours(unet: str, pictures: dict[int, int], encodes: bool) -> float:
    """A100 hours of a U-Net and so many pictures of each side: its forward pass is counted, its backward pass takes
    twice as much. encodes: the autoencoder's encoder too, which has no backward pass."""
    with on_meta():
        model = conditioned_unet.build(config := conditioned_unet.SIZES[unet])
        vae = autoencoder_kl.build(autoencoder_kl.SIZES["stable-diffusion-autoencoder"])
        total = 0.0
        for side, count in pictures.items():
            x, text = torch.zeros(1, 4, side // 8, side // 8), torch.zeros(1, 77, config.context_dim)
            forward = count_flops(lambda: model(x, torch.zeros(1), text))  # noqa: B023
            encoded = count_flops(lambda: vae.encode(torch.zeros(1, 3, side, side))) if encodes else 0  # noqa: B023
            total += count * (3 * forward + encoded)
    return total / (plan.DEVICES["A100-40G"].flops * plan.PRODUCTS) / 3600


def main() -> None:
    """Prints the table."""
    llama, llama2 = planned("llama-65b", "2048xA100-80G", 4e6), planned("llama2-70b", "2000xA100-80G", 4e6)
    palm = planned("palm-540b", "6144xTPU-v4", 2048 * 2048)
    first = diffusion_hours("stable-diffusion-1-unet", {256: 237_000 * 2048, 512: 934_000 * 2048}, encodes=True)
    second = diffusion_hours("stable-diffusion-2-base-unet", {256: 1_126_400_000, 512: 1_740_800_000}, encodes=False)
    rows = [
        ("LLaMA-65B, 2,048 A100-80G: tokens/s a GPU", llama.rate, 380),
        ("LLaMA-65B, 1.4 T tokens: days", llama.hours(1.4e12) / 24 / 2048, 21),
        ("PaLM-540B, 6,144 TPU v4: MFU in %", 100 * palm.utilisation, 46.2),
        ("GPT-3 175B, 300 B tokens: PF-days", architecture(SIZES["gpt3-175b"]).flops * 300e9 / 8.64e19, 3640),
        ("Llama 2 70B, 2 T tokens: M GPU hours", llama2.hours(2e12) / 1e6, 1.72),
        ("Stable Diffusion 1: thousand A100 hours", first / 1e3, 150),
        ("Stable Diffusion 2 by MosaicML: thousand A100 hours", second / 1e3, 81.33 * 8 * 24 / 1e3),
    ]
    print(f"{'':52} {'planned':>9} {'published':>9} {'ratio':>6}")
    for name, found, figure in rows:
        outside = "" if abs(found / figure - 1) <= 0.25 else "  not within 25%"
        print(f"{name:52} {found:9,.4g} {figure:9,.4g} {found / figure:6.2f}{outside}")


if __name__ == "__main__":
    main()
