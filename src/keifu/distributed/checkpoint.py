"""Checkpoints of a split model, with torch.distributed.checkpoint: each rank writes and reads its shards as
safetensors.

A thread writes a checkpoint into a temporary folder while training goes on. Each rank hashes its file while it writes
it. The JSON file with the hashes is written last. The matrices of a joined parameter (such as q, k and v) are stored
separately as `name#0`, `name#1`, ..., so that any mesh, or one process, can read them.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, distributed, futures
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from keifu.distributed.pod import Pod
from keifu.errors import UserError
from keifu.files import sync
from keifu.processes import local as local_part
from keifu.training.run import checkpoint


class Chunks(Tensor):
    """Shards of one larger tensor, in the form that torch.distributed.checkpoint reads and writes: offset → chunk."""

    chunks: dict[torch.Size, Tensor]
    full_shape: torch.Size

    @classmethod
    def of(cls, chunks: Mapping[tuple[int, ...], Tensor], full_shape: tuple[int, ...]) -> "Chunks":
        """Create a `Chunks` from chunks by their offsets in the whole tensor, and the shape of the whole tensor."""
        self = torch.Tensor._make_subclass(cls, torch.empty(0))
        self.chunks = {torch.Size(offset): chunk for offset, chunk in chunks.items()}
        self.full_shape = torch.Size(full_shape)
        return self

    def size(self) -> torch.Size:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the size of the whole tensor: the reader compares it with the stored size."""
        return self.full_shape

    def __create_write_items__(self, name: str, tensor: "Chunks") -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(next(iter(self.chunks.values())))
        data = [TensorWriteData(chunk, properties, self.full_shape) for chunk in self.__create_chunk_list__()]
        return [WriteItem(MetadataIndex(name, x.chunk.offsets), WriteItemType.SHARD, tensor_data=x) for x in data]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, chunk.shape) for offset, chunk in self.chunks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.chunks[torch.Size(index.offset or ())]


class Staging:
    """Host memory for the copies of a checkpoint's tensors. Copies of GPU tensors are in pinned memory, which all
    checkpoints reuse.
    """

    def __init__(self):
        self.buffers: dict[Any, Tensor] = {}

    def copy(self, name: Any, tensor: Tensor) -> Tensor:
        """Copy a tensor to the host and return the copy. The copy of a GPU tensor is asynchronous (see `mark`)."""
        if isinstance(tensor, Chunks):
            chunks = tensor.chunks.items()
            return Chunks.of({offset: self.copy((name, offset), chunk) for offset, chunk in chunks}, tensor.full_shape)
        if tensor.device.type == "cpu":
            return tensor.clone()
        buffer = self.buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return buffer.copy_(tensor, non_blocking=True)

    @staticmethod
    def mark(tensors: Iterable[Tensor]) -> list[Any]:
        """Return CUDA events, one per GPU: wait for them before you read copies of these tensors."""
        gpus = {tensor.device for tensor in tensors} - {torch.device("cpu")}
        return [torch.get_device_module(gpu).current_stream(gpu).record_event() for gpu in gpus]


class HashedFile(BufferedWriter):
    """A new file that computes its SHA-256 while it is written."""

    def __init__(self, path: Path):
        super().__init__(FileIO(path, "wb"))
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)

    def close(self) -> None:
        """Sync the file, whose last bytes torch leaves in the buffer when it syncs, and close it."""
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()


class HashedFiles(FileSystem):
    """File system of torch's checkpoint writer that records the hash of each file it writes, by file name."""

    def __init__(self):
        self.hashes: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with HashedFile(path) as file:
            yield file
        self.hashes[Path(path).name] = file.digest.hexdigest()


