"""Options of `keifu draw`, apart from its work: the command line starts without the libraries that draw."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from keifu.commands.shared import flags
from keifu.ranges import Count, Finite, Natural, PositiveShare, Seed, Share, SmallCount


@dataclass(frozen=True)
class Options(flags.OnDevice):
    """Draw pictures with a model that was trained to remove noise, by a text if the model reads text.

    Each file contains its settings; `keifu draw --again FILE` draws it once more, bit for bit.

    Samplers: ddpm is the original chain, random, all of the model's steps; ddim needs 50 and is random only with --eta;
    euler, heun (two evaluations a step) and lms follow the same path as plainer solvers; plms is Stable Diffusion's
    first sampler; dpm++-2m and unipc need 10 to 25 steps; euler-ancestral and dpm++-2m-sde add fresh noise at each
    step.
    """

    model: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="MODEL")] = None
    """A run, a diffusers directory or hub id, or a catalogue name."""
    text: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[TEXT]", help="Text to draw.")] = None
    out: Annotated[Path | None, tyro.conf.arg(aliases=("-o",), metavar="PATH")] = None
    """The PNG file; of several pictures it is a sheet of all, next to PATH-1.png, PATH-2.png and so on. Unset:
    picture-SEED.png."""
    sampler: str | None = None
    """Sampler that removes the noise. Unset: ddim, for a text dpm++-2m (unCLIP: ddim)."""
    steps: Count | None = None
    """Steps from noise to picture; unset, as many as are usual with the sampler."""
    seed: Seed | None = None
    """The same seed gives the same picture; of several, each has a seed one higher. Unset: a fresh one."""
    count: SmallCount = 1
    """Number of pictures."""
    label: str | None = None
    """The class to draw, by name or number."""
    guidance: Finite | None = None
    """How far towards the text or the label: 1 is what the model says, more is nearer to it and less varied. Unset:
    7.5 for a text (unCLIP: 8), 1 for a label."""
    negative: str = ""
    """Text that guidance leads away from, for models that read. Unset: none."""
    truncate: bool = False
    """Leave out the end of a text that is longer than the model reads."""
    guidance_rescale: Share = 0.0
    """Share of the contrast added by guidance that is removed, up to 1."""
    size: str | None = None
    """Pixels of a side, or WIDTHxHEIGHT; unset, those that the model was trained with."""
    init: Annotated[Path | None, tyro.conf.arg(metavar="PICTURE")] = None
    """A picture to begin with, instead of noise alone; its size is the drawing's unless --size says another. A model
    that draws by way of an embedding (unCLIP) varies it: what it shows is kept, its pixels are not."""
    strength: PositiveShare | None = None
    """Share of the steps that --init is drawn anew with, up to 1. Unset: 0.8, with a mask 1."""
    mask: Annotated[Path | None, tyro.conf.arg(metavar="PICTURE")] = None
    """Mask whose white parts of --init are drawn anew; the other pixels are kept."""
    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PATH[:SCALE]")] = ()
    """A LoRA for the network or its text's encoder, a .safetensors file or a run of keifu train lora-image, and how
    strongly it acts (1); several times for several."""
    tile: Natural | None = None
    """Side in pixels of the tiles in which latents are decoded, which bounds memory; 0 for none. Unset: 512 for
    pictures of more than 1024 x 1024 pixels."""
    towards: Annotated[str | None, tyro.conf.arg(metavar="PICTURE|TEXT")] = None
    """Picture or text that a series of --count pictures ends with; it starts from --init or from the text (unCLIP)."""
    prior_steps: Count | None = None
    """Steps in which such a model imagines the embedding. Unset: 25."""
    prior_guidance: Finite | None = None
    """Guidance of the embedding towards the text. Unset: 4."""
    candidates: Count = 1
    """Embeddings that it imagines, of which the one nearest to the text is drawn."""
    upsampling_steps: Count | None = None
    """Steps in which it enlarges its pictures. Unset: 7."""
    eta: Share = 0.0
    """ddim's share of fresh noise: 0 for none, 1 for ddpm's."""
    spacing: Literal["leading", "trailing", "linspace", "quadratic"] | None = None
    """Choice of the training's timesteps that are visited. Unset: the model's."""
    karras: bool = False
    """Noise levels that crowd where there is little noise."""
    batch_size: Count = 16
    """Most pictures that are drawn together."""
    best_of: Count | None = None
    """Number of pictures to draw; the --count of them that a CLIP finds nearest to the text are kept, best first."""
    clip: str | None = None
    """CLIP for --best-of: a run, a folder or a hub id."""
    strip: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Write the first picture's way too, as a sheet: into noise as the training has it, and below that out of noise as
    it was drawn, with what the network saw in it at each step."""
    again: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """A PNG file that keifu drew: draw it once more, with its settings, and say whether each bit is the same."""
