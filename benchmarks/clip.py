"""CLIP ViT-B/32: pictures and captions per second, compared with transformers and open_clip on the same random weights.

python benchmarks/clip.py [--dtype float32 bfloat16] [--rounds 5] [--batch 1 16] [--captions 256]

Pictures are random numbers; captions are random token ids, of 8 to 24 tokens with special ones, like captions of
photographs. Each library gets captions in its format: keifu and transformers padded to the longest, and open_clip
padded to 77, which its released code requires; in a second table all three get 77 tokens.
"""

import argparse
from collections.abc import Callable

import torch
from _rounds import interleaved, machine, table
from open_clip import CLIP
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from keifu.checkpoints.hf.weight_names import links
from keifu.checkpoints.hf.write import published_tensors
from keifu.models.clip import clip
from keifu.models.hf import open_clip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASE, END = "transformers", 49_407
Contenders = dict[str, Callable[[], Tensor]]


def models(dtype: torch.dtype) -> tuple[clip.Clip, CLIPModel, CLIP]:
    """Return the three models, with the same weights."""
    torch.manual_seed(0)
    config = clip.SIZES["clip-vit-b32"]
    ours = clip.build(config)
    written = clip.to_published(config)
    theirs = CLIPModel(CLIPConfig(**{key: written[key] for key in ("text_config", "vision_config", "projection_dim")}))
    theirs.load_state_dict(dict(published_tensors(ours, links(ours, clip.WEIGHT_NAMES))))
    described = open_clip.to_open_clip(config)["model_cfg"]
    others = CLIP(**described)
    others.load_state_dict(dict(published_tensors(ours, links(ours, open_clip.WEIGHT_NAMES))))
    return ours.to(dtype).eval(), theirs.to(dtype).eval(), others.to(dtype).eval()


def captions(count: int) -> Tensor:
    """Return token ids [count, 77], padded with the end token."""
    lengths = torch.randint(8, 25, (count, 1))
    tokens = torch.randint(1, 49_000, (count, 77))
    tokens[:, 0] = 49_406
    return torch.where(torch.arange(77) < lengths - 1, tokens, END)


def cut(tokens: Tensor) -> Tensor:
    """Remove the columns that have only the end token, except one."""
    return tokens[:, : int((tokens != END).sum(1).max()) + 1]


def seen(three: tuple[clip.Clip, CLIPModel, CLIP], batch: int, dtype: torch.dtype) -> Contenders:
    ours, theirs, others = three
    pixels = torch.randn(batch, 3, 224, 224).to(dtype)
    return {
        BASE: lambda: theirs.get_image_features(pixels).pooler_output,
        "open_clip": lambda: others.encode_image(pixels),
        "keifu": lambda: ours.encode_image(pixels),
    }


def read(three: tuple[clip.Clip, CLIPModel, CLIP], tokens: Tensor, whole: bool) -> Contenders:
    ours, theirs, others = three
    given = tokens if whole else cut(tokens)
    return {
        BASE: lambda: theirs.get_text_features(given).pooler_output,
        "open_clip": lambda: others.encode_text(tokens),
        "keifu": lambda: ours.encode_text(given),
    }


@torch.inference_mode()
def compared(title: str, running: Contenders, rounds: int, amount: int, unit: str) -> None:
    """Print the difference of the results, and the table."""
    found = {name: work().float() for name, work in running.items()}
    apart = max(float((found[name] - found[BASE]).abs().max() / found[BASE].abs().max()) for name in found)
    print(f"\n{title}; results within {apart:.1e} of the largest\n")
    print(table(interleaved(running, rounds), amount, unit, BASE, {}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=[*DTYPES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--captions", type=int, default=256)
    options = parser.parse_args()
    print(f"{machine()}; CLIP ViT-B/32, {options.rounds} interleaved rounds, medians")
    for name in options.dtype:
        three, tokens = models(DTYPES[name]), captions(options.captions)
        for batch in options.batch:
            running = seen(three, batch, DTYPES[name])
            compared(f"{name}, pictures, {batch} at a time", running, options.rounds, batch, "pictures")
        count = len(tokens)
        compared(f"{name}, {count} captions", read(three, tokens, False), options.rounds, count, "captions")
        compared(f"{name}, {count} captions of 77", read(three, tokens, True), options.rounds, count, "captions")


if __name__ == "__main__":
    main()
