"""diffusers' layout: a model's own folder, and a pipeline's, with a folder for each of its parts; knows no layers.

A model's config.json tells its class, a pipeline's model_index.json the classes of its parts. A scheduler is no model:
its file is read into the config of the network that it belongs to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from keifu.checkpoints.families import FAMILIES, Family, read_config
from keifu.checkpoints.huggingface import WEIGHTS as OF_TRANSFORMERS
from keifu.checkpoints.huggingface import read_json, source_of, weight_files
from keifu.checkpoints.names import Link
from keifu.checkpoints.source import Source
from keifu.errors import UserError, unknown

PIPELINE, CONFIG, WEIGHTS = "model_index.json", "config.json", "diffusion_pytorch_model.safetensors"
SCHEDULER, TOKENIZER = "scheduler", "tokenizer"
# pipeline -> the file of each of its parts that says what it is
_NETWORK = {"unet": CONFIG, SCHEDULER: "scheduler_config.json"}
_LATENT = {"text_encoder": CONFIG, TOKENIZER: "tokenizer_config.json", "vae": CONFIG} | _NETWORK
LATENT = "StableDiffusionPipeline"
PARTS = {"DDPMPipeline": _NETWORK, "DDIMPipeline": _NETWORK, "PNDMPipeline": _NETWORK} | {
    kind: _LATENT for kind in (LATENT, "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")
}
# the parts of a latent diffusion that have weights, and the kind of each
MODELS = {"text_encoder": "clip_text_model", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # parts that do not draw
VERSION = "0.30.0"  # of diffusers, whose layout this is


def is_diffusers(path: Path) -> bool:
    """Whether a folder has diffusers' layout."""
    if (path / PIPELINE).exists():
        return True
    return (path / CONFIG).exists() and "_class_name" in read_json(path / CONFIG)


def open_diffusers(path: Path) -> Source:
    """The model in a folder: a pipeline of a network and its scheduler, one of latent diffusion, or a network alone.

    A pipeline that lacks a part, and a pipeline or model that keifu has none of, is a `UserError` that names it.
    """
    if not (path / PIPELINE).exists():
        return _network(path, path, {}, ("There is no scheduler beside this network: DDPM's noise is assumed.",))
    index = read_json(path / PIPELINE)
    kind = str(index.get("_class_name"))
    if kind not in PARTS:
        raise unknown("diffusers pipeline", kind, PARTS)
    files = {part: path / part / file for part, file in PARTS[kind].items()}
    missing = [f"{part} ({file.relative_to(path)})" for part, file in files.items() if not file.exists()]
    if missing:
        raise UserError(f"{path} is a {kind} and lacks its {' and its '.join(missing)}.")
    if PARTS[kind] is _NETWORK:
        return _network(path, path / "unet", {SCHEDULER: read_json(files[SCHEDULER])}, ())
    left_out = [part for part in LEFT_OUT if any(index.get(part) or ())]
    notes = (f"Left out, since they do not draw: {', '.join(left_out)}.",) if left_out else ()
    return _latent(path, {part: file for part, file in files.items() if part != TOKENIZER}, notes)


def _network(path: Path, folder: Path, beside: Mapping[str, Any], notes: tuple[str, ...]) -> Source:
    """A network in its folder; `beside` is what its config takes from the files of other parts."""
    json = read_json(folder / CONFIG)
    known = [kind for kind, family in FAMILIES.items() if of_diffusers(family) and kind != LATENT]
    kind = str(json.get("_class_name"))
    if kind not in known:
        raise unknown("model of diffusers", kind, known)
    family, config = read_config({**json, **beside, "model_type": kind}, str(folder / CONFIG))
    return source_of(path, "diffusers", family, config, weight_files(folder, WEIGHTS), notes if _in(family) else ())


