"""The load plan: which tensors of a file make up each parameter of a model, for every format; and the load report.

A plan is made only from names, shapes and types, so a load report reads no weights; `LoadPlan.fill` reads them. "Ours"
are the model's tensors, "theirs" the file's. Axes: those of the stored tensors.
"""

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import cached_property, partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from keifu.checkpoints.hf.weight_names import Link, Table, links, matches
from keifu.checkpoints.registry import Family, build
from keifu.devices import device_choice, has_bfloat16
from keifu.errors import UserError
from keifu.layers.lazy import Index, LazyTensor, TensorReader
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models.registration.arrangement import Arrangement
from keifu.native.compiler import Unavailable
from keifu.native.describe import describe
from keifu.native.library import switched_off
from keifu.native.pack import Blocks
from keifu.processes import current
from keifu.untrusted import reading

NAMED = 10  # the most tensors of a group that an error lists
# Unquantised number types of floating point in a file.
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# fields of a Config that count layers, in all or for each level
COUNTS = ("n_layers", "n_decoder_layers", "n_residual_blocks", "layers")
# the least numbers of an expert's matrix in a stack: smaller ones need more memory for their names than in the file
LEAST = 8
# number of experts that a config may have even if the file has fewer tensors: perhaps no layer has experts
USUAL_EXPERTS = 1024
HUGE = 1e19  # a weight beyond it gives infinity and then NaN, in a norm or in attention
FIRST = ("activation", "norm_eps", "rope_theta", "rope_scaling", "context_length", "sliding_window", "tied")


class StoredTensor(NamedTuple):
    """A tensor in a file: its shape, the file's name of its type, and its dtype when read; None if it cannot be
    read."""

    shape: tuple[int, ...]
    format: str
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Source:
    """An open model file or folder.

    read: returns one tensor by its name in the file. tokenizer: loads the tokenizer. names: the file's table of weight
    names. head_dim: the size of a rotary head if the rows of q and k are stored with interleaved pairs. part: reads
    some rows and columns of a tensor. blocks: returns the stored blocks of a quantised tensor (GGUF). arrangements:
    those of tensors that the file arranges in another way.
    """

    path: Path
    format: str
    family: Family
    config: Any
    stored: Mapping[str, StoredTensor]
    read: Callable[[str], Tensor]
    tokenizer: Callable[[], Any]
    names: Table
    head_dim: int | None = None
    notes: tuple[str, ...] = ()
    blocks: Callable[[str], Blocks | None] | None = None
    part: Callable[[str, Index], Tensor] | None = None
    arrangements: Mapping[str, Arrangement] = field(default_factory=dict)

    def read_part(self, name: str, index: Index) -> Tensor:
        """Return some rows and columns of a tensor of the file. If the file has no function for parts, read the whole
        tensor first."""
        return self.part(name, index) if self.part and index else self.read(name)[index]

    @cached_property
    def has_prefix(self) -> bool:
        """Whether the file's names have the family's prefix: some files omit it from all names."""
        return any(name.startswith(self.family.prefix) for name in self.stored)

    def stored_name(self, name: str) -> str:
        """Return the name of a tensor in this file, which may lack the family's prefix or have an older form."""
        name = name if self.has_prefix else name.removeprefix(self.family.prefix)
        endings, beginnings = self.family.old_endings.items(), self.family.old_beginnings.items()
        older = [name.removesuffix(new) + old for new, old in endings if name.endswith(new)]
        older += [old + name.removeprefix(new) for new, old in beginnings if name.startswith(new)]
        return next((one for one in (name, *older) if one in self.stored), name)


