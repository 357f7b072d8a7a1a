"""Reading Hugging Face directories: config.json, and safetensors files in one piece or in shards.

Nothing is ever unpickled. A directory that has only PyTorch's .bin files is refused with an explanation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from keifu.checkpoints.hf.stacked_experts import unstack, unstack_rows
from keifu.checkpoints.hf.task_heads import read_config
from keifu.checkpoints.plan import PLAIN, Source, StoredTensor
from keifu.checkpoints.registry import Family
from keifu.errors import UserError
from keifu.layers.lazy import Index
from keifu.models.hf.config import MODULES, SENTENCES
from keifu.untrusted import parse_json, plain_file, read_json, read_json_object

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIGS = {"config.json": None, "open_clip_config.json": "open_clip"}  # file → model_type, if the file itself has none
TEXT_PARTS = {  # multimodal model → the model_type of its text model
    "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text", "mistral3": "ministral3", "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
}  # fmt: skip
OTHER_PARTS = (
    "**visual.**", "**vision_tower.**", "**multi_modal_projector.**", "**embed_vision.**", "**audio_tower.**",
    "**embed_audio.**",
)  # fmt: skip
PREPROCESSOR = "preprocessor_config"  # image settings: name of their file, and of their field in the config
PROCESSOR = "processor_config"  # settings for prompts with pictures
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = PLAIN | {"I64": torch.int64}  # int64: counters, such as batch normalisation's


def open_directory(path: Path) -> Source:
    """Open the model in a directory. Its weights are memory-mapped and not yet read."""
    where = next((path / name for name in CONFIGS if (path / name).exists()), None)
    if where is None:
        run = ", which a run writes when it ends or is stopped" if (path / "recipe.json").exists() else ""
        raise UserError(f"{path} is no model: it holds no config.json{run or _nearest('config.json', path)}.")
    json = _with_preprocessor(where) | _modules(path)
    if not isinstance(json.get("model_type", ""), str):
        raise UserError(f"{where} has the model_type {str(json['model_type'])[:60]}, which must be a name.")
    if (model_type := TEXT_PARTS.get(json.get("model_type", ""))) and isinstance(json.get("text_config"), dict):
        return _text_part(path, json, model_type)
    family, config = read_config(json, str(where))
    return source_of(path, "Hugging Face", family, config, dict.fromkeys(weight_files(path, family.files[1]), ""))


def _text_part(path: Path, json: dict[str, Any], model_type: str) -> Source:
    """Open the text model of a multimodal model; the other parts are not read."""
    shared = {name: json[name] for name in ("quantization_config", "tie_word_embeddings") if json.get(name)}
    text = {**json["text_config"], **shared, "model_type": model_type}
    family, config = read_config(text, f"{path / 'config.json'}, text_config,")
    family = replace(family, not_weights=(*family.not_weights, *OTHER_PARTS))
    note = f"The text model of a {json['model_type']} model is read without its other parts."
    source = source_of(path, "Hugging Face", family, config, dict.fromkeys(weight_files(path), ""), (note,))
    names = {_text_name(name): name for name in source.stored}

    def read(name: str, index: Index = ()) -> Tensor:
        return source.read_part(names[name], index) if index else source.read(names[name])

    stored = {name: source.stored[theirs] for name, theirs in names.items()}
    return replace(source, stored=stored, read=read, part=read)


def _text_name(name: str) -> str:
    """Return the name that a tensor has in a file of the text model alone."""
    for prefix in ("model.language_model.", "language_model.model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.")


def source_of(
    path: Path, layout: str, family: Family, config: Any, files: Mapping[Path, str], notes: tuple[str, ...] = (),
    texts: Path | None = None,
) -> Source:  # fmt: skip
    """Open a model with this config and these safetensors files.

    files: each with a prefix for its tensors' names, if each part of the model has its files. texts: the tokenizer's
    folder, if it is not `path`.
    """
    opened = [(open_weights(file), prefix) for file, prefix in files.items()]
    owner = {prefix + name: (file, name) for file, prefix in opened for name in file.keys()}  # noqa: SIM118 (no dict)
    stored = {label: stored_of(file.get_slice(name)) for label, (file, name) in owner.items()}

    def read_stored(label: str, index: Index = ()) -> Tensor:
        file, name = owner[label]
        return file.get_slice(name)[index] if index else file.get_tensor(name)

    tokenizer = partial(_read_tokenizer, texts or path, family)
    names = "\n".join((family.names or {}).values())
    unstacked = unstack if "_slice" in names else partial(unstack_rows, leaf="rows" if "_rows" in names else "proj")
    stored, read_tensor = unstacked(stored, read_stored)
    return Source(
        path, layout, family, config, stored, read_tensor, tokenizer, family.names, notes=notes, part=read_tensor
    )


def _with_preprocessor(where: Path) -> dict[str, Any]:
    """Return a config, with the image settings of the file next to it."""
    model_type, json = CONFIGS[where.name], read_json_object(where)
    json |= {"model_type": model_type} if model_type else {}
    separate, processor_file = where.with_name(f"{PREPROCESSOR}.json"), where.with_name(f"{PROCESSOR}.json")
    if separate.exists():
        return json | {PREPROCESSOR: read_json_object(separate)}
    return json | {
        PREPROCESSOR: read_json_object(processor_file).get("image_processor") if processor_file.exists() else None
    }


def _modules(path: Path) -> dict[str, Any]:
    """Return the modules of a sentence-transformers folder, each with its config if it has one, and its settings. They
    say how sentence embeddings are made, or scores of a cross-encoder."""
    if not (listing := path / MODULES).exists():
        return {}
    modules = read_json(listing)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{listing} is not a list of modules.")
    for module in modules:
        folder = module.get("path", "")
        if not isinstance(folder, str) or (folder and Path(folder).name != folder):
            raise UserError(f"{listing} has the path {str(folder)[:99]!r}, and modules are folders inside {path}.")
        if folder and (config := path / folder / "config.json").exists():
            module["config"] = read_json_object(config)
    return {MODULES: modules} | ({SENTENCES: read_json_object(path / SENTENCES)} if (path / SENTENCES).exists() else {})


def weight_files(path: Path, weights: str = WEIGHTS) -> list[Path]:
    """Return the safetensors files of a directory. Raises UserError if one is missing, or if there are only weights of
    another kind."""
    if (path / weights).exists():
        return [path / weights]
    listing = path / f"{weights}.index.json"
    if listing.exists():
        index = read_json_object(listing).get("weight_map")
        if not isinstance(index, dict):
            raise UserError(f"{listing} has no weight_map, so it names no shards.")
        for name in index.values():
            if not isinstance(name, str) or not 0 < len(name) < 200 or Path(name).name != name:
                short_name = str(name)[:99]
                raise UserError(f"{listing} names the shard {short_name!r}, and shards are files of the same folder.")
        files = sorted({path / name for name in index.values()})
        if missing_files := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{path} lacks {len(missing_files)} of its {len(files)} shards: {', '.join(missing_files[:10])}."
            )
        return files
    if pickled := sorted(file.name for file in path.iterdir() if file.suffix in PICKLED):
        raise pickled_only(path, pickled)
    raise UserError(f"{path} holds no {weights}{_nearest(weights, path)}.")


def pickled_only(path: Path, names: Sequence[str]) -> UserError:
    """Return the error for weights that could only be unpickled, which could run any program."""
    where = path / "config.json"
    json = read_json_object(where) if where.exists() else {}
    architectures, library = json.get("architectures"), "diffusers" if "_class_name" in json else "transformers"
    reader = json.get("_class_name") or (
        architectures[0] if isinstance(architectures, list) and architectures else "AutoModelForCausalLM"
    )
    return UserError(
        f"{path} has only {', '.join(names[:3])}, which keifu never unpickles, since a pickle can run any program; if "
        f"you trust its makers, let {library} convert it: "
        f"{reader}.from_pretrained(DIRECTORY).save_pretrained(OUT, safe_serialization=True)."
    )


def _nearest(name: str, path: Path) -> str:
    near = get_close_matches(name, [file.name for file in path.iterdir()], n=1, cutoff=0.7)
    return f", but it does hold {near[0]}" if near else ""


def open_weights(path: Path) -> Any:
    """Open a safetensors file, memory-mapped. Raises UserError with the actual and expected size if it is truncated."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(plain_file(path), "pt")
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or corrupt: {_sizes(path) or f'{error}.'}") from error


def _sizes(path: Path) -> str:
    """Return a sentence that compares the size of a safetensors file with its header; "" if they agree or the header is
    invalid."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
        if size < 8 + header:
            return f"it has {size:,} bytes, and by its first eight the header alone has {header:,}."
        try:
            tensors = parse_json(file.read(header), path)
            ends = [entry["data_offsets"][1] for name, entry in tensors.items() if name != "__metadata__"]
            end = 8 + header + max(ends)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return ""
    return f"it has {size:,} bytes, and its header promises {end:,}." if end != size else ""


def stored_of(piece: Any) -> StoredTensor:
    """Describe a tensor of a safetensors file without reading it."""
    format = piece.get_dtype()
    return StoredTensor(tuple(piece.get_shape()), format, DTYPES.get(format))


def _read_tokenizer(path: Path, family: Family) -> Any:
    from keifu.data.tokenizers.load import load_tokenizer

    return load_tokenizer(path) if family.writes_text else None
