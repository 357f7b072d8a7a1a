"""Files of decoders with a task head: transformers' class if it computes the same, otherwise keifu's format.

`ForSequenceClassification` applies a matrix without bias to the last token of one sequence. It is used for
classification, entailment and a score (one label: a reward model). `DoubleHeadsModel` gives each answer a number. It is
used for choice, for the two models that have this class. No class adds the results of both orders of two texts, and
Cohere's has no head for labels: these are written as `keifu_finetuned`. In addition to the class's fields, config.json
has the form and the special tokens.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from keifu.checkpoints.hf.native_config import check_types
from keifu.checkpoints.registry import Family, check_settings, describe as describe_plain, read_config as read_plain
from keifu.errors import UserError
from keifu.models import task_head

NATIVE = "keifu_finetuned"
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
    """Read the config.json of any model, including decoders with a task head (see
    `keifu.checkpoints.registry.read_config`)."""
    if json.get("model_type") == NATIVE:
        base, decoder = read_plain(_object(json, "decoder", where), f"{where}, decoder,")
        return _family(base, None), _config(json, decoder, {}, where)
    head = _published(json, where)
    base, config = read_plain(json, where)
    if not head:
        return base, config
    labels = _labels(json) if head == LABELS else ()
    alone = len(labels) == 1  # one label: a score
    check_settings(json, {"problem_type": "regression"} if alone else UNSUPPORTED[head], where)
    facts = {"form": "score" if alone else "classification", "labels": labels} if head == LABELS else {"form": "choice"}
    facts |= {"classifier_dropout": json.get("summary_first_dropout", 0.0 if alone else 0.1)}
    return _family(base, head), _config(json, config, facts, where)


def describe(config: Any) -> tuple[Family, dict[str, Any]]:
    """Describe the Config of any model, including decoders with a task head (see
    `keifu.checkpoints.registry.describe`)."""
    if not isinstance(config, task_head.Config):
        return describe_plain(config)
    base, json = describe_plain(config.decoder)
    task = {name: vars(config)[name] for name in FIELDS if name != "bias" or config.bias}
    head = OF_FORM.get(config.form, "")
    stem = json["architectures"][0].removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    if stem not in CLASSES.get(head, ()):
        head = {"model_type": NATIVE, "architectures": ["keifu"], "decoder": json}
        return _family(base, None), head | {TASK: task | {"labels": list(config.labels)}}
    numbers = {label: number for number, label in enumerate(config.labels)}
    names = {"id2label": {str(number): label for label, number in numbers.items()}, "label2id": numbers}
    facts = names if head == LABELS else {"summary_first_dropout": config.classifier_dropout}
    return _family(base, head), json | {"architectures": [stem + head], TASK: task} | facts


def _published(json: Mapping[str, Any], where: str) -> str:
    """Return the kind of transformers class that a config.json names, if it is one of `CLASSES`; otherwise ""."""
    names = json.get("architectures") or [""]
    if not isinstance(names, list):
        raise UserError(f"{where} has {names!r} as architectures: it must be a list of class names.")
    class_name = names[0]
    return next((head for head, stems in CLASSES.items() if class_name in {stem + head for stem in stems}), "")


def _family(base: Family, head: str | None) -> Family:
    """Return the family of a decoder with a head of this kind. None: keifu's format, with keifu's names."""
    changes: dict[str, Any] = {
        "config_class": task_head.Config, "build": task_head.builder(base.build), "inside": INSIDE, "tie": _tie,
        "writes_text": True,
    }  # fmt: skip
    if head is None or base.names is None:
        return replace(base, **changes, model_type=NATIVE, names=None)
    names = {f"{INSIDE}{ours}": theirs for ours, theirs in base.names.items()} | {"task_head.project": HEAD[head]}
    return replace(base, **changes, names=names)


def _tie(config: task_head.Config, tied: bool) -> task_head.Config:
    return replace(config, decoder=replace(config.decoder, tied=tied))


def _config(json: Mapping[str, Any], decoder: Any, facts: Mapping[str, Any], where: str) -> task_head.Config:
    """Read the Config from the fields of the file's class (`facts`) and from its field `TASK`, if it has one."""
    task = _object(json, TASK, where) if TASK in json or not facts else {}
    options = {name: value for name, value in {**facts, **task}.items() if name in FIELDS}
    try:
        config = task_head.Config(decoder, labels=tuple(facts.get("labels", task.get("labels", ()))), **options)
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