@dataclass(frozen=True)
class LoadPlan:
    """Plan of a load: the model on the meta device, its links, its dtype in memory, and notes for the report.

    exact: the narrowest dtype that represents every stored number. dtype: the dtype to use. skipped: tensors of the
    file that are not weights of the model, or duplicates.
    """

    source: Source
    model: nn.Module
    links: Sequence[Link]
    exact: torch.dtype
    dtype: torch.dtype
    skipped: Sequence[str]
    notes: Sequence[str]

    @property
    def parameters(self) -> int:
        """The number of the model's parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fill(self, device: torch.device | str = "cpu", without: Container[str] = ()) -> nn.Module:
        """Return the model with its weights on a device, in evaluation mode. Each tensor is read directly to the
        device.

        On a CPU, weights that need no conversion stay memory-mapped. If the model will be split over processes, weights
        are read when they are used, so that each process reads only its part. Parameters named in `without` get a shape
        and dtype but no numbers.
        """
        target = torch.device(device)
        if target.type == "mps" and self.dtype == torch.float64:  # Apple's GPU has no float64
            target = torch.device("cpu")
        with reading(self.source.path), ThreadPoolExecutor(torch.get_num_threads()) as workers:
            read_parameter = self._tensor if current().is_replicated else self._lazy
            state = dict(
                workers.map(partial(read_parameter, device=target), (x for x in self.links if x.ours not in without))
            )
        state |= {link.ours: self._like(link, target) for link in self.links if link.ours in without}
        self.model.load_state_dict(state, assign=True)
        return self.model.eval()

    def dtype_of(self, link: Link) -> torch.dtype:
        """Return the dtype of a tensor in memory. Tensors that the family needs in full precision keep the file's
        dtype."""
        stored = self.source.stored[link.theirs[0]].dtype
        keeps = stored is not None and matches(link.ours, self.source.family.full_precision)
        return torch.promote_types(stored, self.dtype) if stored is not None and keeps else self.dtype

    def _tensor(self, link: Link, device: torch.device) -> tuple[str, Tensor]:
        tensors = (link.subtract_offset(self.source.read(name)) for name in link.theirs)
        dtype = self.dtype_of(link)
        return link.ours, link.join([x.to(device, dtype if x.is_floating_point() else None) for x in tensors])

    def _lazy(self, link: Link, device: torch.device) -> tuple[str, Tensor]:
        if not link.shape or not torch.is_floating_point(self.model.state_dict()[link.ours]):
            return self._tensor(link, device)
        reader = TensorReader(partial(link.read, self.source.read_part))
        return link.ours, LazyTensor.of(reader, self._like(link, device))

    def _like(self, link: Link, device: torch.device) -> Tensor:
        return torch.empty((), dtype=self.dtype_of(link), device=device).expand(link.shape)


def plan(
    source: Source, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", predictions: bool = False
) -> LoadPlan:  # fmt: skip
    """Match the file's tensors with the model's. Raises one UserError for all tensors that are missing, extra or
    misshapen.

    dtype: None uses the type of the command line (`Choice.weights`), or the one that represents every stored number
    exactly, but float32 for one that a CPU multiplies very slowly (see `_usual_dtype`). predictions: whether to read
    the blocks that predict further tokens.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"dtype is {dtype!r}: give a floating-point type of torch, such as torch.bfloat16.")
    if not device_choice().allow_nonfinite:
        read_tensor, part = (partial(read_finite, reader, source.path) for reader in (source.read, source.read_part))
        source = replace(source, read=read_tensor, part=part)
    source, twice, notes = _resolve_aliases(source) if source.family.aliases else _resolve_tied_head(source)
    source, copies = _resolve_dialect(source)
    twice = [*twice, *copies]
    source = _resolve_predictions(source, predictions)
    refuse_absurd_sizes(source)
    model = build(source.family, source.config, str(source.path))
    all_links = [
        replace(link, theirs=tuple(map(source.stored_name, link.theirs)))
        for link in permute_rotary(links(model, source.names, source.arrangements), source.head_dim)
    ]
    used_names = {name for link in all_links for name in link.theirs}
    patterns = _omitted(source)
    patterns += [pattern.removeprefix(source.family.prefix) for pattern in patterns]
    skipped = [name for name in source.stored if name not in used_names and (name in twice or matches(name, patterns))]
    _check(source, all_links, set(source.stored) - used_names - set(skipped))
    rounded_names = {
        name for link in all_links if not matches(link.ours, source.family.full_precision) for name in link.theirs
    }
    exact = _exact_dtype({name: source.stored[name] for name in rounded_names}, source.path)
    target_dtype = dtype or _usual_dtype(source, rounded_names, exact, torch.device(device), model)
    return LoadPlan(source, model, all_links, exact, target_dtype, skipped, [*source.notes, *notes])


