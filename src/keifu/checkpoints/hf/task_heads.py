"""Decoders with a task head as files: transformers' class where it computes the same, else keifu's own form.

`ForSequenceClassification` applies a matrix without bias to the last token of one sequence: classification and
entailment are stored so, and so is a score, with one label (a reward model). `DoubleHeadsModel` gives each answer a
number: choice, for the two models that have that class. No class adds up two orders of the texts, and Cohere's has no
head for labels: those are written as `keifu_finetuned`. After the fields of the class, config.json holds the form and
the special tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from keifu.checkpoints.hf.native_config import check_types
from keifu.checkpoints.registry import Family, check_settings
from keifu.checkpoints.registry import describe as describe_plain
from keifu.checkpoints.registry import read_config as read_plain
from keifu.errors import UserError
from keifu.models import task_head

OWN = "keifu_finetuned"
TASK = "keifu_task"  # the field of config.json with the form and the ids
INSIDE = "decoder."
LABELS, ANSWERS = "ForSequenceClassification", "DoubleHeadsModel"
CLASSES = {LABELS: ("OpenAIGPT", "GPT2", "GPTNeo", "Llama", "Mistral", "Qwen2"), ANSWERS: ("OpenAIGPT", "GPT2")}
OF_FORM = {"classification": LABELS, "entailment": LABELS, "score": LABELS, "choice": ANSWERS}
HEAD = {LABELS: "score", ANSWERS: "multiple_choice_head.summary"}
UNSUPPORTED: dict[str, Mapping[str, Any]] = {
    LABELS: {"problem_type": "single_label_classification"},
    ANSWERS: {
        "summary_type": "cls_index", "summary_use_proj": True, "summary_proj_to_labels": True,
        "summary_activation": None, "summary_last_dropout": 0.0,
    },
}  # fmt: skip
FIELDS = ("form", "start_id", "delimiter_id", "extract_id", "classifier_dropout", "bias")


def read_config(json: Mapping[str, Any], where: str) -> tuple[Family, Any]:
    """Do as `keifu.checkpoints.registry.read_config`, for decoders with a task's head too."""
    if json.get("model_type") == OWN:
        inner = _object(json, "decoder", where)
        base, decoder = read_plain(inner, f"{where}, decoder,")
        return _family(base, None), _config(json, decoder, {}, where)
    head = _published(json, where)
    base, config = read_plain(json, where)
    if not head:
        return base, config
    labels = _labels(json) if head == LABELS else ()
    alone = len(labels) == 1  # a score
    check_settings(json, {"problem_type": "regression"} if alone else UNSUPPORTED[head], where)
    facts = {"form": "score" if alone else "classification", "labels": labels} if head == LABELS else {"form": "choice"}
    facts |= {"classifier_dropout": json.get("summary_first_dropout", 0.0 if alone else 0.1)}
    return _family(base, head), _config(json, config, facts, where)


def describe(config: Any) -> tuple[Family, dict[str, Any]]:
    """Do as `keifu.checkpoints.registry.describe`, for decoders with a task's head too."""
    if not isinstance(config, task_head.Config):
        return describe_plain(config)
    base, json = describe_plain(config.decoder)
    task = {name: vars(config)[name] for name in FIELDS if name != "bias" or config.bias}
    head = OF_FORM.get(config.form, "")
    stem = json["architectures"][0].removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    if stem not in CLASSES.get(head, ()):
        head = {"model_type": OWN, "architectures": ["keifu"], "decoder": json}
        return _family(base, None), head | {TASK: task | {"labels": list(config.labels)}}
    numbers = {label: number for number, label in enumerate(config.labels)}
    names = {"id2label": {str(number): label for label, number in numbers.items()}, "label2id": numbers}
    facts = names if head == LABELS else {"summary_first_dropout": config.classifier_dropout}
    return _family(base, head), json | {"architectures": [stem + head], TASK: task} | facts


def _published(json: Mapping[str, Any], where: str) -> str:
    """Return the kind of class that a config.json names, if it is one of those above."""
    names = json.get("architectures") or [""]
    if not isinstance(names, list):
        raise UserError(f"{where} has {names!r} as architectures: it must be a list of class names.")
    named = names[0]
    return next((head for head, stems in CLASSES.items() if named in {stem + head for stem in stems}), "")


def _family(base: Family, head: str | None) -> Family:
    """Return the family of the decoder with a head of that kind. Without a published kind, the family has keifu's own
    format and names.
    """
    module = SimpleNamespace(build=task_head.builder(base.module.build), Config=task_head.Config, SIZES={})
    changes: dict[str, Any] = {"module": module, "inside": INSIDE, "tie": _tie, "writes_text": True}
    if head is None or base.names is None:
        return replace(base, **changes, model_type=OWN, names=None)
    names = {f"{INSIDE}{ours}": theirs for ours, theirs in base.names.items()} | {"task_head.project": HEAD[head]}
    return replace(base, **changes, names=names)


def _tie(config: task_head.Config, tied: bool) -> task_head.Config:
    return replace(config, decoder=replace(config.decoder, tied=tied))


def _config(json: Mapping[str, Any], decoder: Any, facts: Mapping[str, Any], where: str) -> task_head.Config:
    """Read the Config from the file's class and, if there is one, its field `TASK`."""
    task = _object(json, TASK, where) if TASK in json or not facts else {}
    given = {name: value for name, value in {**facts, **task}.items() if name in FIELDS}
    try:
        config = task_head.Config(decoder, labels=tuple(facts.get("labels", task.get("labels", ()))), **given)
    except TypeError as error:
        raise UserError(f"{where} cannot be read as a model for a task: {error}") from error
    check_types(config, where)
    return config


def _object(json: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    if not isinstance(json.get(name), dict):
        raise UserError(f"{where} needs an object in its field {name!r}, and it has {json.get(name)!r}.")
    return json[name]


def _labels(json: Mapping[str, Any]) -> tuple[str, ...]:
    names = json.get("id2label") or {str(n): f"LABEL_{n}" for n in range(json.get("num_labels", 2))}
    return tuple(names[key] for key in sorted(names, key=int))
