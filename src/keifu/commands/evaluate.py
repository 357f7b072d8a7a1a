"""`keifu evaluate`: selects the evaluation for a model and its data, and prints the results."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro

from keifu.commands.shared import flags, tables
from keifu.commands.shared.terminal import say
from keifu.errors import UserError, unknown
from keifu.evaluation.registry import EvalOptions, EvalRequest, ResultTable

# Each is a file in keifu/evaluation (see its task.py).
TASKS = (
    "images.questions", "text.transcription", "text.translation", "images.retrieval", "images.generative",
    "images.text_to_image", "text.few_shot", "text.mixture", "text.perplexity", "text.masked_words",
    "text.diffusion_bound",
    "classification.neurons", "classification.labelled_texts",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options(flags.Packed, EvalOptions):
    """How good a model is, in figures.

    A CLIP: how well captions and pictures find each other (a catalogue name such as emoji, a folder, .tar shards). A
    model that draws: how near its pictures are to such a set, whether they are copies from it, how well it finds
    pictures again in noise (PSNR, SSIM), and how many bits they cost it. One that draws from text: how well what it
    draws of captions fits them, by a CLIP (--clip), and how near it is to the set.

    A translator: BLEU and chrF on pairs (a catalogue name such as tatoeba-ja-en, a TSV file, or two files A,B). A
    language model: perplexity and bits per byte on a text (a catalogue name, a file, a folder), or on each text of a
    mixture (multilingual, or a .yaml or .json file of one); or accuracy on a task given by examples in the prompt
    (topics, titles, last-word, 2-digit-addition, ..., or a .yaml or .json file of one, as in docs/tasks.md). Of
    a catalogue name and of a mixture the part counts that keifu keeps from training. A model of masked diffusion: a
    bound on its bits per byte. A model that hears: the word error rate on recordings (spoken-digits, or a folder with
    sound files and metadata.jsonl).
    """

    model: flags.Model
    clip: str | None = None
    """The CLIP that looks at pictures drawn from text: a run, a folder or a hub id."""
    judge: str | None = None
    """The network that says what is seen in pictures drawn of a class, such as network, for digits."""
    lora: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="PATH[:SCALE]")] = ()
    """A LoRA for a model that draws from text, as keifu draw takes it; several times for several."""
    output: Path | None = None
    """File for each pair or item and what the model made of it: .jsonl, .json with the figures, or else columns parted
    by tabs. A .png shows some drawn pictures, each with the nearest of the set by pixels and by features."""
    json: bool = False
    """Print all as JSON."""


def run(options: Options) -> None:
    """Run the evaluation; print its figures, remarks and tables."""
    from keifu.checkpoints import load
    from keifu.checkpoints.hub import locate
    from keifu.checkpoints.lora.diffusion import apply_lora
    from keifu.commands.shared.drawing import select_lora
    from keifu.files import write_atomic

    check_known(options.on)
    model, tokenizer = load(options.model, weights=options.weights)
    task = select_task(model, options.on)
    eval_options = {field.name: vars(options)[field.name] for field in fields(EvalOptions)}
    check_options(options, task)
    for lora in map(select_lora, options.lora):
        apply_lora(model, lora.place, lora.scale)
    towers = load(options.clip) if options.clip else None
    judge = load(options.judge)[0] if options.judge else None
    request = EvalRequest(**eval_options, towers=towers, judge=judge, **training_facts(locate(options.model)))
    result = task.evaluate(model, tokenizer, request)
    if options.output and result.picture and options.output.suffix == ".png":
        write_atomic(options.output, result.picture)
    elif options.output and options.output.suffix == ".json" and result.items:
        write_atomic(options.output, _as_file(options, result))
    elif options.output and result.items:
        as_objects = options.output.suffix == ".jsonl"
        lines = (json.dumps(item, ensure_ascii=False) for item in _objects(result.items))
        write_atomic(options.output, "".join(f"{line}\n" for line in (lines if as_objects else _columns(result.items))))
    elif options.output:
        result = replace(result, notes=(*result.notes, f"Nothing was written to {options.output}: this has no items."))
    _print_outcome(result, options.json)


def training_facts(run: Path) -> dict[str, Any]:
    """Return facts of a run for its evaluation: a translator's languages, and which pictures were held out."""
    from keifu.data.images.splits import held_out_of, read_recipe

    record = read_recipe(run)
    facts: dict[str, Any] = {"languages": tuple(record["languages"])} if record.get("languages") else {}
    return facts | ({"held_out": held_out_of(record)} if record else {})


