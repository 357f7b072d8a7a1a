"""Registry of model families: how each model_type's config.json is read and written, and how its weights are named.

A model's file is imported when one of its model_types is asked for, and no other. A new model needs a line in `MODELS`,
and one in `_FILES` or `_WITHOUT_TEXT` if its files differ from most.
"""

from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cache, partial
from importlib import import_module
from typing import Any

from torch import nn

from keifu.checkpoints.hf.native_config import check_types, from_json
from keifu.checkpoints.hf.weight_names import Table
from keifu.errors import UserError
from keifu.layers.meta import on_meta
from keifu.models.hf.config import write_own

# Settings of any published config that are not implemented, with the value that changes nothing.
UNSUPPORTED: Mapping[str, Any] = {"quantization_config": None}

Aliases = Callable[[Any], Mapping[str, tuple[str, ...]]]


def _tie(config: Any, tied: bool) -> Any:
    return replace(config, tied=tied)


@dataclass(frozen=True)
class Family:
    """One model_type: how its config is read and written, and how its weights are called.

    `module` is the model's file; `prefix` may be missing from all names of a file, and is from the files of the
    architectures `without_prefix`; `not_weights` are tensors that are no weights, with fields of the Config in braces,
    `copies` tensors that repeat another one of the file, `old_endings` today's ending of a name and that of old files,
    and `old_beginnings` the same of its beginning. `full_precision` are tensors of the model that keep the file's type
    if it is wider than the others'. `in_file`:
    switches of the Config that are on where the file has a tensor, whatever its config says. `unsupported` are settings
    and the value of each that is implemented. `aliases` gives, for a Config, the other names that a file may have for a
    matrix which serves in several places. `inside` is where the model has the decoder that `tied` speaks of, and `tie`
    the Config with its head tied to the embedding, or not. `files` are the names of the config and of the weights in a
    directory.
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
    in_file: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)
    old_endings: Mapping[str, str] = field(default_factory=dict)
    old_beginnings: Mapping[str, str] = field(default_factory=dict)
    without_prefix: tuple[str, ...] = ()
    full_precision: tuple[str, ...] = ()
    inside: str = ""
    files: tuple[str, str] = ("config.json", "model.safetensors")
    tie: Callable[[Any, bool], Any] = _tie

    def table(self, json: Mapping[str, Any]) -> Table:
        """Return the names of weights as files of this config.json have them."""
        if self.names is None or not {*json.get("architectures", ())} & {*self.without_prefix}:
            return self.names
        return {ours: theirs.removeprefix(self.prefix) for ours, theirs in self.names.items()}


# Networks with a folder of their own in a pipeline of diffusers, and such pipelines: what their published files are.
_NETWORKS: tuple[str, ...] = (
    "diffusion.autoencoder_kl", "diffusion.conditioned_unet", "diffusion.sd3", "unclip.prior", "unclip.decoder",
    "unclip.conditioning",
)  # fmt: skip
_PIPELINES = ("diffusion.latent_diffusion", "diffusion.dit", "unclip.unclip")
_WITHOUT_TEXT = (
    *_NETWORKS, "mlp", "perceptron", "diffusion.ddpm", "diffusion.dit", "clip.image", "dalle.discrete_vae"
)  # fmt: skip
_FILES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(_NETWORKS, ("config.json", "diffusion_pytorch_model.safetensors")),
    **dict.fromkeys(_PIPELINES, ("model_index.json", "diffusion_pytorch_model.safetensors")),
}
# Fields of `Family` that a model's file may have.
OFFERED = (
    "PREFIX", "NOT_WEIGHTS", "UNSUPPORTED", "IN_FILE", "COPIES", "OLD_ENDINGS", "OLD_BEGINNINGS", "WITHOUT_PREFIX",
    "FULL_PRECISION", "aliases", "tie",
)  # fmt: skip

MODELS = {  # each model's file under keifu.models, and the model_types of its configs, keifu's own last
    "bert": ("bert", "keifu_bert"),
    "gpt1": ("openai-gpt", "keifu_gpt1"),
    "gpt2": ("gpt2", "keifu_gpt2"),
    "gpt3": ("gpt_neo", "keifu_gpt3"),
    "palm": ("cohere", "keifu_palm"),
    "llama": ("llama", "mistral", "qwen2", "keifu_llama"),
    "qwen3": ("qwen3", "keifu_qwen3"),
    "gemma3": ("gemma3_text", "keifu_gemma3"),
    "olmo2": ("olmo2", "keifu_olmo2"),
    "variants.smollm3": ("smollm3", "keifu_smollm3"),
    "variants.phi3": ("phi3", "keifu_phi3"),
    "variants.gemma2": ("gemma2", "keifu_gemma2"),
    "variants.granite": ("granite", "keifu_granite"),
    "variants.ministral": ("ministral", "ministral3", "keifu_ministral"),
    "variants.nanochat": ("nanochat", "keifu_nanochat"),
    "mixture.mixtral": ("mixtral", "keifu_mixtral"),
    "mixture.qwen3_moe": ("qwen3_moe", "keifu_qwen3_moe"),
    "mixture.olmoe": ("olmoe", "keifu_olmoe"),
    "mixture.deepseek_v3": ("deepseek_v3", "keifu_deepseek_v3"),
    "mixture.gpt_oss": ("gpt_oss", "keifu_gpt_oss"),
    "multimodal.llava": ("llava", "keifu_llava"),
    "multimodal.smolvlm": ("idefics3", "smolvlm", "keifu_smolvlm"),
    "hybrid.qwen3_next": ("qwen3_next", "keifu_qwen3_next"),
    "hybrid.qwen3_5": ("qwen3_5_text", "qwen3_5_moe_text", "keifu_qwen3_5"),
    "transformer": ("marian", "keifu_transformer"),
    "speech.whisper": ("whisper", "keifu_whisper"),
    "mlp": ("keifu_mlp",),
    "perceptron": ("keifu_perceptron",),
    "diffusion.ddpm": ("UNet2DModel", "keifu_ddpm"),
    "diffusion.autoencoder_kl": ("AutoencoderKL", "keifu_autoencoder_kl"),
    "diffusion.conditioned_unet": ("UNet2DConditionModel", "keifu_conditioned_unet"),
    "diffusion.dit": ("DiTPipeline", "keifu_dit"),
    "diffusion.llada": ("llada", "keifu_llada"),
    "diffusion.sd3": ("SD3Transformer2DModel", "keifu_sd3"),
    "unclip.prior": ("PriorTransformer", "keifu_unclip_prior"),
    "unclip.decoder": ("UNet2DConditionModel/simple", "keifu_unclip_decoder"),
    "unclip.conditioning": ("UnCLIPTextProjModel", "keifu_unclip_conditions"),
    "diffusion.latent_diffusion": ("StableDiffusionPipeline", "keifu_latent_diffusion"),
    "unclip.unclip": ("UnCLIPPipeline", "keifu_unclip"),
    "clip.clip": ("clip", "open_clip", "keifu_clip"),
    "clip.text": ("clip_text_model", "keifu_clip_text"),
    "clip.image": ("clip_vision_model", "keifu_clip_image"),
    "seq2seq": ("keifu_seq2seq",),
    "dalle.dalle": ("keifu_dalle",),
    "dalle.discrete_vae": ("keifu_discrete_vae",),
}


@cache
def families_of(name: str) -> dict[str, Family]:
    """Return the families of a model's file by their model_types; the file is imported for it.

    There is one for each form that others know too, and one for what only keifu can build, in keifu's own terms: every
    field of the Config under its own name.
    """
    module: Any = import_module(f"keifu.models.{name}")
    offered, generic = vars(module), MODELS[name][-1]
    shared: dict[str, Any] = {
        "module": module,
        "names": offered.get("WEIGHT_NAMES"),
        "writes_text": name not in _WITHOUT_TEXT,
        **{part.lower(): offered[part] for part in OFFERED if part in offered},
    }
    files = offered.get("FILES", _FILES.get(name, Family.files))
    families = {
        name: Family(model_type=name, read=module.from_published, write=module.to_published, files=files, **shared)
        for name in offered.get("MODEL_TYPES", ())
    }
    read, write = partial(from_json, module.Config), partial(write_own, generic)
    families.setdefault(generic, Family(model_type=generic, read=read, write=write, **shared))
    return _with_open_clip(**families) if name == "clip.clip" else families


def _with_open_clip(clip: Family, keifu_clip: Family) -> dict[str, Family]:
    """Return CLIP's families and open_clip's, whose names are for a ResNet too."""
    from keifu.models.hf import open_clip

    published = replace(
        clip, model_type="open_clip", names=open_clip.WEIGHT_NAMES, not_weights=open_clip.NOT_WEIGHTS,
        read=open_clip.from_open_clip, write=open_clip.to_open_clip, files=open_clip.FILES,
    )  # fmt: skip
    return {"clip": clip, "open_clip": published, "keifu_clip": replace(keifu_clip, names=open_clip.WEIGHT_NAMES)}


class _Families(UserDict[str, Any]):
    """Every family by its model_type, which stands for its model's file; to ask which there are imports none."""

    def __getitem__(self, model_type: str) -> Family:
        return families_of(self.data[model_type])[model_type]