def refuse_absurd_sizes(source: Source) -> None:
    """Raise UserError if a config asks for more layers or experts than the file can have: a damaged config could name
    10^15, and to build them would take forever."""
    parts = [settings(source.config), *(vars(part) for part in vars(source.config).values() if is_dataclass(part))]
    counts = [part.get(key) or 0 for part in parts for key in COUNTS]
    n_layers = max(layer for count in counts for layer in (count if isinstance(count, tuple) else (count,)))
    n_experts = max(part.get("n_experts") or 0 for part in parts)
    n_tensors = len(source.stored)
    if n_layers > n_tensors:  # each layer has at least one tensor
        raise UserError(f"{source.path} has {n_tensors} tensors, too few for its config's {n_layers} layers.")
    if n_experts > max(n_tensors, USUAL_EXPERTS):  # experts may be stacked in one tensor
        raise UserError(f"{source.path} has {n_tensors} tensors, too few for its config's {n_experts} experts.")
    n_numbers = sum(math.prod(tensor.shape) for tensor in source.stored.values())
    if n_experts * n_layers > max(n_numbers // LEAST**2, 16 * USUAL_EXPERTS):  # each has a matrix of LEAST x LEAST
        raise UserError(f"{source.path} has {n_numbers} numbers, too few for {n_experts} experts in {n_layers} layers.")


def is_stack(shape: Sequence[int]) -> bool:
    """Return whether a tensor (experts, ...) is large enough to name each expert: some damaged files have 10^15
    experts."""
    return math.prod(shape) >= LEAST * shape[0] > 0


def _usual_dtype(
    source: Source, names: set[str], exact: torch.dtype, device: torch.device, model: nn.Module
) -> torch.dtype:
    """Return the dtype that was chosen for running models, or the usual one for the stored dtype. names: those of the
    tensors in the file whose dtypes count.

    A CPU multiplies float16 very slowly, and bfloat16 too if it has no instructions for it and PyTorch computes.
    """
    dtype_name = device_choice().weights
    matrices = {name: source.stored[name] for name in names if len(source.stored[name].shape) > 1}
    if device.type != "cpu" and source.format == "GGUF" and matrices:
        exact = _exact_dtype(matrices, source.path)  # in every GGUF file vectors are in F32
    if dtype_name not in (None, "auto"):
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype_name]
    if device.type == "cpu":
        slow = exact == torch.bfloat16 and not has_bfloat16(device) and not _runs_natively(model)
        return torch.float32 if slow or exact == torch.float16 else exact
    return torch.bfloat16 if dtype_name and exact == torch.float32 and has_bfloat16(device) else exact


def _runs_natively(model: nn.Module) -> bool:
    """Return whether native code computes all of a bfloat16 model."""
    if switched_off() or not isinstance(model, DecoderLM):
        return False
    try:
        describe(model)
    except Unavailable:
        return False
    return True


def damaged_numbers(tensor: Tensor) -> int:
    """Return how many numbers are not finite, or so large that the square overflows in float32; usually the sum shows
    in one pass that there are none."""
    if not tensor.is_floating_point() or tensor.sum(dtype=torch.float32).abs() < HUGE:
        return 0
    return int(tensor.numel() - (tensor.float().abs() < HUGE).sum())


def read_finite(read: Callable[..., Tensor], path: Path, name: str, *index: Index) -> Tensor:
    """Return a tensor of the file. Raises UserError if it has numbers that are not finite (see
    `damaged_numbers`)."""
    tensor = read(name, *index)
    if wrong := damaged_numbers(tensor):
        raise UserError(
            f"{path} has {wrong:,} numbers in {name} that are not finite, or beyond 1e19: it is damaged, or its "
            "training failed; --allow-nonfinite (allow_nonfinite=True) loads it all the same."
        )
    return tensor


def settings(config: Any) -> dict[str, Any]:
    """Return the fields of a Config. A nested Config `decoder` is replaced by its fields."""
    fields = dict(vars(config))
    inner = fields.pop("decoder", None)
    return fields | (vars(inner) if inner else {})


def _resolve_tied_head(source: Source) -> tuple[Source, Sequence[str], list[str]]:
    """Resolve weight tying. Return the source with `tied` corrected to what the file has, duplicate names, and notes
    for the report."""
    family = source.family
    ours = [f"{family.inside}{part}" for part in ("head", "embedding")]
    if source.names is None or ours[0] not in source.names:  # a Config with a head that can be tied has `tied`
        return source, (), []
    head, embedding = (source.stored_name(f"{source.names[part]}.weight") for part in ours)
    if not source.config.tied:
        if head in source.stored or not family.inside:
            return source, (), []
        note = f"There is no {head}, since the task needs none: {embedding} is read for it."
        return replace(source, config=family.tie(source.config, True)), (), [note]
    if head not in source.stored:
        return source, (), [f"The head is the embedding, {embedding}."]
    if embedding not in source.stored:
        names = {**source.names, ours[1]: source.names[ours[0]]}
        return replace(source, names=names), (), [f"The embedding is the head, {head}: the file holds that one."]
    if source.stored[head] == source.stored[embedding] and torch.equal(source.read(head), source.read(embedding)):
        return source, (head,), [f"The head is the embedding: {head} equals {embedding}."]
    note = f"The config ties the head to the embedding, but {head} differs from {embedding}: they are kept apart."
    return replace(source, config=family.tie(source.config, False)), (), [note]


