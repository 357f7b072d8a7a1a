"""Every model that keifu knows, by the model_type of its config.json: the one place that lists them; knows no files.

A new model costs a line in `FAMILIES`.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from keifu.checkpoints.dialects import Dialect
from keifu.checkpoints.names import Table
from keifu.checkpoints.own import check_types, from_json, to_json
from keifu.errors import UserError, unknown
from keifu.models import (
    _open_clip,
    autoencoder_kl,
    bert,
    clip,
    clip_image,
    clip_text,
    conditioned_unet,
    dalle,
    ddpm,
    discrete_vae,
    gpt1,
    gpt2,
    gpt3,
    latent_diffusion,
    llama,
    mlp,
    palm,
    perceptron,
    seq2seq,
    transformer,
    unclip,
    unclip_conditions,
    unclip_decoder,
    unclip_prior,
)

# What any published config may say that changes the numbers and is not implemented; absent or equal to this is fine.
UNSUPPORTED: Mapping[str, Any] = {"quantization_config": None}

Aliases = Callable[[Any], Mapping[str, tuple[str, ...]]]
_PLAIN = Dialect()


def _tie(config: Any, tied: bool) -> Any:
    return replace(config, tied=tied)


@dataclass(frozen=True)
class Family:
    """One model_type: how its config is read and written, and how its weights are called.

    `module` is the model's file; `prefix` may be missing from all names of a file; `not_weights` are names that old
    files hold beside the weights; `unsupported` are settings and the value of each that is implemented. `aliases`
    gives, for a Config, the other names that a file may have for a matrix which serves in several places. `dialect` is
    what some files do besides. `inside` is where the model has the decoder that `tied` speaks of, and `tie` the Config
    with its head tied to the embedding, or not. `files` are the names of the config and of the weights in a directory.
    """

    module: Any
    model_type: str
    read: Callable[[dict[str, Any]], Any]
    write: Callable[[Any], dict[str, Any]]
    names: Table
    prefix: str = ""
    not_weights: tuple[str, ...] = ()
    unsupported: Mapping[str, Any] = field(default_factory=dict)
    writes_text: bool = True
    aliases: Aliases | None = None
    dialect: Dialect = _PLAIN
    inside: str = ""
    files: tuple[str, str] = ("config.json", "model.safetensors")
    tie: Callable[[Any, bool], Any] = _tie

    @property
    def tied_by_name(self) -> bool:
        """Whether the model has a head that may be the embedding: its Config has `tied` then."""
        return self.names is not None and f"{self.inside}head" in self.names

    def table(self, json: Mapping[str, Any]) -> Table:
        """The names of weights as files of this config.json have them."""
        if self.names is None or not {*json.get("architectures", ())} & {*self.dialect.without_prefix}:
            return self.names
        return {ours: theirs.removeprefix(self.prefix) for ours, theirs in self.names.items()}


def _published(module: Any, aliases: Aliases | None = None, dialect: Dialect = _PLAIN) -> list[Family]:
    """One family for each model_type of a file whose model others know too, and one for what only keifu can build."""
    shared = {
        "module": module,
        "names": module.WEIGHT_NAMES,
        "prefix": module.PREFIX,
        "not_weights": module.NOT_WEIGHTS,
        "unsupported": module.UNSUPPORTED,
        "aliases": aliases,
        "dialect": dialect,
    }
    known = [
        Family(model_type=kind, read=module.from_published, write=module.to_published, **shared)
        for kind in module.MODEL_TYPES
    ]
    return [*known, replace(_own(module), **shared, writes_text=True)]


def _own(module: Any) -> Family:
    """A family in keifu's own terms: every field of the Config under its own name, every weight under its own."""
    kind = f"keifu_{_name(module)}"
    read, write = partial(from_json, module.Config), partial(_write_own, kind)
    return Family(module, kind, read, write, names=None, writes_text=False)


def _write_own(kind: str, config: Any) -> dict[str, Any]:
    return {"model_type": kind, "architectures": ["keifu"], **to_json(config)}


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _files(family: Family, published: tuple[str, str]) -> tuple[str, str]:
    return published if family.model_type in family.module.MODEL_TYPES else family.files