def _latent(path: Path, files: Mapping[str, Path], notes: tuple[str, ...]) -> Source:
    """A pipeline of latent diffusion: its three models' tensors, each under the name of its part."""
    whole: dict[str, Any] = {"model_type": LATENT}
    for part, file in files.items():
        whole[part] = read_json(file)
        if part != SCHEDULER:
            kind = whole[part].get("_class_name", whole[part].get("model_type"))
            if kind != MODELS[part]:
                raise UserError(f"{file} describes a {kind}, and what is implemented as {part} is {MODELS[part]}.")
            read_config({**whole[part], "model_type": kind}, str(file))
    family, config = read_config(whole, str(path))
    weights = {
        file: f"{part}."
        for part in MODELS
        for file in weight_files(path / part, OF_TRANSFORMERS if part == "text_encoder" else WEIGHTS)
    }
    source = source_of(path, "diffusers", family, config, [*weights], notes, weights, path / TOKENIZER)
    return replace(source, names=text_names(family, source.stored))


def text_names(family: Family, stored: Mapping[str, Any]) -> dict[str, str]:
    """The family's names, and those of the text's encoder without their prefix where the file has them so."""
    prefix, table = "text_encoder.text_model.", dict(family.names or {})
    if any(name.startswith(prefix) for name in stored):
        return table
    return {ours: theirs.replace(prefix, "text_encoder.") for ours, theirs in table.items()}


def of_diffusers(family: Family) -> bool:
    """Whether this family's files are diffusers'."""
    return PurePosixPath(family.files[1]).name == WEIGHTS


def _in(family: Family) -> bool:
    """Whether this family's files lie in a folder of a pipeline."""
    return len(PurePosixPath(family.files[0]).parts) > 1


def weight_places(family: Family, found: Sequence[Link]) -> dict[str, list[Link]]:
    """The file of each group of tensors, and the tensors by their names there."""
    if family.model_type != LATENT:
        return {family.files[1]: [*found]}
    places: dict[str, list[Link]] = {}
    for link in found:
        part = link.theirs[0].partition(".")[0]
        place = f"{part}/{OF_TRANSFORMERS if part == 'text_encoder' else WEIGHTS}"
        there = tuple(name.removeprefix(f"{part}.") for name in link.theirs)
        places.setdefault(place, []).append(replace(link, theirs=there))
    return places


def json_files(config: Mapping[str, Any], dtype: str) -> dict[str, dict[str, Any]]:
    """Every JSON file of a network, or of a pipeline, by its place; `dtype` is what transformers' models are in."""
    kind = config["model_type"]
    if kind == LATENT:
        parts = {f"{part}/{CONFIG}": _described(config[part], dtype) for part in MODELS}
        index = {part: ["diffusers", kind] for part, kind in MODELS.items()}
        theirs = {"text_encoder": "CLIPTextModel", TOKENIZER: "PreTrainedTokenizerFast"}
        index |= {part: ["transformers", kind] for part, kind in theirs.items()} | dict.fromkeys(LEFT_OUT, [None, None])
        return parts | _pipeline(LATENT, config[SCHEDULER], {**index, "requires_safety_checker": False})
    if SCHEDULER not in config:
        return {CONFIG: _described(config, dtype)}
    network = _described({name: value for name, value in config.items() if name != SCHEDULER}, dtype)
    return {f"unet/{CONFIG}": network} | _pipeline("DDPMPipeline", config[SCHEDULER], {"unet": ["diffusers", kind]})


def _pipeline(kind: str, scheduler: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    version = {"_diffusers_version": VERSION}
    index = {"_class_name": kind, **version, **parts, SCHEDULER: ["diffusers", scheduler["_class_name"]]}
    return {f"{SCHEDULER}/scheduler_config.json": {**scheduler, **version}, PIPELINE: index}


def _described(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config.json of one model, diffusers' or transformers'."""
    if "architectures" in config:
        return {**config, "dtype": dtype, "torch_dtype": dtype}
    rest = {name: value for name, value in config.items() if name != "model_type"}
    return {"_class_name": config["model_type"], "_diffusers_version": VERSION, **rest}
