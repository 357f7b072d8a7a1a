"""`keifu convert`: loads a model and writes it in a published format."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from keifu.commands.shared import flags


@dataclass(frozen=True)
class Options:
    """Write a model as a Hugging Face directory, which transformers loads, as GGUF, which llama.cpp loads, or a CLIP as
    open_clip has it."""

    model: flags.Model
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help="The folder or .gguf file to write.")]
    to: Literal["hf", "gguf", "open_clip"]
    """The format."""
    dtype: Literal["f32", "f16", "bf16", "q8_0"] | None = None
    """Number format of the matrices, by default one that holds the stored numbers; q8_0 is for gguf alone."""


def run(options: Options) -> None:
    """Loads, converts, writes, and says where."""
    from keifu.checkpoints import convert

    convert(options.model, options.out, options.to, options.dtype)
    print(f"Wrote {options.out}.")


parse = flags.parser(Options, run, "keifu convert")
