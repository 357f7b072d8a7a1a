"""Writing Hugging Face directories that transformers, vLLM or diffusers load directly.

All files are written to a temporary folder and renamed at the end, so that a crash or a full disk leaves the old
checkpoint undamaged.
"""

import json
import math
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from keifu.checkpoints.diffusers import pipeline
from keifu.checkpoints.hf.read import CONFIGS, INDEX, PREPROCESSOR, PROCESSOR, WEIGHTS
from keifu.checkpoints.hf.stacked_experts import join_rows, join_slices, stack, stack_of
from keifu.checkpoints.hf.task_heads import describe
from keifu.checkpoints.hf.weight_names import Link, links
from keifu.checkpoints.own_module import save_module
from keifu.checkpoints.plan import check_tokenizer, name_of
from keifu.checkpoints.registry import describe_as
from keifu.data.tokenizers.formats import GENERATION_CONFIG
from keifu.errors import UserError
from keifu.files import disk_space, sync, write_tensors
from keifu.locks import writing_alone
from keifu.processes import current
from keifu.untrusted import as_path

MOVING = ".moving"  # in the stage while its files are renamed: until then the folder is the old model
STAGE = ".saving-"
ROLES = ("bos", "eos", "pad")
# fields of a config that also belong there
GENERATION = ("decoder_start_token_id", "forced_eos_token_id", "pad_token_id", "bad_words_ids")
TOKENIZER_FILES = (
    "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model",
    "vocab.json", "merges.txt", "vocab.txt", "source.spm", "target.spm", "target_vocab.json", "tokenizer.json",
    "target_tokenizer.json",
)  # fmt: skip


def save(
    model: nn.Module, tokenizer: Any, directory: str | Path, max_shard_bytes: int | float = 5e9, kind: str | None = None
) -> None:
    """Write a model and its tokenizer as a Hugging Face directory.

    The directory has config.json, generation_config.json, the tokenizer's files, and model.safetensors or shards with
    an index. A tensor that two parts of the model share is written once. Other files in the directory stay. A Config
    without a published model_type is written in keifu's format, which only keifu loads. An image model is written as a
    diffusers pipeline. A module that is not keifu's is written with its own names; `load_weights` reads it.

    Args:
        model: The model to write.
        tokenizer: Its tokenizer; None for a model that writes no text.
        directory: The folder to write into.
        max_shard_bytes: The largest size of a weight file.
        kind: The model_type to write, if the model has several ("open_clip").

    Examples:
        >>> import tempfile, keifu
        >>> model, tokenizer = keifu.load("smollm2")
        >>> keifu.save(model, tokenizer, tempfile.mkdtemp())
    """
    directory = as_path(directory, "The folder to save in")
    if not isinstance(model, nn.Module):
        raise UserError(f"keifu.save takes a model, its tokenizer and a folder, and the model is {model!r:.60}.")
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file, and a model is written as a folder: give another name.")
    if not type(vars(model).get("config")).__module__.startswith("keifu."):
        return save_module(model, tokenizer, directory)
    _save_known(model, tokenizer, directory, max_shard_bytes, kind)


def _save_known(
    model: nn.Module, tokenizer: Any, directory: Path, max_shard_bytes: int | float, kind: str | None
) -> None:
    settings: Any = model.config
    family, config = describe(settings) if kind is None else describe_as(settings, kind)
    if tokenizer is not None:
        check_tokenizer(tokenizer, settings.vocab_size)
    links_of = pipeline.weight_places(family, [_unsharded(link) for link in links(model, family.table(config))])
    if not current().is_main:  # another rank sends its shards of a split model, and does not write
        for file_links in links_of.values() if not current().is_replicated else ():
            deque(published_tensors(model, file_links), maxlen=0)
        return
    with disk_space(f"{directory} keeps what it held"), writing_alone(directory):
        for old in directory.glob(f"{STAGE}*"):  # left by a crash
            shutil.rmtree(old, ignore_errors=True)
        with TemporaryDirectory(prefix=STAGE, dir=directory, ignore_cleanup_errors=True) as folder:
            stage, dtype = Path(folder), name_of(next(model.parameters()).dtype)
            for file_name, file_links in links_of.items():
                _write_weights(model, file_links, stage / file_name, max_shard_bytes)
            if pipeline.diffusers_files(family):
                _write_diffusers(config, dtype, tokenizer, stage)
            else:
                _write_texts(config, dtype, tokenizer, stage, family.files[0])
            _move(stage, directory)


