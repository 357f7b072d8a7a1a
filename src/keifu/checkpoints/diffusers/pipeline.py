"""diffusers' directory layout: a model in its folder, or a pipeline with a folder for each component.

A model's config.json names its class; a pipeline's model_index.json names the classes of its components. A scheduler is
not a model: its file becomes part of the config of its network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from keifu.checkpoints.hf.read import WEIGHTS as TRANSFORMERS_WEIGHTS, source_of, weight_files
from keifu.checkpoints.hf.weight_names import Link
from keifu.checkpoints.plan import Source
from keifu.checkpoints.registry import FAMILIES, Family, read_config
from keifu.errors import UserError, require_known, unknown
from keifu.untrusted import read_json_object

PIPELINE, CONFIG, WEIGHTS = "model_index.json", "config.json", "diffusion_pytorch_model.safetensors"
SCHEDULER, TOKENIZER, PIXELS = "scheduler", "tokenizer", "feature_extractor"
# part → its description file, if that is not config.json
FILES = {TOKENIZER: "tokenizer_config.json", PIXELS: "preprocessor_config.json"}
FILES |= {f"{part}scheduler": "scheduler_config.json" for part in ("", "prior_", "decoder_", "super_res_")}


class PipelineFiles(NamedTuple):
    """Files of a pipeline of several models: the model type of each part with weights, other parts, and the
    parts that may be missing."""

    models: Mapping[str, str]
    other_parts: tuple[str, ...]
    optional: tuple[str, ...] = ()


LATENT, UNCLIP, SIMPLE = "StableDiffusionPipeline", "UnCLIPPipeline", "UNet2DConditionModel/simple"
DIT, TRANSFORMER, LABELS = "DiTPipeline", "DiTTransformer2DModel", "id2label"
_LATENT = PipelineFiles(
    {"text_encoder": "clip_text_model", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}, (SCHEDULER,)
)
_UNCLIP = PipelineFiles(
    {
        "text_encoder": "clip_text_model", "text_proj": "UnCLIPTextProjModel", "decoder": SIMPLE,
        "prior": "PriorTransformer", "image_encoder": "clip_vision_model", "super_res_first": "UNet2DModel",
        "super_res_last": "UNet2DModel",
    },
    ("decoder_scheduler", "prior_scheduler", "super_res_scheduler", PIXELS),
    ("prior", "prior_scheduler", "image_encoder", PIXELS, "super_res_first", "super_res_last", "super_res_scheduler"),
)  # fmt: skip
_DIT = PipelineFiles({"transformer": TRANSFORMER, "vae": "AutoencoderKL"}, (SCHEDULER,), ("vae",))
_NETWORK = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
KINDS = {name: LATENT for name in (LATENT, "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline")}
KINDS |= {UNCLIP: UNCLIP, "UnCLIPImageVariationPipeline": UNCLIP, DIT: DIT}
PIPELINES = {LATENT: _LATENT, UNCLIP: _UNCLIP, DIT: _DIT}
OF_TRANSFORMERS = ("text_encoder", "image_encoder")
# parts of a latent diffusion model that do not draw
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
LIBRARIES = {"text_proj": "unclip"}  # the library that diffusers (to 0.33) names for this class
VERSION = "0.30.0"  # version of diffusers with this layout


def is_diffusers(path: Path) -> bool:
    """Return whether a folder has diffusers' layout."""
    if (path / PIPELINE).exists():
        return True
    return (path / CONFIG).exists() and "_class_name" in read_json_object(path / CONFIG)