class Writer(HuggingFaceStorageWriter):
    """Writer of this rank's file. On rank 0, `hashes` contains the hashes of all ranks' files after `finish`."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)
        self.fs = HashedFiles()
        # the copies are already on the host; otherwise the thread would use the first GPU
        self.per_thread_copy_ahead = 0
        self.hashes: dict[str, str] = {}

    def write_data(self, plan: Any, planner: Any) -> futures.Future[list[WriteResult]]:
        """Write the file. Send only its hash to rank 0, not the position of every tensor."""
        super().write_data(plan, planner).wait()
        result = futures.Future[list[WriteResult]]()
        result.set_result([WriteResult(MetadataIndex(name), 0, digest) for name, digest in self.fs.hashes.items()])
        return result

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        self.hashes = {result.index.fqn: result.storage_data for part in results for result in part}


class States:
    """Asynchronous writer of the checkpoints of a split model. main: whether this process is rank 0."""

    def __init__(self, main: bool):
        self.main = main
        # a group for the thread, separate from the groups of training
        self.group: Any = distributed.new_group(backend="gloo")
        self.thread = ThreadPoolExecutor(1)
        self.pending_write: Future[None] | None = None
        self.staging = Staging()
        # the key of torch's cached plan: most checkpoints have the same plan as the one before
        self.plans = uuid4().hex

    def save(
        self, pod: Pod, directory: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any],
        prune: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Copy the tensors to the host, then write them in a thread. Raises UserError if the last checkpoint was not
        written.
        """
        self.flush()
        if self.main:
            shutil.rmtree(_temporary(checkpoint.folder(directory, step)), ignore_errors=True)
        distributed.barrier(self.group)
        parts = chunked(pod, tensors, by_part=True)
        copies = {name: self.staging.copy(name, tensor) for name, tensor in parts.items()}
        copied = self.staging.mark(tensors.values())
        commit = partial(checkpoint.commit, directory, step, prune=prune)
        folder = checkpoint.folder(directory, step)
        self.pending_write = self.thread.submit(self._write, folder, copies, copied, dict(facts), commit)

    def flush(self) -> None:
        """Wait until the last checkpoint is on disk. Raises UserError if it was not written."""
        error, self.pending_write = self.pending_write and self.pending_write.exception(), None
        self.plans = uuid4().hex if error else self.plans  # some ranks may not have cached the plan
        if isinstance(error, dcp.api.CheckpointException):
            number, (reason, _) = next(iter(error.failures.items()))
            raise UserError(f"Process {number} could not write its part of the state: {reason}.") from error
        if error:
            raise UserError(f"The state could not be written: {error}.") from error

    def _write(
        self, folder: Path, copies: dict[str, Any], copied: list[Any], facts: dict[str, Any],
        commit: Callable[..., None],
    ) -> None:  # fmt: skip
        for event in copied:
            event.synchronize()
        part = _temporary(folder)
        writer, planner = Writer(part), DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = self.plans
        dcp.save(copies, storage_writer=writer, planner=planner, process_group=self.group)  # pyright: ignore
        failed: list[Exception | None] = [None]
        if self.main:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                sync(part)
                part.rename(folder)
                sync(folder.parent)
                commit({"files": dict(sorted(writer.hashes.items())), **facts})
            except (OSError, UserError) as error:
                failed = [error]
        distributed.broadcast_object_list(failed, group=self.group)  # all ranks must agree whether it failed
        if failed[0]:
            raise failed[0]


def load(pod: Pod, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fill `tensors` with this rank's shards from a checkpoint (a folder, or the file of one process). Return the
    checkpoint's other tensors, unsharded.
    """
    with tempfile.TemporaryDirectory() as folder:
        if path.is_file():  # written by one process
            Path(folder, path.name).symlink_to(path.resolve())
        return checkpoint.read_sharded(Path(folder) if path.is_file() else path, chunked(pod, tensors, path.is_dir()))


def chunked(pod: Pod, tensors: Mapping[str, Tensor], by_part: bool) -> dict[str, Tensor]:
    """Convert a run's tensors to `Chunks` of the whole tensors, by their names in the checkpoint.

    by_part: give each joined matrix a name (`name#0`, ...). For example q with 4 rows and k with 2 are one parameter of
    6 rows. Of two ranks, each has 2 rows of q and 1 of k. The second rank's chunks are then rows 2 to 3 of `name#0` and
    row 1 of `name#1`, or else rows 2 to 3 and row 5 of `name`.
    """
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        owner = next((part for part in (_inner(name), _inner(name).rpartition(".")[0]) if part in pod.layouts), "")
        local = local_part(tensor)
        if not owner or not local.dim():
            joined[name] = local
            continue
        layout, chunks = pod.layouts[owner], {}
        starts = [min(rows[number].start for rows in layout.rows) for number in range(len(layout.parts))]
        for piece in layout.pieces(*pod.coordinate):
            has_parts = by_part and len(starts) > 1
            key = f"{name}#{piece.part}" if has_parts else name
            offset = piece.row - has_parts * starts[piece.part], piece.column, *[0] * (local.dim() - 2)
            chunks.setdefault(key, {})[offset[: local.dim()]] = local[piece.start : piece.stop]
        for key, parts in chunks.items():
            rows = layout.parts[int(key.rpartition("#")[2])] if key != name else layout.shape[0]
            joined[key] = Chunks.of(parts, (rows, *layout.shape[1:]))
    return joined


def _inner(name: str) -> str:
    """Remove the prefix of a parameter's name: `model.`, `optimisers.average.` or `optimisers.KIND.`."""
    first, _, inner_name = name.partition(".")
    return inner_name if first == "model" else inner_name.partition(".")[2]


def _temporary(folder: Path) -> Path:
    """Return the temporary folder of a checkpoint that is not complete yet."""
    return folder.with_name(f".{folder.name}.part")
