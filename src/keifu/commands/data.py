"""`keifu data`: lists, downloads, checks and shows training data, conversations with the trained tokens in colour."""

import json
import sys
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from keifu.commands.shared import tables
from keifu.commands.shared.inputs import at_terminal
from keifu.commands.shared.terminal import for_terminal, say
from keifu.errors import UserError
from keifu.folders import cache
from keifu.ranges import BelowOne, Count, Natural, SmallCount

if TYPE_CHECKING:
    from keifu.data.images.dataset import ImageDataset

LEARNED, ENDS = "bold green", "⟦⟧"  # style in a terminal, and marks in other outputs


def show(source: str, model: str, count: int, as_json: bool) -> None:
    """Print the first conversations in a model's chat template, and the share of trained tokens over all conversations.

    Trained tokens are coloured. If the output is not a terminal, they are between ⟦ and ⟧.
    """
    from rich.console import Console
    from rich.text import Text

    from keifu.checkpoints.hub import locate
    from keifu.checkpoints.loading import open_source
    from keifu.data.chat import conversations
    from keifu.recipes.assistant.finetuning import with_template

    loaded = open_source(locate(model)).tokenizer()
    if loaded is None:
        raise UserError(f"{model} has no tokenizer, so it reads no conversation: name another with --tokenizer.")
    tokenizer = with_template(loaded, "own")
    talks, learned, total = list(conversations.read(source)), 0, 0
    console = Console(highlight=False, soft_wrap=True)
    for index, talk in enumerate(talks):
        ids, mask = tokenizer.render_turns(talk)
        learned, total = learned + sum(mask), total + len(ids)
        if index >= count:
            continue
        if as_json:
            print(json.dumps({"tokens": ids, "learned": mask}))
            continue
        text = Text()
        for answer, run in groupby(zip(ids, mask, strict=True), lambda pair: pair[1]):
            piece = for_terminal(tokenizer.decode([token for token, _ in run], skip_special=False))
            marked = piece if console.is_terminal or not answer else f"{ENDS[0]}{piece}{ENDS[1]}"
            text.append(marked, LEARNED if answer else "dim")
        console.print(text, end="\n\n")
    summary = f"{len(talks):,} conversation{'s' * (len(talks) != 1)}, {total:,} tokens"
    tokens = f"{summary}, of which {learned:,} ({learned / max(1, total):.0%}) are learned."
    print(tokens, file=sys.stderr if as_json else sys.stdout)


@dataclass(frozen=True)
class Options:
    """List the catalogue; download an entry into the cache; check a text before training on it; show pictures; list the
    cache's content and clear it."""

    action: tyro.conf.Positional[Literal["list", "get", "check", "prepare", "show", "cache", "clear"]] = "list"
    """Action: check reports encoding errors, duplicates and lengths of text; prepare tokenizes the files of a text into
    shards, on several machines; show counts pictures and writes a contact sheet of them, or prints conversations with
    what is learned of them in colour; cache lists what was fetched and made, with sizes; clear removes it, all or what
    NAME says."""
    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None
    """A catalogue name; check also takes a file or a folder of text, show a folder of pictures (with metadata.jsonl,
    with a folder for each class, or neither), WebDataset .tar shards, or a .jsonl file of conversations."""
    tokenizer: str | None = None
    """Tokenizer that check counts tokens with: a catalogue name, or a tokenizer's file or folder. For conversations,
    the model whose chat template shows them. Unset: gpt2-bpe; for conversations smollm2."""
    text_field: str | None = None
    """The field, or column, that holds the text in .jsonl, .json, .csv, .tsv and .parquet files; unset: text."""
    encoding: str = "utf-8"
    """Encoding of text files without a byte order mark, such as cp932 (Shift-JIS), euc_jp or cp1252."""
    yes: bool = False
    """Clear without asking."""
    json: bool = False
    """Print the report of check, or conversations as ids, as JSON."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """The PNG file that show writes; unset, it writes none. The folder that prepare writes, which is then --data."""
    rank: Natural = 0
    """Part of the files that prepare takes, counted from 0."""
    of: Count = 1
    """The number of parts."""
    count: SmallCount = 64
    """Pictures on the sheet, spread evenly over the set; or conversations, the first."""
    held_out: BelowOne = 0.05
    """Share of a text that show takes as held out, as in keifu train."""
    part: Literal["all", "train", "validation", "test"] = "all"
    """Show only what is learned from, or what keifu holds out from it. Of a text, the passages are printed."""
    language: str | None = None
    """The language of the captions on the sheet, such as ja; unset, the first that there is."""
    size: Count | None = None
    """The side in pixels that the pictures are brought to; unset, they must all have one size."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour; unset, as the first picture."""
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """Way to make pictures square: their middle, white added, or changed proportions."""
    leave_out: bool = False
    """Leave out pictures that cannot be read or have no caption where others do, and say which."""