def open_diffusers(path: Path) -> Source:
    """Open the model in a folder: a pipeline of a network and its scheduler, a pipeline of several models, or a network
    alone.

    Raises UserError if a pipeline lacks a part, or if keifu does not support the pipeline or model.
    """
    if not (path / PIPELINE).exists():
        alone = "There is no scheduler next to this network: DDPM's noise is assumed."
        if _model_type(read_json_object(path / CONFIG)) == TRANSFORMER:
            return _pipeline(path, DIT, {"transformer": path / CONFIG}, {}, (alone,))
        return _network(path, path, {}, (alone,))
    index = read_json_object(path / PIPELINE)
    class_name = str(index.get("_class_name"))
    require_known("diffusers pipeline", class_name, [*KINDS, *_NETWORK])
    if class_name in _NETWORK:
        files = _files(path, class_name, ("unet", SCHEDULER))
        return _network(path, path / "unet", {SCHEDULER: read_json_object(files[SCHEDULER])}, ())
    pipeline = PIPELINES[KINDS[class_name]]
    part_names = (*pipeline.models, *pipeline.other_parts)
    there = [part for part in part_names if part not in pipeline.optional or any(index.get(part) or ())]
    files = _files(path, class_name, there if KINDS[class_name] == DIT else (*there, TOKENIZER))
    left_out = [part for part in LEFT_OUT if any(index.get(part) or ()) and part not in part_names]
    notes = (f"Left out, since they do not draw: {', '.join(left_out)}.",) if left_out else ()
    labels = {LABELS: index[LABELS]} if LABELS in index else {}
    return _pipeline(path, KINDS[class_name], {part: files[part] for part in there}, labels, notes)


def _files(path: Path, class_name: str, parts: Sequence[str]) -> dict[str, Path]:
    """Return the description file of each part. Raises UserError that names the missing ones."""
    files = {part: path / part / FILES.get(part, CONFIG) for part in parts}
    missing_parts = [f"{part} ({file.relative_to(path)})" for part, file in files.items() if not file.exists()]
    if missing_parts:
        raise UserError(f"{path} is a {class_name} and lacks its {' and its '.join(missing_parts)}.")
    return files


def _network(path: Path, folder: Path, extra: Mapping[str, Any], notes: tuple[str, ...]) -> Source:
    """Open a network in its folder. extra: settings of its config from the files of other parts."""
    json = read_json_object(folder / CONFIG)
    model_type = _model_type(json)
    if model_type not in FAMILIES or not _is_network(model_type):
        network_names = [name for name in FAMILIES if _is_network(name) and name != SIMPLE]
        raise unknown("model of diffusers", model_type, network_names)
    family, config = read_config({**json, **extra, "model_type": model_type}, str(folder / CONFIG))
    notes = notes if "/" in family.files[0] else ()  # the notes are about a network outside a pipeline
    return source_of(path, "diffusers", family, config, dict.fromkeys(weight_files(folder, WEIGHTS), ""), notes)


def _is_network(model_type: str) -> bool:
    return model_type not in PIPELINES and diffusers_files(FAMILIES[model_type])


def _model_type(json: Mapping[str, Any]) -> str:
    """Return the type of a model: its class name. UNet2DConditionModel is two networks with different blocks, with two
    names."""
    model_type = str(json.get("_class_name", json.get("model_type")))
    blocks = [str(json.get("mid_block_type")), *(json.get("down_block_types") or ())]
    simple = model_type == "UNet2DConditionModel" and any("Simple" in name for name in blocks)
    if model_type == "Transformer2DModel" and json.get("norm_type") == "ada_norm_zero" and json.get("patch_size"):
        return TRANSFORMER  # the name in DiT's first published files
    return SIMPLE if simple and not any("CrossAttn" in name and "Simple" not in name for name in blocks) else model_type


def _pipeline(
    path: Path, model_type: str, files: Mapping[str, Path], extra: Mapping[str, Any], notes: tuple[str, ...]
) -> Source:
    """Open a pipeline of several models: their tensors, each with the name of its part as prefix. extra: settings of
    the pipeline itself."""
    merged_config, models = dict[str, Any]({"model_type": model_type, **extra}), PIPELINES[model_type].models
    for part, file in files.items():
        merged_config[part] = read_json_object(file)
        if part in models:
            if (part_type := _model_type(merged_config[part])) != models[part]:
                raise UserError(f"{file} describes a {part_type}, and what is implemented as {part} is {models[part]}.")
            if part_type != TRANSFORMER:
                read_config({**merged_config[part], "model_type": part_type}, str(file))
    family, config = read_config(merged_config, str(path))
    weights = {
        file: f"{part}." for part in files if part in models
        for file in weight_files(files[part].parent, TRANSFORMERS_WEIGHTS if part in OF_TRANSFORMERS else WEIGHTS)
    }  # fmt: skip
    source = source_of(path, "diffusers", family, config, weights, notes, path / TOKENIZER)
    return replace(source, names=tower_names(family, source.stored))


