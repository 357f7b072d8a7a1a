"""Loading, inspecting and converting models in any supported format."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from keifu.checkpoints.diffusers.pipeline import PIPELINE, is_diffusers, open_diffusers
from keifu.checkpoints.gguf.read import is_gguf, open_gguf
from keifu.checkpoints.gguf.write import PACKED, save_gguf
from keifu.checkpoints.hf.read import CONFIGS, INDEX, PICKLED, WEIGHTS, open_directory, pickled_only
from keifu.checkpoints.hf.write import MOVING, STAGE, save
from keifu.checkpoints.hub import locate
from keifu.checkpoints.lora.peft import base_of, is_adapter, load_adapter
from keifu.checkpoints.packing import fill_in_blocks, load_packed, pack_or_keep
from keifu.checkpoints.plan import LoadPlan, Report, Source, check_tokenizer, plan, report
from keifu.data.tokenizers.formats import GENERATION_CONFIG
from keifu.data.tokenizers.load import load_tokenizer
from keifu.devices import Choice, choose, choosing
from keifu.errors import UserError, require_known, unknown
from keifu.layers.lora import merge
from keifu.native.pack import OWN, formats
from keifu.processes import current
from keifu.threads import follow_load
from keifu.untrusted import reading

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def load(
    name: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    weights: str | None = None, allow_nonfinite: bool = False, predictions: bool = False,
) -> tuple[nn.Module, Any]:  # fmt: skip
    """Load a model with its weights, ready for evaluation, and its tokenizer.

    On a CPU, weights that need no conversion stay memory-mapped.

    Args:
        name: A keifu run or another Hugging Face directory, a folder of PEFT adapters (which are attached to their
            base), a .gguf file, a catalogue name such as "smollm2", or a hub id "owner/name".
        dtype: Type of the weights. None keeps the stored type, but a CPU computes float16 weights in float32, and
            bfloat16 weights too if it has no instructions for them and native code does not compute the model.
        device: "cpu", "cuda", "cuda:1" or "mps". None chooses a GPU if there is one (`devices.choose`).
        weights: "f32", "bf16", "int8", "int4" or "int4_pure" packs a language model for native code on a CPU
            (`keifu.native`): it returns logits and computes the steps of an engine, but cannot be trained. "own" packs
            it in the format that keeps the file's numbers, if native code has this format; on a GPU the linear layers
            of a GGUF file stay quantised, and are dequantised when they compute.
        allow_nonfinite: Whether to load weights with infinities.
        predictions: Whether to read the blocks that predict further tokens (multi-token prediction), which are
            otherwise left out.

    Returns:
        The model, and its tokenizer; the tokenizer is None for a model that writes no text.

    Raises:
        UserError: A file is damaged, a tensor is missing, extra or misshapen, a setting is not implemented, or a
            tokenizer does not fit. The message names it.

    Examples:
        >>> import keifu
        >>> model, tokenizer = keifu.load("smollm2")
        >>> type(model).__name__, tokenizer.encode("Hello")
        ('DecoderLM', [19556])
    """
    follow_load()
    device, path = _device_for(weights, device), locate(name)
    with choosing(Choice(allow_nonfinite=allow_nonfinite or None)), reading(path):
        return _load(name, path, dtype, device, weights, predictions)


def _load(
    name: str | Path,
    path: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    weights: str | None,
    predictions: bool,
) -> tuple[nn.Module, Any]:
    if is_adapter(path):
        model, tokenizer = load(base_of(path), dtype, device, predictions=predictions)
        tokenizer, model = _adapted(path, tokenizer), _adapted_model(model, path, weights)
    else:
        load_plan = plan(open_source(path), dtype, device, predictions)
        with ThreadPoolExecutor(1) as pool:  # another thread reads the tokenizer at the same time
            reading = pool.submit(load_plan.source.tokenizer)
            model = _fill(load_plan, device, weights)
            tokenizer = _recommended(name, reading.result())
    if tokenizer is not None:
        settings: Any = model.config
        check_tokenizer(tokenizer, settings.vocab_size)
    return model, tokenizer


def _device_for(weights: str | None, device: torch.device | str | None) -> torch.device:
    """Return the device of the model. Packed weights are for the CPU."""
    if weights in (None, OWN):
        return choose(device)
    formats(weights)
    target = choose(device or "cpu")
    if target.type != "cpu":
        raise UserError(f"Weights are packed for the CPU, not {target}: leave out weights={weights}, or the device.")
    return target


def load_model(
    name: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    weights: str | None = None, predictions: bool = False,
) -> nn.Module:  # fmt: skip
    """Return the model alone (see `load`), for weights without a tokenizer."""
    follow_load()
    device, path = _device_for(weights, device), locate(name)
    with reading(path):
        if is_adapter(path):
            return _adapted_model(load_model(base_of(path), dtype, device, predictions=predictions), path, weights)
        return _fill(plan(open_source(path), dtype, device, predictions), device, weights)


def _fill(load_plan: LoadPlan, device: torch.device, weights: str | None) -> nn.Module:
    if weights is None or (device.type != "cpu" and not current().is_replicated):
        return load_plan.fill(device)
    return load_packed(load_plan, weights) if device.type == "cpu" else fill_in_blocks(load_plan, device)


def _adapted_model(base: nn.Module, path: Path, weights: str | None) -> nn.Module:
    """Return the base with the adapters on its layers. For packed weights, merge the adapters first."""
    model = load_adapter(merge(base), path)
    return model if weights in (None, OWN) else pack_or_keep(merge(model), weights)


def inspect(name: str | Path, dtype: torch.dtype | None = None) -> Report:
    """Report what `load` would do: every tensor, its source tensors, and the settings. No weights are read."""
    return report(planned(name, dtype))


def convert(
    name: str | Path, out: str | Path, to: Literal["hf", "gguf", "open_clip"], dtype: str | None = None
) -> None:
    """Write a model in another format: "hf" (a Hugging Face directory), "gguf" (one file for llama.cpp), or for a CLIP
    model "open_clip" (a directory that open_clip loads).

    dtype: f32, f16, bf16 or, for gguf, q8_0, q4_0 and q4_1. None keeps the smallest type that represents the stored
    numbers exactly.
    """
    require_known("format", to, ["hf", "gguf", "open_clip"])
    packed = [name.lower() for name in PACKED]
    if dtype is not None and dtype not in (*DTYPES, *packed):
        raise unknown("number format", dtype, [*DTYPES, *packed])
    if to != "gguf" and dtype in packed:
        raise UserError(f"A Hugging Face directory cannot hold {dtype}; write it as gguf, or choose f32, f16 or bf16.")
    model, tokenizer = load_to_convert(name, None if dtype is None or to == "gguf" else DTYPES[dtype])
    if to == "gguf":
        save_gguf(model, tokenizer, Path(out), dtype)
    else:
        save(model, tokenizer, out, kind=None if to == "hf" else to)


def load_to_convert(name: str | Path, dtype: torch.dtype | None) -> tuple[nn.Module, Any]:
    """Load the model to convert, with adapters merged. dtype None: the type that represents every stored number
    exactly."""
    if is_adapter(locate(name)):
        model, tokenizer = load(name, dtype, "cpu")
        return merge(model), tokenizer
    load_plan = planned(name)
    return replace(load_plan, dtype=dtype or load_plan.exact).fill(), _recommended(name, load_plan.source.tokenizer())


def _recommended(name: str | Path, tokenizer: Any) -> Any:
    """Return the tokenizer with the catalogue's generation settings for this model, unless its files have their own."""
    if tokenizer is None or Path(name).expanduser().exists():
        return tokenizer
    from keifu.data.catalogue.catalogue import MODELS

    recommended = MODELS[str(name)].generation_config if str(name) in MODELS else {}
    if not recommended:
        return tokenizer
    return tokenizer.replace(generation_config={**recommended, **tokenizer.generation_config})


