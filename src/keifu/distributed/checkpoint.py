"""States of a split model, by torch's distributed checkpoints: each process writes and reads its parts as safetensors.

A state is written by a thread while training goes on, beside its name; its JSON file comes last. The matrices of a
joined parameter are stored as `name#0`, `name#1`, ..., so that any mesh can read them, and one process too.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from keifu.distributed.pod import Pod
from keifu.errors import UserError
from keifu.files import sha256
from keifu.processes import local as local_part
from keifu.training.run import checkpoint


class Chunks(Tensor):
    """A part of a larger tensor as torch's checkpoints know it: chunks, by their offsets in the whole."""

    chunks: dict[torch.Size, Tensor]
    whole: torch.Size

    @classmethod
    def of(cls, chunks: Mapping[tuple[int, ...], Tensor], whole: tuple[int, ...]) -> "Chunks":
        """Chunks by their offsets."""
        made = torch.Tensor._make_subclass(cls, torch.empty(0))
        made.chunks = {torch.Size(offset): chunk for offset, chunk in chunks.items()}
        made.whole = torch.Size(whole)
        return made

    def size(self) -> torch.Size:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the size of the whole, which a state's tensors are compared with."""
        return self.whole

    def to(self, *target: Any, **how: Any) -> "Chunks":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Chunks.of({offset: chunk.to(*target, **how) for offset, chunk in self.chunks.items()}, self.whole)

    def __create_write_items__(self, name: str, tensor: "Chunks") -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(next(iter(self.chunks.values())))
        data = [TensorWriteData(chunk, properties, self.whole) for chunk in self.__create_chunk_list__()]
        return [WriteItem(MetadataIndex(name, x.chunk.offsets), WriteItemType.SHARD, tensor_data=x) for x in data]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, chunk.shape) for offset, chunk in self.chunks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.chunks[torch.Size(index.offset or ())]


class States:
    """Writer of the states of a run whose model is split over a pod; `main`: whether this process is the first."""

    def __init__(self, main: bool):
        self.main = main
        self.group: Any = distributed.new_group(backend="gloo")  # the thread's own, beside those of training
        self.thread = ThreadPoolExecutor(1)
        self.written: Future[None] | None = None

    def save(
        self, pod: Pod, directory: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any],
        prune: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Copy the tensors, and let a thread write them; where the state before could not be written, an error."""
        self.flush()
        if self.main:
            shutil.rmtree(_beside(checkpoint.folder(directory, step)), ignore_errors=True)
        distributed.barrier(self.group)
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in chunked(pod, tensors, apart=True).items()}
        commit = partial(checkpoint.commit, directory, step, prune=prune)
        self.written = self.thread.submit(self._write, checkpoint.folder(directory, step), copies, dict(facts), commit)

    def flush(self) -> None:
        """Wait until the last state is on disk; a `UserError` where it is not."""
        error, self.written = self.written and self.written.exception(), None
        if isinstance(error, dcp.api.CheckpointException):
            number, (reason, _) = next(iter(error.failures.items()))
            raise UserError(f"Process {number} could not write its part of the state: {reason}.") from error
        if error:
            raise UserError(f"The state could not be written: {error}.") from error

    def _write(self, folder: Path, copies: dict[str, Any], facts: dict[str, Any], commit: Callable[..., None]) -> None:
        part = _beside(folder)
        writer = HuggingFaceStorageWriter(str(part), save_distributed=True)
        dcp.save(copies, storage_writer=writer, process_group=self.group)  # pyright: ignore
        failed: list[Exception | None] = [None]
        if self.main:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)
                files = {file.name: sha256(file) for file in sorted(folder.iterdir())}
                commit({"files": files, **facts})
            except (OSError, UserError) as error:
                failed = [error]
        distributed.broadcast_object_list(failed, group=self.group)  # so that all leave the next state out, or none
        if failed[0]:
            raise failed[0]


def load(pod: Pod, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill tensors with this process's parts of a state, a folder or a file; return the state's other ones, whole."""
    with tempfile.TemporaryDirectory() as folder:
        if path.is_file():  # a state of one process
            Path(folder, path.name).symlink_to(path.resolve())
        return checkpoint.read_sharded(Path(folder) if path.is_file() else path, chunked(pod, tensors, path.is_dir()))


def chunked(pod: Pod, tensors: Mapping[str, Tensor], apart: bool) -> dict[str, Tensor]:
    """Tensors of a run by the names of a state, as parts of the whole ones; apart: joined matrices as one name each."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner = next((part for part in (_inner(name), _inner(name).rpartition(".")[0]) if part in pod.layouts), "")
        local = local_part(tensor)
        if not owner or not local.dim():
            joined[name] = local
            continue
        layout, chunks = pod.layouts[owner], {}
        starts = [min(rows[number].start for rows in layout.rows) for number in range(len(layout.parts))]
        for piece in layout.pieces(*pod.place):
            several = apart and len(starts) > 1
            key = f"{name}#{piece.part}" if several else name
            offset = piece.row - several * starts[piece.part], piece.column, *[0] * (local.dim() - 2)
            chunks.setdefault(key, {})[offset[: local.dim()]] = local[piece.start : piece.stop]
        for key, parts in chunks.items():
            rows = layout.parts[int(key.rpartition("#")[2])] if key != name else layout.shape[0]
            joined[key] = Chunks.of(parts, (rows, *layout.shape[1:]))
    return joined


def _inner(name: str) -> str:
    """Return the name of the parameter in `model.NAME`, `optimisers.average.NAME` and `optimisers.KIND.NAME`."""
    first, _, rest = name.partition(".")
    return rest if first == "model" else rest.partition(".")[2]


def _beside(folder: Path) -> Path:
    """Where a state is written before it is whole."""
    return folder.with_name(f".{folder.name}.part")
