"""`keifu convert`: loads a model and writes it in a published format."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import tyro

from keifu.commands.shared import flags
from keifu.errors import UserError


@dataclass(frozen=True)
class Options:
    """Write a model as a Hugging Face directory, which transformers loads, as GGUF, which llama.cpp loads, as a page
    that runs it in a browser, as ONNX, which onnxruntime runs, or a CLIP as open_clip has it."""

    model: flags.Model
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help="The folder or .gguf file to write.")]
    to: Literal["hf", "gguf", "open_clip", "web", "onnx"] | None = None
    """Format; web is a folder with a page, and onnx one with graphs for onnxruntime. Unset: gguf if OUT ends in
    .gguf, else hf."""
    dtype: Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "int8"] | None = None
    """Number format of the matrices, by default one that holds the stored numbers, int8 for web and f32 for onnx. q8_0
    and the formats of 4 bits, q4_0 and q4_1, are for gguf alone, and int8 for web and onnx alone; onnx has no bf16."""
    single_file: bool = False
    """With --to web: write one HTML file, which a browser opens from a disk without a server."""
    replace: bool = False
    """Whether to write over the model that OUT holds."""


def run(options: Options) -> None:
    """Load and convert a model, write it, and print its path."""
    from keifu.checkpoints import convert
    from keifu.checkpoints.hub import may_be_model

    out = options.out
    if not options.replace and out.exists() and (out.is_file() or may_be_model(out)):
        raise UserError(f"{out} is there already: give another name, or write over it with --replace.")
    to = options.to or ("gguf" if out.suffix == ".gguf" else "hf")
    if options.single_file and to != "web":
        raise UserError(f"--single-file is for a page, and this writes {to}: add --to web.")
    if options.single_file and out.suffix != ".html":
        raise UserError(f"With --single-file OUT is a file that ends in .html, and {out} does not.")
    if to == "web":
        _write_page(options)
    elif to == "onnx":
        _write_onnx(options)
    else:
        convert(options.model, out, to, options.dtype)
    print(f"Wrote {out}.")


def _write_page(options: Options) -> None:
    """Write the model as a Hugging Face directory, and a page from that."""
    from keifu.checkpoints import convert
    from keifu.checkpoints.web import write_web

    int8 = options.dtype in (None, "int8")
    if options.dtype is not None and options.dtype.startswith("q"):
        raise UserError(f"A page cannot hold {options.dtype}: choose int8, f32, f16 or bf16.")
    with TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        convert(options.model, model, "hf", "f32" if int8 else options.dtype)
        write_web(model, options.out, Path(options.model).name, int8, options.single_file)


def _write_onnx(options: Options) -> None:
    """Write the model's graphs, in a Hugging Face directory without weights."""
    import torch

    from keifu.checkpoints.loading import load_to_convert
    from keifu.checkpoints.onnx.write import check, write_onnx

    dtype = options.dtype or "f32"
    check(dtype)
    write_onnx(*load_to_convert(options.model, torch.float32), options.out, dtype)
