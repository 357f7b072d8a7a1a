"""CLIP ViT-B/32: pictures and captions per second, compared with transformers and open_clip on the same random weights.

python benchmarks/clip.py [--dtype float32 bfloat16] [--rounds 5] [--batch 1 16] [--captions 256]
    [--json FILE]

Pictures are random numbers; captions are random token ids, of 8 to 24 tokens with special ones, like captions of
photographs. Each library gets captions in its format: keifu and transformers padded to the longest, and open_clip
padded to 77, which its released code requires; then all three get 77 tokens.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _results import typed, usual, write_timing
from _rounds import interleaved, machine
from open_clip import CLIP
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from keifu.checkpoints.hf.weight_names import links
from keifu.checkpoints.hf.write import published_tensors
from keifu.models.clip import clip
from keifu.models.hf import open_clip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SECTION, BASE, END = "CLIP ViT-B/32, transformers and open_clip", "transformers", 49_407
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
def compared(title: str, running: Contenders, rounds: int, amount: int) -> dict[str, Any]:
    """Print the difference of the results, and return the task."""
    found = {name: work().float() for name, work in running.items()}
    apart = max(float((found[name] - found[BASE]).abs().max() / found[BASE].abs().max()) for name in found)
    print(f"{title}: results within {apart:.1e} of the largest", flush=True)
    return {"amount": amount, "seconds": interleaved(running, rounds)}


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=[*DTYPES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--json", type=Path, help="The data file of the results whose table is replaced.")
    options = parser.parse_args()
    print(f"{machine()}; CLIP ViT-B/32, {options.rounds} interleaved rounds")
    tasks = dict[str, dict[str, Any]]()
    for name in options.dtype:
        three, tokens = models(DTYPES[name]), captions(options.captions)
        running = {f"pictures, {name}, {batch} at a time": seen(three, batch, DTYPES[name]) for batch in options.batch}
        amounts = [*options.batch, len(tokens), len(tokens)]
        running[f"captions of 8 to 24 tokens, {name}"] = read(three, tokens, False)
        running[f"captions of 77 tokens, {name}"] = read(three, tokens, True)
        for (title, contenders), amount in zip(running.items(), amounts, strict=True):
            tasks[title] = compared(title, contenders, options.rounds, amount)
    values = {"tasks": tasks, "a row": "task", "against": dict.fromkeys(["open_clip", "keifu"], [BASE])}
    columns = ["a second; ratio to transformers", BASE, "open_clip", "keifu"]
    write_timing(options.json, SECTION, typed("clip.py", vars(options), usual(parser)), columns, values)


if __name__ == "__main__":
    main()