_MLP = Family(mlp, "keifu_mlp", mlp.from_published, mlp.to_published, mlp.WEIGHT_NAMES, writes_text=False)
_BERT = Dialect(bert.IN_FILE, bert.COPIES, bert.OLD_ENDINGS, bert.WITHOUT_PREFIX)
_CLIP, _OWN_CLIP = _published(clip)
_SEEING = Dialect(clip_image.IN_FILE, without_prefix=clip_image.WITHOUT_PREFIX)
_OPEN_CLIP = replace(
    _CLIP, model_type="open_clip", names=_open_clip.WEIGHT_NAMES, not_weights=_open_clip.NOT_WEIGHTS,
    read=_open_clip.from_open_clip, write=_open_clip.to_open_clip, files=_open_clip.FILES,
)  # fmt: skip
_NETWORK = ("config.json", "diffusion_pytorch_model.safetensors")  # of diffusers
_PIPELINE = ("model_index.json", _NETWORK[1])
_AUTOENCODER = Dialect(old_endings=autoencoder_kl.OLD_ENDINGS)
_ALONE = [*_published(autoencoder_kl, dialect=_AUTOENCODER), *_published(conditioned_unet)]
_ALONE += [each for part in (unclip_prior, unclip_decoder, unclip_conditions) for each in _published(part)]
_DDPM, _OWN_DDPM = _published(ddpm, dialect=Dialect(old_endings=ddpm.OLD_ENDINGS))
_ALL = [
    *_published(bert, dialect=_BERT),
    *_published(gpt1),
    *_published(gpt2),
    *_published(gpt3),
    *_published(palm),
    *_published(llama),
    *_published(transformer, transformer.aliases),
    _MLP,
    _own(perceptron),
    replace(_DDPM, writes_text=False, files=ddpm.FILES),
    replace(_OWN_DDPM, writes_text=False),
    *(replace(each, writes_text=False, files=_files(each, _NETWORK)) for each in _ALONE),
    *(replace(each, files=_files(each, _PIPELINE)) for each in _published(latent_diffusion, dialect=_AUTOENCODER)),
    *(replace(each, files=_files(each, _PIPELINE)) for each in _published(unclip)),
    _CLIP,
    _OPEN_CLIP,
    replace(_OWN_CLIP, names=_open_clip.WEIGHT_NAMES),  # which has names for a ResNet too
    *_published(clip_text, dialect=Dialect(clip_text.IN_FILE, without_prefix=clip_text.WITHOUT_PREFIX)),
    *(replace(family, writes_text=False) for family in _published(clip_image, dialect=_SEEING)),
    replace(_own(seq2seq), writes_text=True),
    replace(_own(dalle), writes_text=True),
    _own(discrete_vae),
]
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}


class _Published(dict[str, Any]):
    """A config.json: a field that is asked for and not there is an error that names it."""

    def __init__(self, content: Mapping[str, Any], where: str):
        super().__init__(content)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.where} has no field {key!r}, which a {self['model_type']!r} model needs.")


def read_config(json: Mapping[str, Any], where: str) -> tuple[Family, Any]:
    """The family and the Config that a config.json describes; `where` names the file in errors.

    An unknown model_type, a setting that is not implemented, a field that is missing or has a wrong value: `UserError`.
    """
    kind = json.get("model_type")
    if not isinstance(kind, str):
        raise UserError(f"{where} has no model_type, so nothing says which model it is.")
    if kind not in FAMILIES:
        raise unknown("model family (model_type)", kind, FAMILIES)
    family = FAMILIES[kind]
    check_settings(json, {**UNSUPPORTED, **family.unsupported}, where)
    try:
        config = family.read(_Published(json, where))
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{where} cannot be read as a {kind!r} model: {error}") from error
    check_types(config, where)
    return family, config


def check_settings(json: Mapping[str, Any], implemented: Mapping[str, Any], where: str) -> None:
    """Refuses a setting whose value is not the one that is implemented; an absent one is fine."""
    for name, fine in implemented.items():
        if json.get(name) is not None and json[name] != fine:
            raise UserError(f"{where} sets {name} to {json[name]!r}, which keifu does not implement; only {fine!r} is.")


def describe(config: Any) -> tuple[Family, dict[str, Any]]:
    """The family of a built model's Config and its config.json.

    That is a published model_type where one says all that the Config says, else keifu's own.
    """
    able = [family for family in FAMILIES.values() if isinstance(config, family.module.Config)]
    if not able:
        kind = f"{type(config).__module__}.{type(config).__name__}"
        raise UserError(f"{kind} is the Config of no model that can be saved.")
    for family in able:
        json = family.write(config)
        found = FAMILIES[json["model_type"]]
        if family.names is not None and _same(config, found.read(json)):
            return found, json
    family = FAMILIES[f"keifu_{_name(able[0].module)}"]
    return family, family.write(config)


def described_as(config: Any, kind: str) -> tuple[Family, dict[str, Any]]:
    """The family of that model_type and its config for a built model's; one that cannot say it all is a `UserError`."""
    family = FAMILIES[kind]
    if not isinstance(config, family.module.Config):
        raise UserError(f"The format {kind} has no {_name(sys.modules[type(config).__module__])}: use hf.")
    json = family.write(config)
    if not _same(config, family.read(json)):
        raise UserError(f"The format {kind} has no words for something in this model's config: use hf.")
    return family, json


def _same(config: Any, back: Any) -> bool:
    """Whether `back` says the same; None stands for a default that a published config spells out, and a field that the
    other kind of Config has not for its default."""
    said = {name: vars(back).get(name, getattr(type(config), name, None)) for name in vars(config)}
    return all(value is None or value == said[name] for name, value in vars(config).items())


def build(family: Family, config: Any, where: str) -> nn.Module:
    """The model on the meta device, without memory; sizes that do not fit each other are a `UserError`."""
    import torch

    try:
        with torch.device("meta"):
            return family.module.build(config)
    except (ValueError, RuntimeError) as error:  # PyTorch's own, where a size does not fit 64 bits
        raise UserError(f"{where} describes a model that cannot be built: {error}") from error