def _adapted(path: Path, base: Any) -> Any:
    """Return the tokenizer in the folder of adapters, or the base's if there is none. Its generation settings are the
    base's unless that folder has some."""
    if not (path / "tokenizer_config.json").exists():
        return base
    adapted = load_tokenizer(path)
    if base is None or (path / GENERATION_CONFIG).exists():
        return adapted
    return adapted.replace(generation_config=base.generation_config, stop_ids=adapted.stop_ids | base.stop_ids)


def planned(name: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> LoadPlan:
    """Return the plan that `load` would carry out on a device: a model on the meta device, and its opened file. Use it
    to inspect a model first."""
    path = locate(name)
    with reading(path):
        if is_adapter(path):
            base = planned(base_of(path), dtype, device)
            source = replace(base.source, tokenizer=lambda: _adapted(path, base.source.tokenizer()))
            notes = [*base.notes, f"The adapters of {path} are added to these tensors."]
            return replace(base, source=source, notes=notes)
        return plan(open_source(path), dtype, device)


def open_source(path: Path) -> Source:
    """Open a model's file or folder. Raises UserError for anything else."""
    if path.is_dir():
        if stage := next(path.glob(f"{STAGE}*/{MOVING}"), None):
            raise UserError(
                f"{path} has files of two models: a command that wrote it was interrupted. Run that command again, or "
                f"move the files of {stage.parent.name} into {path.name} and remove that folder."
            )
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 and not any((path / name).exists() for name in CONFIGS):
            return open_source(ggufs[0])
        if (path / "model.bin").exists() and not any((path / name).exists() for name in (WEIGHTS, INDEX)):
            return open_source(path / "model.bin")
        return open_diffusers(path) if is_diffusers(path) else open_directory(path)
    if path.name == "model.bin":
        from keifu.checkpoints.ctranslate2 import open_ctranslate2

        return open_ctranslate2(path)
    if path.name in (WEIGHTS, INDEX, PIPELINE, *CONFIGS):
        return open_source(path.parent)
    if path.suffix in PICKLED and path.suffix != ".ckpt":
        raise pickled_only(path.parent, [path.name])
    if path.suffix == ".gguf" or is_gguf(path):
        return open_gguf(path)
    if path.suffix == ".npz":
        from keifu.checkpoints.npz import open_npz

        return open_npz(path)
    if path.suffix in (".safetensors", ".ckpt"):
        from keifu.checkpoints.diffusers.single_file import open_single_file

        return open_single_file(path)
    raise UserError(f"{path} is no model: give a folder with config.json and model.safetensors, or a .gguf file.")