def _resolve_aliases(source: Source) -> tuple[Source, Sequence[str], list[str]]:
    """Resolve matrices that are shared and may have several names. Return the source, duplicate names, and notes for
    the report.

    A head that differs from the embedding it is tied to is untied.
    """
    assert source.names is not None and source.family.aliases is not None
    names, twice, notes, tied = dict(source.names), list[str](), list[str](), source.config.tied
    for ours, other_names in source.family.aliases(source.config).items():
        there = [name for name in (names[ours], *other_names) if f"{name}.weight" in source.stored]
        first = there[0] if there else names[ours]
        for name in there[1:]:
            if torch.equal(source.read(f"{first}.weight"), source.read(f"{name}.weight")):
                twice.append(f"{name}.weight")
            elif name == names["head"]:
                tied = False
                notes.append(f"The config ties {name} to {first}, but they differ: they are kept apart.")
        if first != names[ours]:
            notes.append(f"{names[ours]} is not in the file: {first}, which is the same matrix, is read for it.")
        names[ours] = first
    return replace(source, names=names, config=replace(source.config, tied=tied)), twice, notes


def _resolve_dialect(source: Source) -> tuple[Source, list[str]]:
    """Set fields of the Config for optional parts that the file has. Return the source, and the names of duplicate
    tensors."""
    family, stored = source.family, source.stored
    has = {field: True for field, name in family.in_file.items() if source.stored_name(name) in stored}
    copies = {copy: source.stored_name(name) for copy, name in family.copies.items() if copy in stored}
    same = [copy for copy, name in copies.items() if name in stored and torch.equal(*map(source.read, (copy, name)))]
    return replace(source, config=replace(source.config, **has)), same


def _resolve_predictions(source: Source, are_read: bool) -> Source:
    """Return the source with a Config that has the file's prediction blocks, or none if they are not read.

    A config that does not mention them has one block. Raises UserError if there are no blocks to read.
    """
    patterns = _filled(source, source.family.predictions)
    if not are_read:
        return replace(source, config=replace(source.config, n_predictions=0)) if patterns else source
    if not any(matches(name, patterns) for name in source.stored):
        raise UserError(f"{source.path} has no tensors that predict further tokens: load it without predictions.")
    return replace(source, config=replace(source.config, n_predictions=source.config.n_predictions or 1))


def _omitted(source: Source) -> list[str]:
    """Return the patterns of tensors that are not read."""
    family = source.family
    further_patterns = () if family.predictions and source.config.n_predictions else family.predictions
    return _filled(source, (*family.not_weights, *further_patterns))


def _filled(source: Source, patterns: Iterable[str]) -> list[str]:
    return [pattern.format(**vars(source.config)) for pattern in patterns]


def permute_rotary(links: Iterable[Link], head_dim: int | None) -> list[Link]:
    """Mark the queries and keys of attention as stored with interleaved rotary pairs, if `head_dim` is not None."""
    if head_dim is None:
        return list(links)
    joined = (".attention.qkv.weight", ".attention.qkv.bias")
    return [replace(link, turned=(head_dim, head_dim, 0)) if link.ours.endswith(joined) else link for link in links]


def _check(source: Source, links: Sequence[Link], extra: set[str]) -> None:
    expected = {name: shape for link in links for name, shape in zip(link.theirs, link.stored_shapes(), strict=True)}
    stored = {name: tensor.shape for name, tensor in source.stored.items()}
    if wrong := misfits(expected, stored, extra, "the model", "the config asks for"):
        model_type = source.family.model_type
        raise UserError(f"The tensors of {source.path} are not those of its {model_type!r} config: {wrong}.")