def published_tensors(model: nn.Module, links: Sequence[Link]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the file by its published name, on the CPU, in the model's order."""
    state = model.state_dict()
    for link in links:
        full_tensor = current().full_tensor(link.ours, state[link.ours].detach())
        yield from zip(link.theirs, link.split(full_tensor.cpu()), strict=True)


def shards(sizes: Mapping[str, int], limit: int | float) -> list[list[str]]:
    """Divide the tensors, in order, into as few groups of at most `limit` bytes as possible. A tensor that is larger
    has its own group."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups


def _write_weights(model: nn.Module, links: Sequence[Link], file: Path, limit: int | float) -> None:
    """Write the weights as this file, or as shards with this name and an index."""
    state = model.state_dict()
    sizes = Counter[str]()
    for link in links:
        for name, rows in zip(link.theirs, link.rows, strict=True):
            size = math.prod(link.shape) * state[link.ours].element_size() * rows // sum(link.rows)
            sizes[stack_of(name)] += size
    groups = shards(sizes, limit)
    names = [f"{file.stem}-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [file.name]
    in_rows = any("_rows." in name for link in links for name in link.theirs)
    tensors = stack(published_tensors(model, links), stack_of, join_rows if in_rows else join_slices)
    file.parent.mkdir(exist_ok=True)
    for name, group in zip(names, groups, strict=True):
        write_tensors({key: tensor for key, tensor in (next(tensors) for _ in group)}, file.with_name(name))
    if len(groups) > 1:
        owner = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        index = {"metadata": {"total_size": sizes.total()}, "weight_map": owner}
        _write_json(file.with_name(f"{file.name}.index.json"), index)


def _unsharded(link: Link) -> Link:
    """Return the link of a whole tensor for a tensor of a split model."""
    if not (layout := current().layout(link.ours)):
        return link
    return replace(link, shape=layout.shape, rows=layout.parts if len(link.rows) > 1 else (sum(layout.parts),))


def _write_texts(config: dict[str, Any], dtype: str, tokenizer: Any, stage: Path, file: str) -> None:
    ids: dict[str, Any] = {f"{role}_token_id": None for role in ROLES}
    if tokenizer is not None:
        tokenizer.save(stage)
        ids = dict(zip(ids, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True))
        settings = generation_config(tokenizer) | {key: config[key] for key in GENERATION if key in config}
        _write_json(stage / GENERATION_CONFIG, settings)
    for part in (PREPROCESSOR, PROCESSOR):
        if (content := config.pop(part, None)) is not None:
            _write_json(stage / f"{part}.json", content)
    _write_json(stage / file, ids | config | {"dtype": dtype, "torch_dtype": dtype})


def generation_config(tokenizer: Any) -> dict[str, Any]:
    """Return the content of generation_config.json for a tokenizer's model: recommended settings, and the ids that
    begin, end and pad a text."""
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    ends = sorted(tokenizer.stop_ids)
    ids |= {"eos_token_id": ends} if len(ends) > 1 else {}
    return tokenizer.generation_config | {key: value for key, value in ids.items() if value is not None}


def _write_diffusers(config: dict[str, Any], dtype: str, tokenizer: Any, stage: Path) -> None:
    """Write the JSON files of a network or a pipeline, and the tokenizer, which records the length that texts are
    padded to."""
    for name, content in pipeline.json_files(config, dtype).items():
        _write_json(stage / name, content)
    if tokenizer is not None:
        (stage / pipeline.TOKENIZER).mkdir()
        length = config["text_encoder"]["max_position_embeddings"]
        tokenizer.replace(max_length=length).save(stage / pipeline.TOKENIZER)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _move(stage: Path, directory: Path) -> None:
    """Sync the new files, rename them into the directory, and delete stale files.

    The weights are renamed first. The files that identify the model are renamed last, after the others' names are on
    disk.
    """
    new_files = {file.relative_to(stage): file for file in stage.rglob("*") if file.is_file()}
    groups: dict[int, list[Path]] = {0: [], 1: [], 2: []}
    for name in sorted(new_files, key=lambda name: (".safetensors" not in name.name, name.name)):
        groups[2 if name.name == pipeline.PIPELINE else name.name in CONFIGS].append(name)
    new = [name for group in groups.values() for name in group]
    for name in new:
        with new_files[name].open("rb+") as file:
            os.fsync(file.fileno())
    (stage / MOVING).touch()
    for group in groups.values():
        for name in group:
            (directory / name).parent.mkdir(exist_ok=True)
            new_files[name].replace(directory / name)
        for folder in {directory, *((directory / name).parent for name in group)}:
            sync(folder)
    stale = [*directory.glob("model-*-of-*.safetensors")]
    stale += [old for part in pipeline.OF_TRANSFORMERS for old in directory.glob(f"{part}/model*.safetensors*")]
    folders = {part for files_of_pipeline in pipeline.PIPELINES.values() for part in files_of_pipeline.models} - {
        *pipeline.OF_TRANSFORMERS
    }
    stale += [old for part in (".", *folders) for old in directory.glob(f"{part}/diffusion_pytorch_model*")]
    stale += [directory / name for name in (WEIGHTS, INDEX, pipeline.PIPELINE, *CONFIGS)]
    if Path("tokenizer_config.json") in new:  # otherwise files of an older tokenizer would be read too
        stale += [directory / name for name in TOKENIZER_FILES]
    for old in stale:
        if old.relative_to(directory) not in new:
            old.unlink(missing_ok=True)
