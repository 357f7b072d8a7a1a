"""Writing ONNX: the Hugging Face or diffusers folder of a model without its weights, and its graphs.

Each graph is compared with PyTorch in onnxruntime, at other sizes than those of the example with which it was traced:
the exporter may write a size into a graph without a word.
"""

import importlib.util
import logging
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from keifu.checkpoints.hf.write import save
from keifu.checkpoints.onnx.graphs import BATCH, OnnxGraph, graphs_of
from keifu.errors import UserError, install, require_known

OPSET = 18
PACKAGES = "onnx", "onnxscript", "onnxruntime"
ENDINGS = {"f32": "", "f16": "_fp16", "int8": "_quantized"}  # what transformers.js asks for
TOLERANCES = {"f32": 1e-3, "f16": 0.1}  # largest difference to PyTorch, as a share of the largest number
OTHER_SIZES = ((1, 1, 4), (3, 5, 0))  # rows, new tokens, tokens before
MOST_BYTES = 2**31  # in one file


def check(dtype: str) -> None:
    """Raise `UserError` for an unknown number format, and if packages are missing."""
    require_known("number format of ONNX", dtype, [*ENDINGS])
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"The packages {', '.join(missing)} are missing: {install('onnx')} installs them.")


def write_onnx(model: nn.Module, tokenizer: Any, out: Path, dtype: str = "f32") -> None:
    """Write a model, which must be in float32, into the folder `out`. dtype: f32, f16 or int8.

    Raises `UserError` for a model that is not known, before something is written, and if packages are missing.
    """
    check(dtype)
    graphs = graphs_of(model.eval())
    size = sum(parameter.numel() for parameter in model.parameters()) * (2 if dtype == "f16" else 4)
    if size >= MOST_BYTES:
        raise UserError(f"The model has {size / 1e9:.1f} GB of weights, and a file of ONNX holds 2.1: choose f16.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        place = Path(folder)
        save(model, tokenizer, place)
        for weights in place.rglob("*.safetensors*"):
            weights.unlink()
        for graph in graphs:
            _write(graph, place, dtype)
        shutil.copytree(place, out, dirs_exist_ok=True)


class Halved(nn.Module):
    """A module in float16 whose inputs and outputs are float32."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.half()

    def forward(self, *inputs: Tensor) -> Any:
        outputs = self.module(*(x.half() if x.is_floating_point() else x for x in inputs))
        return tuple(x.float() for x in outputs) if isinstance(outputs, tuple) else outputs.float()


@torch.no_grad()
def _write(graph: OnnxGraph, place: Path, dtype: str) -> None:
    """Write one graph as a file, and compare it."""
    file = place / f"{graph.file}{ENDINGS[dtype]}.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    module = Halved(graph.module) if dtype == "f16" else graph.module
    inputs = graph.example(2, 4, 3)
    batch = Dim(BATCH)
    sizes = [{i: batch if name == BATCH else Dim.DYNAMIC for i, name in graph.sizes(each).items()} for each in inputs]
    plain = file if dtype != "int8" else file.with_suffix(".float32")
    _export(module, inputs, sizes, graph.outputs, plain)
    if dtype == "int8":
        _quantise(plain, file)
        plain.unlink()
    for size in OTHER_SIZES:
        _compare(file, module, graph.example(*size), TOLERANCES.get(dtype))


def _export(
    module: nn.Module, inputs: dict[str, Tensor], sizes: list[Any], outputs: tuple[str, ...], file: Path
) -> None:
    """Trace a module and write its graph."""
    fixed = [name for name in inputs if not name.startswith("past_")]
    caches = tuple(sizes[len(fixed) :])  # the module's *past is one argument
    shapes = (*sizes[: len(fixed)], *([caches] if caches else []))
    if isinstance(module, Halved):
        shapes = (tuple(sizes),)  # its *inputs
    for name in ("torch.onnx", "torch.export"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            module.eval(), tuple(inputs.values()), dynamo=True, input_names=[*inputs], output_names=[*outputs],
            dynamic_shapes=shapes, opset_version=OPSET, external_data=False, verbose=False,
        )  # fmt: skip
        program.save(str(file))


def _quantise(plain: Path, file: Path) -> None:
    """Write the matrices of a graph in int8, with a scale each; inputs get theirs as they are computed. Convolutions
    stay float32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # pyright: ignore[reportMissingImports]

    logging.getLogger().disabled, before = True, logging.getLogger().disabled  # it warns of a step that is not needed
    try:
        quantize_dynamic(plain, file, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm", "Gather"])
    finally:
        logging.getLogger().disabled = before


def _compare(file: Path, module: nn.Module, inputs: dict[str, Tensor], tolerance: float | None) -> None:
    """Run a file in onnxruntime, and compare its outputs with the module's. tolerance None: only their shapes.

    Raises `UserError` if they differ.
    """
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = ", ".join(f"{name} {[*tensor.shape]}" for name, tensor in inputs.items() if not name.startswith("past_"))
    wrong = UserError(f"{file.name} does not compute what the model does for {given}: write the model as hf instead.")
    try:
        found: Any = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    except Exception as error:  # onnxruntime's errors have no class of their own in its interface
        raise wrong from error
    expected = module(*inputs.values())
    for theirs, ours in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        if theirs.shape != tuple(ours.shape):
            raise wrong
        most = max(1.0, float(ours.abs().max()))
        if tolerance is not None and not float(np.abs(theirs - ours.numpy()).max()) <= tolerance * most:
            raise wrong
