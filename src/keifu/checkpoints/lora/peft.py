"""PEFT adapter directories (LoRA), read and written: adapter_config.json and adapter_model.safetensors.

The family's table of weight names lists the layers and their published names.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from keifu.checkpoints.hf.read import open_weights
from keifu.checkpoints.hf.weight_names import links
from keifu.checkpoints.plan import read_finite
from keifu.checkpoints.registry import describe
from keifu.devices import device_choice
from keifu.errors import UserError, unknown
from keifu.files import write_atomic
from keifu.layers.lora import Adapter, LoraSettings, Target, adapters, attach
from keifu.processes import current
from keifu.untrusted import check_pattern, read_json_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ALL = "all-linear"
ENDS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector": "length"}
# Settings that are not implemented, with their neutral value. A missing or empty setting is accepted too.
UNSUPPORTED: Mapping[str, Any] = {
    "bias": "none", "modules_to_save": None, "trainable_token_indices": None, "lora_bias": False, "use_qalora": False,
    "layer_replication": None, "target_parameters": None, "alora_invocation_tokens": None,
}  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change the base's weights


def linears(model: nn.Module) -> dict[str, Target]:
    """Return all linear layers inside numbered layers, by published name; each matrix of a joined layer separately."""
    every = layers(model, (nn.Linear,))
    return {label: target for label, target in every.items() if any(p.isdigit() for p in target.module.split("."))}


def layers(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d)) -> dict[str, Target]:
    """Return every linear layer and convolution of a model, by published name; each matrix of a joined layer
    separately."""
    family, config = describe(model.config)
    modules, targets = dict(model.named_modules()), dict[str, Target]()
    for link in links(model, family.table(config)):
        name, _, leaf = link.ours.rpartition(".")
        if leaf == "weight" and isinstance(modules[name], kinds):
            starts = [sum(link.rows[:index]) for index in range(len(link.rows))]
            for label, start, rows in zip(link.theirs, starts, link.rows, strict=True):
                label = label.removesuffix(".weight")
                targets[label] = Target(name, start, rows, label)
    return targets


def adapt(model: nn.Module, targets: Sequence[str], low: LoraSettings) -> nn.Module:
    """Attach new adapters, in place, to the linear layers of these names (see `match_targets`), or to all for
    "all-linear"."""
    layer_of = linears(model)
    if not layer_of:
        raise UserError("This model has no linear layers in its blocks, so that it takes no adapters.")
    chosen_layers = layer_of.values() if [*targets] == [ALL] else match_targets(layer_of, targets, ALL)
    return attach(model, dict.fromkeys(chosen_layers, low))


def match_targets(targets: Mapping[str, Target], names: Sequence[str], *extra_words: str) -> list[Target]:
    """Return the layers whose published names end in one of `names`.

    Raises UserError for a name that matches no layer, such as q_prjo, with the nearest known name or word
    of `extra_words`.
    """
    for name in names:
        if not any(_ends(label, name) for label in targets):
            raise unknown("layer", name, [*{_last(label) for label in targets}, *extra_words])
    return [target for label, target in targets.items() if any(_ends(label, name) for name in names)]


def _last(label: str) -> str:
    """Return the end of a layer's name that describes its role: its last part that is not a number, and a number after
    it."""
    parts = label.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _ends(label: str, name: str) -> bool:
    return label == name or label.endswith(f".{name}")


def save_adapter(model: nn.Module, directory: str | Path, base: str) -> None:
    """Write only a model's adapters, as PEFT does. base: path or hub id of the model itself."""
    from safetensors.torch import save

    adapters = whole_tensors(model)
    if not adapters:
        raise UserError("This model has no adapters to save: save it whole.")
    if not current().is_main:
        return
    tensors = {
        f"{PREFIX}{adapter.target.label}.{end}": parts[ours]
        for adapter, parts in adapters.items()
        for end, ours in ENDS.items()
        if ours in parts
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(directory / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomic(directory / CONFIG, json.dumps(_config(model, [*adapters], base), indent=2) + "\n")


def whole_tensors(model: nn.Module) -> dict[Adapter, dict[str, Tensor]]:
    """Return the unsharded tensors of every adapter, on the CPU."""
    join = current().full_tensor
    return {part: {end: join(f"{name}.{end}", p.detach()).cpu().contiguous() for end, p in part.named_parameters()}
            for name, part in model.named_modules() if isinstance(part, Adapter)}  # fmt: skip


def _config(model: nn.Module, adapters: Sequence[Adapter], base: str) -> dict[str, Any]:
    """Return PEFT's config. Ranks and alphas that differ from the first adapter's are listed by layer."""
    family, config = describe(model.config)
    transposed = any(name.endswith(".T") for name in (family.table(config) or {}).values())
    low, ends = adapters[0].low, sorted({adapter.target.label.rpartition(".")[2] for adapter in adapters})
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": low.rank, "lora_alpha": low.alpha, "lora_dropout": low.dropout, "use_dora": low.dora,
        "use_rslora": low.root, "bias": "none", "target_modules": ends, "modules_to_save": None,
        "fan_in_fan_out": transposed, "init_lora_weights": True,
        "rank_pattern": {a.target.label: a.low.rank for a in adapters if a.low.rank != low.rank},
        "alpha_pattern": {a.target.label: a.low.alpha for a in adapters if a.low.alpha != low.alpha},
    }  # fmt: skip


def is_adapter(path: Path) -> bool:
    """Return whether a folder has adapters and no whole model."""
    return (path / CONFIG).is_file() and not (path / "config.json").exists()


def base_of(path: Path) -> str:
    """Return the path or hub id of the adapters' base model."""
    base = read_json_object(path / CONFIG).get("base_model_name_or_path")
    if not base or not isinstance(base, str):
        raise UserError(f"{path / CONFIG} does not say what model its adapters belong to (base_model_name_or_path).")
    if Path(base).is_dir() and is_adapter(Path(base)):
        raise UserError(f"{path / CONFIG} names {base} as the model of its adapters, which holds adapters itself.")
    return base


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Attach the adapters of a folder to a model, in place. Raises one UserError for all keys or shapes that do not
    fit."""
    path = Path(path)
    config, tensors = _checked_config(path), read_tensors(path / WEIGHTS)
    return attach_tensors(model, path, linears(model), tensors, _parse, partial(_low, config))


# the layer's published name, the tensor's role in the adapter (a, b, ...), and its name in errors
ParsedName = tuple[str, str, str]


def attach_tensors(
    model: nn.Module, path: Path, targets: Mapping[str, Target], tensors: Mapping[str, Tensor],
    parse: Callable[[str], ParsedName], settings: Callable[[str, dict[str, Tensor]], LoraSettings],
    strange: Callable[[str], str] = lambda name: "belongs to no layer of this model",
) -> nn.Module:  # fmt: skip
    """Attach adapters with these tensors to a model, in place. Raises one UserError for all tensors that are unknown,
    missing or misshapen.

    parse: splits a tensor's name. settings: returns the settings of a layer's adapter from its tensors, which it may
    change. strange: says what is wrong with a tensor whose layer is not in `targets`.
    """
    parts_of = defaultdict[str, dict[str, Tensor]](dict)
    names = defaultdict[str, dict[str, str]](dict)
    wrong = list[str]()
    for name, tensor in tensors.items():
        label, part, file_name = parse(name)
        if label not in targets or not part:
            wrong.append(f"{name} {strange(name)}")
        elif part in parts_of[label]:
            wrong.append(f"{name} is the same as {names[label][part]}, in another spelling")
        else:
            parts_of[label][part] = tensor
            names[label][part] = file_name
    lows = {label: settings(label, parts) for label, parts in parts_of.items()}
    for label, parts in parts_of.items():
        wrong += _misfits(model, targets[label], lows[label], parts, names[label])
    if wrong or not parts_of:
        omission = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        reason = "; ".join(wrong[:10]) + omission if wrong else "they are empty"
        raise UserError(f"The adapters in {path} do not fit this {type(model).__name__}: {reason}.")
    attach(model, {targets[label]: low for label, low in lows.items()})
    with torch.no_grad():
        for adapter in adapters(model):
            for ours, tensor in parts_of[adapter.target.label].items():
                getattr(adapter, ours).copy_(tensor)
    return model.eval()


def _checked_config(path: Path) -> dict[str, Any]:
    """Return the config. Raises UserError if it has settings that keifu would ignore."""
    config = read_json_object(path / CONFIG)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path / CONFIG} is of the kind {config.get('peft_type')!r}, and keifu reads LORA alone.")
    for name, fine in UNSUPPORTED.items():
        if config.get(name) and config[name] != fine:
            raise UserError(f"{path / CONFIG} sets {name} to {config[name]!r}, which keifu does not implement.")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(CHANGES_BASE):
        raise UserError(
            f"{path / CONFIG} was begun with {begun!r}, which changes the base's own weights: save it with PEFT's "
            "path_initial_model_for_weight_conversion first, which makes plain adapters of it."
        )
    return config


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file. Raises UserError if the file is missing or truncated, or a tensor is
    not finite."""
    if not path.exists():
        raise UserError(f"{path.parent} holds no {path.name}: keifu reads adapters as safetensors alone.")
    file = open_weights(path)
    read_tensor = file.get_tensor if device_choice().allow_nonfinite else partial(read_finite, file.get_tensor, path)
    return {name: read_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)


def _parse(name: str) -> ParsedName:
    """Parse the name of a tensor, as PEFT writes it."""
    match = re.fullmatch(r"(?:base_model\.model\.)?((.+?)\.(lora_\w+(?:\.weight)?))", name)
    return (match[2], ENDS.get(match[3], ""), match[1]) if match else (name, "", name)


def _low(config: Mapping[str, Any], label: str, parts: Mapping[str, Tensor]) -> LoraSettings:
    """Return the settings of one layer's adapter. A pattern is the end of a name, or a regular expression for it."""

    def value_for(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        for pattern in patterns or {}:
            check_pattern(pattern, CONFIG)
        fits = (value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", label))
        return next(fits, default)

    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    return LoraSettings(
        rank=_number("r", value_for(config.get("rank_pattern"), rank), int),
        alpha=float(_number("lora_alpha", value_for(config.get("alpha_pattern"), alpha), (int, float))),
        dropout=float(_number("lora_dropout", config.get("lora_dropout", 0.0), (int, float))),
        dora="length" in parts,
        root=bool(config.get("use_rslora")),
    )


def _number(name: str, value: Any, types: type | tuple[type, ...]) -> Any:
    """Return a number of an adapter's config. Raises UserError with the field's name for anything else."""
    if not isinstance(value, types) or isinstance(value, bool):
        raise UserError(f"{CONFIG} has {value!r} as {name}: it must be a number.")
    return value


def _misfits(
    model: nn.Module, target: Target, low: LoraSettings, parts: Mapping[str, Tensor], labels: Mapping[str, str]
) -> list[str]:
    weight = model.get_submodule(target.module).weight
    assert isinstance(weight, Tensor)
    shapes = {"a": (low.rank, weight[0].numel()), "b": (target.rows, low.rank), "length": (target.rows,)}
    names = {ours: f"{target.label}.{end}" for end, ours in ENDS.items()} | {**labels}
    problems = [f"{names[part]} is missing" for part in ("a", "b") if part not in parts]
    return problems + [
        f"{names[part]} has the shape {tuple(tensor.shape)} where {shapes[part]} is needed"
        for part, tensor in parts.items()
        if tuple(tensor.shape) != shapes[part]
    ]
