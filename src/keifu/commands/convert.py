"""`keifu convert`: loads a model and writes it in a published format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from keifu.commands.shared import flags
from keifu.errors import UserError


@dataclass(frozen=True)
class Options:
    """Write a model as a Hugging Face directory, which transformers loads, as GGUF, which llama.cpp loads, or a CLIP as
    open_clip has it."""

    model: flags.Model
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help="The folder or .gguf file to write.")]
    to: Literal["hf", "gguf", "open_clip"] | None = None
    """Format. Unset: gguf if OUT ends in .gguf, else hf."""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Number format of the matrices, by default one that holds the stored numbers; q8_0 is for gguf alone."""
    replace: bool = False
    """Whether to write over the model that OUT holds."""


def run(options: Options) -> None:
    """Load and convert a model, write it, and print its path."""
    from keifu.checkpoints import convert
    from keifu.checkpoints.hub import may_be_model

    out = options.out
    if not options.replace and out.exists() and (out.is_file() or may_be_model(out)):
        raise UserError(f"{out} is there already: give another name, or write over it with --replace.")
    convert(options.model, out, options.to or ("gguf" if out.suffix == ".gguf" else "hf"), options.dtype)
    print(f"Wrote {out}.")
