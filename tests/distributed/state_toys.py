"""States of a split model, as its processes write and read them: which bytes each hashes, and what they refuse."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from keifu.distributed.checkpoint import HashedFile
from keifu.errors import UserError
from keifu.processes import current
from keifu.training.run import checkpoint


class Counts:
    """Bytes of states that this process hashes in the block, by the name of the file, and the items of plans that the
    processes send to the first one, by state."""

    def __init__(self) -> None:
        self.written, self.read, self.plans = dict[str, int](), dict[str, int](), list[int]()
        digest, write, plan = hashlib.file_digest, HashedFile.write, DefaultSavePlanner.create_global_plan

        def digested(file: Any, *rest: Any) -> Any:
            path = Path(file.name)
            if checkpoint.FOLDER in path.parts:
                self.read[path.name] = self.read.get(path.name, 0) + path.stat().st_size
            return digest(file, *rest)

        def written(file: Any, data: Any) -> int:
            name = f"{Path(file.name).parent.name.split('.')[1]}/{Path(file.name).name}"
            self.written[name] = self.written.get(name, 0) + len(data)
            return write(file, data)

        def planned(planner: Any, plans: Any) -> Any:
            self.plans.append(sum(len(each.items) for each in plans))
            return plan(planner, plans)

        self.patches = [
            mock.patch("hashlib.file_digest", digested), mock.patch.object(HashedFile, "write", written),
            mock.patch.object(DefaultSavePlanner, "create_global_plan", planned),
        ]  # fmt: skip

    def __enter__(self) -> "Counts":
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()

    def of_all(self) -> list[Any]:
        """Return the counts of all processes on the first one."""
        return [json.loads(text) for text in current().gather(json.dumps([self.written, self.read, self.plans]))]


def states(folder: Path) -> dict[str, Any]:
    """Train, save, cut a save off, damage states and resume. Return what was counted and said."""
    from group_toys import learn  # which imports this file

    found, run = dict[str, Any](), folder / "run"
    with Counts() as planning:
        found["calm"] = learn("llama", folder / "calm", 30)["weights"]
    found["plans"] = [plans for _, _, plans in planning.of_all()]
    with Counts() as saving:
        learn("llama", run, 20)
    found["saving"] = saving.of_all()
    found["sizes"] = {f"{path.parent.name}/{path.name}": path.stat().st_size for path in _files(run)}
    current().barrier()
    found["refused"] = {name: _refusal(run, name) for name in DAMAGES}
    found["cut"] = current().gather(_cut_off(lambda: learn("llama", run, 30)))
    parts = (run / "state").glob(".step-00000030.part/*")
    found["left"] = checkpoint.steps(run), [path.name for path in parts if path.stat().st_size]
    current().barrier()
    with Counts() as reading:
        found["resumed"] = learn("llama", run, 30)["weights"]
    found["reading"] = reading.of_all()
    return found


def _files(run: Path, step: int | None = None) -> list[Path]:
    return sorted((run / "state").glob(f"step-{'*' if step is None else f'{step:08d}'}/*.safetensors"))


def _cut_off(learn: Any) -> str:
    """Return the error of a run whose second process cannot write its file when that of the first one is there."""

    def write(file: Any, data: Any) -> int:
        while not [*Path(file.name).parent.glob("shard-00001-*")]:
            time.sleep(0.01)
        raise OSError(5, "Input/output error")

    with mock.patch.object(HashedFile, "write", write) if current().rank == 1 else mock.MagicMock():
        try:
            learn()
        except UserError as error:
            return str(error)
    return ""


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _exchange(one: Path, other: Path) -> None:
    path = one.with_name("moved")
    one.rename(path)
    other.rename(one)
    path.rename(other)


DAMAGES = {
    "nothing": lambda files: None,
    "first": lambda files: _flip(files[0]),
    "second": lambda files: _flip(files[1]),
    "missing": lambda files: files[1].unlink(),
    "exchanged": lambda files: _exchange(*files),
    "added": lambda files: shutil.copy(files[0], files[0].with_name("shard-00003.safetensors")),
}


def _refusal(run: Path, name: str) -> list[str]:
    """Return the sentences with which the processes refuse a damaged state, which is as before afterwards."""
    there, kept, said = checkpoint.folder(run, 20), run / "kept", ""
    if current().is_main:
        shutil.copytree(there, kept)
        DAMAGES[name](_files(run, 20))
    current().barrier()
    try:
        checkpoint.read(run, 20)
    except UserError as error:
        said = str(error)
    sentences = current().gather(said)
    current().barrier()
    if current().is_main:
        shutil.rmtree(there)
        kept.rename(there)
    current().barrier()
    return sentences