def tasks() -> list[Any]:
    """Return all evaluations."""
    return [import_module(f"keifu.evaluation.{name}") for name in TASKS]


def check_known(on: str) -> None:
    """Raise `UserError` for data that no evaluation takes. The model is not needed for this, and is loaded later."""
    if not any(_takes_data(task, on) for task in tasks()):
        raise unknown("task", on, {name for task in tasks() for name in task.NAMES})


def _takes_data(task: Any, on: str) -> bool:
    return on in task.NAMES or task.accepts(on)


def select_task(model: Any, on: str) -> Any:
    """Return the evaluation for this model on this data. Raises `UserError` if there is none."""
    every = tasks()
    able = [task for task in every if task.takes(model)]
    name = type(model).__name__
    if not able:
        raise UserError(f"A {name} cannot be evaluated yet; these can: {'; '.join(task.ABOUT for task in every)}.")
    for task in able:
        if _takes_data(task, on):
            return task
    for task in every:
        if on in task.NAMES:
            raise UserError(f"{on} evaluates {task.ABOUT.partition(':')[0]}, and this is a {name}: choose other data.")
    raise unknown("task", on, [name for task in able for name in task.NAMES])


def check_options(options: Options, task: Any) -> None:
    """Raise `UserError` for an option that the evaluation would ignore."""
    everyones = {"model", "on", "limit", "json", *(field.name for field in fields(flags.Packed))}
    for field in fields(options):
        if field.name not in everyones | task.OPTIONS and vars(options)[field.name] != field.default:
            flag = "--" + field.name.replace("_", "-")
            raise UserError(f"{flag} has no meaning here, where {task.ABOUT.partition(':')[0]} is evaluated.")


def _print_outcome(result: Any, as_json: bool) -> None:
    """Print the figures with their tables and remarks, for people or as JSON."""
    if as_json:
        details = {name: list(_objects(table)) for name, table in result.tables.items()}
        print(json.dumps({**result.figures, "notes": result.notes, **details}, ensure_ascii=False))
        return
    tables.show(("figure", "value"), [(name, str(value)) for name, value in result.figures.items()])
    for name, table in result.tables.items():
        print()
        tables.show(table.columns, [tuple(map(str, row)) for row in table.rows], name)
    for note in result.notes:
        say(note)


def _columns(items: ResultTable) -> Iterator[str]:
    """Yield the header and the rows, with cells separated by tabs."""
    for row in (items.columns, *items.rows):
        yield "\t".join(" ".join(str(value).split()) for value in row)


def _as_file(options: Options, result: Any) -> str:
    """Return the figures, the tables and all items as JSON, one item on each line."""
    values = {field.name: vars(options)[field.name] for field in fields(options)}
    defaults = {field.name: field.default for field in fields(options)}
    changed = {
        name: value for name, value in values.items() if value != defaults[name] and name not in ("json", "output")
    }
    tables = {name: list(_objects(table)) for name, table in result.tables.items()}
    about = {"options": changed, "figures": result.figures, "tables": tables, "columns": result.items.columns}
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in result.items.rows)
    return json.dumps(about, ensure_ascii=False, indent=1, default=str)[:-2] + f',\n "rows": [\n{rows}\n]}}\n'


def _objects(items: ResultTable) -> Iterator[dict[str, Any]]:
    """Yield each row as a dictionary for JSON. Line breaks in cells are kept."""
    return (dict(zip(items.columns, row, strict=True)) for row in items.rows)