def misfits(
    expected: Mapping[str, Sequence[int]], stored: Mapping[str, Sequence[int]], extra: set[str], title: str, asks: str
) -> str:
    """Describe mismatches between a file's tensors and the expected ones; "" if there are none.

    extra: tensors of the file that are not part of the model. title: the model's name in errors. asks: the phrase
    before an expected shape.
    """
    shapes = [
        f"{name} is {list(stored[name])} where {asks} {list(shape)}"
        for name, shape in expected.items()
        if name in stored and tuple(stored[name]) != tuple(shape)
    ]
    missing_names = [name for name in expected if name not in stored]
    groups = ("missing", missing_names), (f"not part of {title}", sorted(extra)), ("of another shape", shapes)
    return "; ".join(f"{len(names)} {what} ({_list_names(names)})" for what, names in groups if names)


def _list_names(names: Sequence[str]) -> str:
    n_omitted = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {n_omitted} more" if n_omitted > 0 else "")


def _exact_dtype(stored: Mapping[str, StoredTensor], path: Path) -> torch.dtype:
    """Return the narrowest dtype that represents all these tensors exactly."""
    unread = [f"{name} as {tensor.format}" for name, tensor in stored.items() if tensor.dtype is None]
    if unread:
        raise UserError(f"{path} stores {_list_names(unread)}, which keifu does not read; convert it to BF16 or F32.")
    kinds = {tensor.dtype for tensor in stored.values() if tensor.dtype is not None}
    return reduce(torch.promote_types, {dtype for dtype in kinds if dtype.is_floating_point})


def name_of(dtype: torch.dtype) -> str:
    """Return PyTorch's name of a dtype, as configs write it."""
    return str(dtype).removeprefix("torch.")


def check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    """Raise UserError for a tokenizer with more ids than the model has embeddings."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens and the model embeds {vocab_size:,}: they do not "
            "belong together; use the tokenizer that the model was trained with."
        )


@dataclass(frozen=True)
class Row:
    """One tensor of the model: its name, shape and dtype, the file's tensors for it, their type, and the conversion
    (`done`)."""

    ours: str
    shape: tuple[int, ...]
    dtype: str
    theirs: tuple[str, ...]
    stored: str
    done: str


@dataclass(frozen=True)
class Report:
    """Everything that loading would do. `str()` returns a table for people, `as_dict()` plain values for programs."""

    path: str
    format: str
    family: str
    parameters: int
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    skipped: Sequence[str]
    notes: Sequence[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        head = [f"{self.path}: {self.format}, family {self.family}, {self.parameters:,} parameters"]
        settings = [f"  {key:16} {'none' if value is None else value}" for key, value in self.settings.items()]
        skipped = [f"Not weights, or there twice, and left out: {', '.join(self.skipped)}."] if self.skipped else []
        return "\n".join([*head, *settings, "", *_aligned(self.rows), "", *self.notes, *skipped])


def report(plan: LoadPlan) -> Report:
    """Return the report of a plan."""
    source, config = plan.source, settings(plan.source.config)
    ordered = {key: config[key] for key in sorted(config, key=lambda key: key not in FIRST)}
    rows = [_row(link, plan) for link in plan.links]
    family, path, notes = source.family.model_type, str(source.path), [*plan.notes]
    if plan.exact != plan.dtype:
        slow = (plan.exact, plan.dtype) == (torch.float16, torch.float32)
        why = ": products in float16 are very slow on a CPU" if slow else ""
        notes.append(f"The weights are {name_of(plan.exact)} and are held in {name_of(plan.dtype)}{why}.")
    return Report(path, source.format, family, plan.parameters, ordered, rows, plan.skipped, notes)


def _row(link: Link, plan: LoadPlan) -> Row:
    stored = plan.source.stored
    kinds = ", ".join(dict.fromkeys(stored[one].format for one in link.theirs))
    dtype = torch.int64 if kinds == "I64" else plan.dtype_of(link)
    steps = {
        "dequantised": any(stored[one].format not in (*PLAIN, "I64") for one in link.theirs),
        "joined": len(link.theirs) > 1,
        "transposed": link.transposed,
        "rearranged": link.arrangement is not None,
        f"{link.offset:g} subtracted": bool(link.offset),
        "rotary pairs moved to halves": any(link.turned),
        f"cast to {name_of(dtype)}": any(stored[one].dtype != dtype for one in link.theirs),
    }
    done = ", ".join(step for step, yes in steps.items() if yes)
    return Row(link.ours, link.shape, name_of(dtype), link.theirs, kinds, done)


def _aligned(rows: Sequence[Row]) -> list[str]:
    lines = [("ours", "shape", "theirs", "stored", "done")]
    lines += [(r.ours, " x ".join(map(str, r.shape)), " + ".join(r.theirs), r.stored, r.done) for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
