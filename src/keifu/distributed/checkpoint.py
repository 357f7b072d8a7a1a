"""States of a split model, by torch's distributed checkpoints: each process writes and reads its parts as safetensors.

A state is written by a thread while training goes on, next to its name. Each process hashes its file as it writes it;
the JSON file with the hashes comes last. The matrices of a joined parameter are stored as `name#0`, `name#1`, ..., so
that any mesh can read them, and one process too.
"""

import hashlib
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
    """A part of a larger tensor as torch's checkpoints know it: chunks, by their offsets in the whole."""

    chunks: dict[torch.Size, Tensor]
    whole: torch.Size

    @classmethod
    def of(cls, chunks: Mapping[tuple[int, ...], Tensor], whole: tuple[int, ...]) -> "Chunks":
        """Index chunks by their offsets."""
        made = torch.Tensor._make_subclass(cls, torch.empty(0))
        made.chunks = {torch.Size(offset): chunk for offset, chunk in chunks.items()}
        made.whole = torch.Size(whole)
        return made

    def size(self) -> torch.Size:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the size of the whole, which a state's tensors are compared with."""
        return self.whole

    def __create_write_items__(self, name: str, tensor: "Chunks") -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(next(iter(self.chunks.values())))
        data = [TensorWriteData(chunk, properties, self.whole) for chunk in self.__create_chunk_list__()]
        return [WriteItem(MetadataIndex(name, x.chunk.offsets), WriteItemType.SHARD, tensor_data=x) for x in data]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, chunk.shape) for offset, chunk in self.chunks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.chunks[torch.Size(index.offset or ())]


class Staging:
    """Memory of the host for the copies of a state that are written, of GPUs' tensors pinned and the same for all
    states."""

    def __init__(self):
        self.buffers: dict[Any, Tensor] = {}

    def copy(self, name: Any, tensor: Tensor) -> Tensor:
        """Return a copy on the host, which of a GPU's tensor is there when the GPU comes to it (see `mark`)."""
        if isinstance(tensor, Chunks):
            chunks = tensor.chunks.items()
            return Chunks.of({offset: self.copy((name, offset), chunk) for offset, chunk in chunks}, tensor.whole)
        if tensor.device.type == "cpu":
            return tensor.clone()
        buffer = self.buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = self.buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return buffer.copy_(tensor, non_blocking=True)

    @staticmethod
    def mark(tensors: Iterable[Tensor]) -> list[Any]:
        """Return CUDA events that are done when the tensors' GPUs have made all copies requested so far."""
        gpus = {tensor.device for tensor in tensors} - {torch.device("cpu")}
        return [torch.get_device_module(gpu).current_stream(gpu).record_event() for gpu in gpus]


class HashedFile(BufferedWriter):
    """A new file that is hashed as it is written."""

    def __init__(self, path: Path):
        super().__init__(FileIO(path, "wb"))
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return super().write(data)


class HashedFiles(FileSystem):
    """Files of one process, with their hashes by their names."""

    def __init__(self):
        self.hashes: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with HashedFile(path) as file:
            yield file
        self.hashes[Path(path).name] = file.digest.hexdigest()


class Writer(HuggingFaceStorageWriter):
    """Writer of this process's file. On the first process `hashes` are those of all files after the end."""

    def __init__(self, folder: Path):
        super().__init__(str(folder), save_distributed=True)
        self.fs = HashedFiles()
        self.per_thread_copy_ahead = 0  # the copies are on the host: the thread uses no GPU, which would be the first
        self.hashes: dict[str, str] = {}

    def write_data(self, plan: Any, planner: Any) -> futures.Future[list[WriteResult]]:
        """Write the file; its hash alone goes to the first process, not the place of every tensor."""
        super().write_data(plan, planner).wait()
        written = futures.Future[list[WriteResult]]()
        written.set_result([WriteResult(MetadataIndex(name), 0, digest) for name, digest in self.fs.hashes.items()])
        return written

    def finish(self, metadata: Any, results: list[list[WriteResult]]) -> None:
        self.hashes = {result.index.fqn: result.storage_data for part in results for result in part}


class States:
    """Writer of the states of a run whose model is split over a pod; `main`: whether this process is the first."""

    def __init__(self, main: bool):
        self.main = main
        self.group: Any = distributed.new_group(backend="gloo")  # the thread's own, beside those of training
        self.thread = ThreadPoolExecutor(1)
        self.written: Future[None] | None = None
        self.staging = Staging()
        self.plans = uuid4().hex  # under which torch keeps the plan of the state before, which most states have too

    def save(
        self, pod: Pod, directory: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any],
        prune: Callable[[int], None],
    ) -> None:  # fmt: skip
        """Copy the tensors, and let a thread write them; where the state before could not be written, an error."""
        self.flush()
        if self.main:
            shutil.rmtree(_beside(checkpoint.folder(directory, step)), ignore_errors=True)
        distributed.barrier(self.group)
        parts = chunked(pod, tensors, apart=True)
        copies = {name: self.staging.copy(name, tensor) for name, tensor in parts.items()}
        copied = self.staging.mark(tensors.values())
        commit = partial(checkpoint.commit, directory, step, prune=prune)
        folder = checkpoint.folder(directory, step)
        self.written = self.thread.submit(self._write, folder, copies, copied, dict(facts), commit)

    def flush(self) -> None:
        """Wait until the last state is on disk; a `UserError` if it is not."""
        error, self.written = self.written and self.written.exception(), None
        self.plans = uuid4().hex if error else self.plans  # which not all processes may have
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
        part = _beside(folder)
        writer, planner = Writer(part), DefaultSavePlanner(enable_plan_caching=True)
        planner._cached_plans_key = self.plans
        dcp.save(copies, storage_writer=writer, planner=planner, process_group=self.group)  # pyright: ignore
        failed: list[Exception | None] = [None]
        if self.main:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                sync(part)
                part.rename(folder)
                commit({"files": dict(sorted(writer.hashes.items())), **facts})
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
    """Return tensors of a run by the names of a state, as parts of the whole ones; apart: joined matrices as one name
    each."""
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
    """Return the folder that a state is written to before it is whole."""
    return folder.with_name(f".{folder.name}.part")