def run(options: Options) -> None:
    """Run the subcommand."""
    if options.action == "list":
        _list()
    elif options.action == "cache":
        _cache()
    elif options.action == "clear":
        _clear(options.name, options.yes)
    elif options.name is None:
        raise UserError(f"keifu data {options.action} needs a name: keifu data list shows those of the catalogue.")
    elif options.action == "get":
        from keifu.data.catalogue.catalogue import fetch

        print(fetch(options.name))
    elif options.action == "prepare":
        _prepare(options.name, options)
    elif options.action == "show":
        _show(options.name, options)
    else:
        _check(options.name, options)


def _list() -> None:
    from keifu.data.catalogue.catalogue import rows

    names = ("name", "kind", "download", "fetched", "about")
    cells = [[*(row[name] for name in names), f"{row['licence']}; {row['attribution']}"] for row in rows()]
    tables.show((*names, "licence; whom to name"), cells)


def _cache() -> None:
    from keifu.data.catalogue.catalogue import cached

    entries = cached()
    rows = [(", ".join(entry.names), _megabytes(entry.size), entry.about) for entry in entries]
    tables.show(("name", "size", "what it is"), rows)
    print(f"{_megabytes(sum(entry.size for entry in entries))} in {cache()}; keifu data clear [NAME] removes it.")


def _clear(name: str | None, yes: bool) -> None:
    from keifu.data.catalogue.catalogue import of_name, remove

    entries = of_name(name)
    total = _megabytes(sum(entry.size for entry in entries))
    if not entries:
        print("The cache is empty.")
        return
    what = ", ".join(name for entry in entries for name in entry.names)
    if not yes:
        if not at_terminal():
            raise UserError(f"This would remove {total}: {what}. Add --yes to do so.")
        if input(f"Remove {total}: {what}? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was removed.")
            return
    remove(entries)
    print(f"{total} removed: {what}.")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _check(source: str, options: Options) -> None:
    from keifu.data.catalogue.catalogue import CATALOGUE
    from keifu.data.text.dataset_report import check_dataset
    from keifu.data.text.documents import TextFileFormat, paths
    from keifu.data.tokenizers.load import load_tokenizer

    form = TextFileFormat(options.text_field, options.encoding)
    if source not in CATALOGUE:
        paths(source, form)  # refuses a source without files before a tokenizer is loaded
    report = check_dataset(source, load_tokenizer(options.tokenizer or "gpt2-bpe"), form)
    if report.documents or options.json:
        say(json.dumps(report.to_json(), ensure_ascii=False, indent=2) if options.json else report)
    if not report.documents:
        further_faults = f" There are {report.n_problems - 1:,} more faults." if report.n_problems > 1 else ""
        why = f": {report.problems[0]}{further_faults}" if report.problems else "."
        raise UserError(f"{source} holds no text to train on{why}")