FAMILIES: Mapping[str, Family] = _Families({model_type: name for name, kinds in MODELS.items() for model_type in kinds})


class _Published(dict[str, Any]):
    """A config.json: a field that is asked for and not there is an error that names it."""

    def __init__(self, content: Mapping[str, Any], where: str):
        super().__init__(content)
        self.where = where

    def __missing__(self, key: str) -> Any:
        raise UserError(f"{self.where} has no field {key!r}, which a {self['model_type']!r} model needs.")


def read_config(json: Mapping[str, Any], where: str) -> tuple[Family, Any]:
    """Return the family and the Config that a config.json describes; `where` names the file in errors.

    An unknown model_type, a setting that is not implemented, a field that is missing or has a wrong value: `UserError`.
    """
    model_type = json.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"{where} has no model_type, so nothing says which model it is.")
    if model_type not in FAMILIES:  # no guess: the nearest name is that of another architecture
        known = ", ".join(sorted(name for name in FAMILIES if not name.startswith("keifu_")))
        raise UserError(f"{where} has the model_type {model_type!r}, which keifu does not implement. It has: {known}.")
    family = FAMILIES[model_type]
    check_settings(json, {**UNSUPPORTED, **family.unsupported}, where)
    try:
        config = family.read(_Published(json, where))
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        if isinstance(error, UserError) and str(error).startswith(where):
            raise
        raise UserError(f"{where} cannot be read as a {model_type!r} model: {error}") from error
    check_types(config, where)
    return family, config


