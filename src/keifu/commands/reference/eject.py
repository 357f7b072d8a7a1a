"""`keifu eject`: print a model as one file that needs torch alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from keifu.commands.shared import tables
from keifu.errors import UserError, unknown
from keifu.files import replacing
from keifu.folders import packaged
from keifu.models.sizes import published_sizes

OTHER_NAMES = {"mlp": "neurons", "perceptron": "neurons", "seq2seq": "attention"}  # file names that differ
# models of several parts, each of which has a file: their names are those of the parts
PIPELINES = {
    "latent_diffusion": ("clip.text", "diffusion.conditioned_unet", "diffusion.autoencoder_kl"),
    "unclip": ("unclip.prior", "unclip.decoder", "unclip.conditioning", "clip.text", "diffusion.ddpm"),
}


@dataclass(frozen=True)
class Options:
    """Print a model as one file that needs only torch. Copy it and change it.

    For ten landmarks it is an edition written by hand, with the training and a result. For every other model, and for
    published sizes and your own runs, keifu writes the code that the model executes.
    """

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None
    """Landmark (gpt2), file of a model (mixture.mixtral), published size (qwen3-0.6b), or a model that keifu loads: a
    run, a directory, a catalogue name. Default: list all."""
    weights: Path | None = None
    """For a model that keifu loads: write its weights into this file of safetensors, which the
    printed file reads."""


def run(options: Options) -> None:
    """Print the file, or list all names."""
    editions = {path.stem: path for path in sorted(packaged("examples/single").glob("*.py"))}
    if options.name is None:
        texts = {name: path.read_text(encoding="utf-8") for name, path in editions.items()}
        rows = [(name, text[3:].split(" in one file")[0]) for name, text in texts.items()]
        tables.show(("name", "landmark"), [*rows, *((name, "the model alone") for name in written_models())])
        return
    name = OTHER_NAMES.get(options.name, options.name.replace("-", "_"))
    if name in editions and options.weights is None:
        print(editions[name].read_text(encoding="utf-8"), end="")
        return
    print(model_file(options.name, options.weights), end="")


def written_models() -> list[str]:
    """Return the names of the models' files that keifu writes, those with sizes."""
    return [name for name in dict.fromkeys(size.model for size in published_sizes()) if not is_pipeline(name)]


def is_pipeline(name: str) -> bool:
    """Return whether a model's file consists of other models."""
    return name.rpartition(".")[2] in PIPELINES


def model_file(name: str, weights: Path | None) -> str:
    """Return the file of a model: `name` is a file, a size, or anything that keifu loads."""
    from importlib import import_module

    from keifu.eject.models import eject

    sizes, model_names = {size.name: size.model for size in published_sizes()}, written_models()
    models = {name: name for name in model_names} | {name.rpartition(".")[2]: name for name in model_names}
    short = name.replace("-", "_")
    kind = sizes.get(name, short).rpartition(".")[2]
    if parts := PIPELINES.get(kind):
        raise UserError(f"{name} consists of models that have a file each: keifu eject {', '.join(parts)}.")
    if weights is None and name in sizes:
        return eject(sizes[name], import_module(f"keifu.models.{sizes[name]}").SIZES[name], name)
    if weights is None and short in models:
        origin = import_module(f"keifu.models.{models[short]}")
        return eject(models[short], next(iter(origin.SIZES.values())), name)
    editions = (path.stem for path in packaged("examples/single").glob("*.py"))
    return loaded_file(name, weights, [*sorted(editions), *OTHER_NAMES, *models, *sizes])


def loaded_file(name: str, weights: Path | None, names: list[str]) -> str:
    """Return the file of a model that keifu loads, and write its weights."""
    import torch
    from safetensors.torch import save_file

    from keifu import checkpoints
    from keifu.checkpoints.hub import may_be_model
    from keifu.checkpoints.registry import model_name
    from keifu.data.catalogue import catalogue
    from keifu.eject.models import eject

    if not (may_be_model(Path(name)) or name in catalogue.CATALOGUE or "/" in name or Path(name).suffix == ".gguf"):
        raise unknown("model", name, [*names, *catalogue.MODELS])
    model: Any = checkpoints.load_model(name, dtype=torch.float32)
    text = eject(model_name(model.config), model.config, name)
    if weights is not None:
        tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        with replacing(weights) as temporary:
            save_file(tensors, temporary)
    return text