def tower_names(family: Family, stored: Mapping[str, Any]) -> dict[str, str]:
    """Return the family's weight names, adjusted to files in which the tensors of CLIP's towers lack a prefix."""
    table = dict(family.names or {})
    for part, prefix in (("text_encoder.", "text_model."), ("image_encoder.", "vision_model.")):
        if not any(name.startswith(part + prefix) for name in stored):
            table = {ours: theirs.replace(part + prefix, part) for ours, theirs in table.items()}
    return table


def diffusers_files(family: Family) -> bool:
    """Return whether this family's files are diffusers'."""
    return PurePosixPath(family.files[1]).name == WEIGHTS


def weight_places(family: Family, links: Sequence[Link]) -> dict[str, list[Link]]:
    """Return the links of the tensors of each file, by the tensors' names in that file."""
    if family.model_type not in PIPELINES:
        return {family.files[1]: [*links]}
    links_of: dict[str, list[Link]] = {}
    for link in links:
        part = link.theirs[0].partition(".")[0]
        file_name = f"{part}/{TRANSFORMERS_WEIGHTS if part in OF_TRANSFORMERS else WEIGHTS}"
        there = tuple(name.removeprefix(f"{part}.") for name in link.theirs)
        links_of.setdefault(file_name, []).append(replace(link, theirs=there))
    return links_of


def json_files(config: Mapping[str, Any], dtype: str) -> dict[str, dict[str, Any]]:
    """Return every JSON file of a network or a pipeline by its path. dtype: dtype written into transformers'
    configs."""
    model_type = config["model_type"]
    if model_type in PIPELINES:
        return _of_pipeline(model_type, config, dtype)
    if SCHEDULER not in config:
        return {CONFIG: _describe(config, dtype)}
    scheduler = config[SCHEDULER]
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", model_type]}
    index[SCHEDULER] = ["diffusers", scheduler["_class_name"]]
    files = {f"unet/{CONFIG}": _describe(config, dtype), f"{SCHEDULER}/{FILES[SCHEDULER]}": _with_version(scheduler)}
    return files | {PIPELINE: _with_version(index)}


def _of_pipeline(model_type: str, config: Mapping[str, Any], dtype: str) -> dict[str, dict[str, Any]]:
    """Return the JSON files of a pipeline of several models. A part that is None appears only in the index."""
    files, index = dict[str, Any](), dict[str, Any]({"_class_name": model_type})
    for part in PIPELINES[model_type].models:
        if file := config[part]:
            files[f"{part}/{CONFIG}"] = content = _describe(file, dtype)
            library = "transformers" if part in OF_TRANSFORMERS else LIBRARIES.get(part, "diffusers")
            index[part] = [library, (content.get("architectures") or [content.get("_class_name")])[0]]
    for part in PIPELINES[model_type].other_parts:
        if file := config[part]:
            files[f"{part}/{FILES[part]}"] = file if part == PIXELS else _with_version(file)
            class_names = ["transformers", file["image_processor_type"]] if part == PIXELS else None
            index[part] = class_names or ["diffusers", file["_class_name"]]
    if model_type == DIT:
        index |= {"vae": index.get("vae", [None, None])} | ({LABELS: config[LABELS]} if LABELS in config else {})
        return files | {PIPELINE: _with_version(index)}
    index[TOKENIZER] = ["transformers", "PreTrainedTokenizerFast"]
    if model_type == LATENT:
        index |= dict.fromkeys(LEFT_OUT, [None, None]) | {"requires_safety_checker": False}
    return files | {PIPELINE: _with_version(index)}


def _with_version(content: Mapping[str, Any]) -> dict[str, Any]:
    return {**content, "_diffusers_version": VERSION}


def _describe(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the config.json of one model, diffusers' or transformers'."""
    if "architectures" in config:
        return {**config, "dtype": dtype, "torch_dtype": dtype}
    fields = {name: value for name, value in config.items() if name not in ("model_type", SCHEDULER)}
    return {"_class_name": config["model_type"].partition("/")[0], "_diffusers_version": VERSION, **fields}