def check_settings(json: Mapping[str, Any], implemented: Mapping[str, Any], where: str) -> None:
    """Refuse a setting whose value is not the one that is implemented; an absent one is fine."""
    for name, fine in implemented.items():
        if json.get(name) is not None and json[name] != fine:
            raise UserError(f"{where} sets {name} to {json[name]!r}, which keifu does not implement; only {fine!r} is.")


def describe(config: Any) -> tuple[Family, dict[str, Any]]:
    """Return the family of a built model's Config and its config.json.

    That is a published model_type where one says all that the Config says, else keifu's own.
    """
    name = _place(config)
    families = families_of(name).values() if name in MODELS else ()
    able = [family for family in families if isinstance(config, family.module.Config)]
    if not able:
        class_name = f"{type(config).__module__}.{type(config).__name__}"
        raise UserError(f"{class_name} is the Config of no model that can be saved.")
    for family in able:
        json = family.write(config)
        published = FAMILIES[json["model_type"]]
        if family.names is not None and _same(config, published.read(json)):
            return published, json
    family = FAMILIES[MODELS[name][-1]]
    return family, family.write(config)


def describe_as(config: Any, model_type: str) -> tuple[Family, dict[str, Any]]:
    """Return the family of that model_type and its config for a built model's; one that cannot say it all is a
    `UserError`."""
    family = FAMILIES[model_type]
    if not isinstance(config, family.module.Config):
        raise UserError(f"The format {model_type} has no {_place(config)}: use hf.")
    json = family.write(config)
    if not _same(config, family.read(json)):
        raise UserError(f"The format {model_type} has no words for something in this model's config: use hf.")
    return family, json


def _place(config: Any) -> str:
    """Return the name of a Config's model in `MODELS`."""
    return type(config).__module__.removeprefix("keifu.models.")


def _same(config: Any, back: Any) -> bool:
    """Return whether `back` is the same; None stands for a default that a published config spells out, and a field that
    the other kind of Config has not for its default. So it is for the Configs of a model's parts."""
    said = {name: vars(back).get(name, getattr(type(config), name, None)) for name in vars(config)}
    return all(
        value is None or value == said[name] or (is_dataclass(value) and _same(value, said[name]))
        for name, value in vars(config).items()
    )


def build(family: Family, config: Any, where: str) -> nn.Module:
    """Return the model on the meta device, without memory; sizes that do not fit each other are a `UserError`."""
    try:
        with on_meta():
            return family.module.build(config)
    except (ValueError, RuntimeError, LookupError, ArithmeticError) as error:  # torch's own: a size beyond 64 bits
        raise UserError(f"{where} describes a model that cannot be built: {error}") from error