def _prepare(source: str, options: Options) -> None:
    from keifu.data.text.documents import TextFileFormat
    from keifu.data.text.prepared import prepare_files
    from keifu.data.tokenizers.load import load_tokenizer

    if options.output is None:
        raise UserError("keifu data prepare needs a folder for the shards: give --output.")
    tokenizer = load_tokenizer(options.tokenizer or "gpt2-bpe")
    options.output.mkdir(parents=True, exist_ok=True)
    form = TextFileFormat(options.text_field, options.encoding)
    n_new = prepare_files(source, tokenizer, options.output, form, options.rank, options.of)
    print(f"{n_new} new shard{'s' * (n_new != 1)} in {options.output}.")


def _show(source: str, options: Options) -> None:
    """Print the content of a source, and write the sheet of pictures."""
    from keifu.data.chat import conversations
    from keifu.data.images.dataset import read_images
    from keifu.data.images.splits import split

    if _is_text(source, options):
        _show_text(source, options)
        return
    if source in conversations.names() or Path(source).suffix.lower() in (".json", ".jsonl"):
        show(source, options.tokenizer or "smollm2", options.count, options.json)
        return
    pictures = read_images(source, options.size, options.channels, options.fit, options.leave_out)
    parted = split(pictures)
    say("\n".join([pictures.sentence(), parted.sentence(), *pictures.notes, *pictures.faults]))
    if pictures.classes:
        rows = [(name, f"{(pictures.labels == index).sum():,}") for index, name in enumerate(pictures.classes)]
        tables.show(("class", "pictures"), rows)
    if options.output:
        part_pictures = {"all": pictures, "train": parted.train, "validation": parted.validation, "test": parted.test}
        _write_sheet(part_pictures[options.part], options.output, options)


def _is_text(source: str, options: Options) -> bool:
    """Return whether a source is text, and not pictures or conversations."""
    from keifu.data import records
    from keifu.data.catalogue.catalogue import names
    from keifu.data.images.sources import SUFFIXES
    from keifu.data.text.documents import PAGES
    from keifu.folders import matching

    kinds = {file.suffix.lower() for file in matching(source)}
    if Path(source).suffix.lower() in (".json", ".jsonl"):
        return options.text_field is not None
    is_text = bool(kinds & {".txt", ".md", *PAGES, *records.SUFFIXES})
    return source in names() or (is_text and not kinds & {".tar", *SUFFIXES})


def _show_text(source: str, options: Options) -> None:
    """Print how a text is split, and the passages or documents of its held-out part."""
    from keifu.data.text.documents import TextFileFormat
    from keifu.data.text.held_out import split_documents, stored_rule

    form = TextFileFormat(options.text_field, options.encoding)
    parted = split_documents(source, options.held_out, form=form, split=stored_rule(source, "spread"))
    sizes, files, examples = [0, 0], (set[str](), set[str]()), list[tuple[str, str]]()
    for piece in parted.pieces:
        sizes[piece.part] += len(piece.text)
        files[piece.part].add(piece.file)
        if piece.part == (options.part == "validation") and len(examples) < options.count:
            examples.append((piece.file, piece.text))
    share, of_files = sizes[1] / max(1, sum(sizes)), len(files[0] | files[1])
    print(f"{parted.documents:,} documents, {sum(sizes):,} characters in {of_files} file{'s' * (of_files != 1)}.")
    print(f"Held out for validation: {sizes[1]:,} characters ({share:.1%}) from {len(files[1])} of the files.")
    if options.part in ("train", "validation"):
        for file, text in examples:
            print(f"\n--- {file}\n{text}")


def _write_sheet(pictures: "ImageDataset", output: Path, options: Options) -> None:
    from keifu.data.images.grid import grid
    from keifu.files import write_atomic

    if not len(pictures):
        raise UserError(f"There is nothing to show: no picture of {pictures.source} is for {options.part}.")
    sample = pictures.spread(options.count)
    if options.language or sample.captions:
        captions = sample.texts(options.language)
    else:
        captions = [sample.classes[label] if label >= 0 else "" for label in sample.labels]
    write_atomic(output, grid(sample.take(slice(None)), captions))
    print(f"{len(sample)} of {len(pictures):,} pictures are in {output}.", file=sys.stderr)
