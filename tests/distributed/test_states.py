"""States of a split model: each process hashes what it writes, and all refuse what one of them finds damaged; copies of
a GPU's tensors wait for nothing."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import group_toys
import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent.parent))

from simulated_device import PINNED, READ, STAGED, device, simulated  # noqa: E402

from keifu.distributed.checkpoint import States  # noqa: E402
from keifu.distributed.layout import Layout  # noqa: E402
from keifu.distributed.pod import Pod  # noqa: E402
from keifu.training.run import checkpoint  # noqa: E402

Found = dict[str, Any]
NAMES = [f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    case = {"name": "states", "work": "states", "mesh": {"shard": 2}}
    return group_toys.start(tmp_path_factory.mktemp("states"), [case], 2)["states"]


def test_a_process_hashes_the_file_that_it_writes_and_no_other(found: Found) -> None:
    assert len(found["sizes"]) == 4
    for name, (written, read, _) in zip(NAMES, found["saving"], strict=True):
        assert written == {path: size for path, size in found["sizes"].items() if path.endswith(name)}
        assert read == {}


def test_a_process_hashes_its_share_of_the_files_of_a_state_that_it_resumes(found: Found) -> None:
    sizes = {path.rpartition("/")[2]: size for path, size in found["sizes"].items() if "00000020/" in path}
    assert [read for _, read, _ in found["reading"]] == [{name: sizes[name]} for name in NAMES]


def test_a_plan_is_sent_once_for_all_states(found: Found) -> None:
    (first, *others), second = found["plans"]
    assert first > 20 and others == [0, 0] and second == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing", ""),
        ("first", f"/{NAMES[0]} is damaged: its hash is not the one stored."),
        ("second", f"/{NAMES[1]} is damaged: its hash is not the one stored."),
        ("missing", f"/{NAMES[1]} is missing."),
        ("exchanged", f"/{NAMES[0]} is damaged: its hash is not the one stored."),
        ("added", "/shard-00003.safetensors is not of this state, whose files are listed in "),
    ],
)
def test_all_processes_refuse_what_one_of_them_finds(name: str, sentence: str, found: Found) -> None:
    one, other = found["refused"][name]
    assert one == other and sentence in one and bool(one) == bool(sentence) and one.count(". ") == 0


def test_a_state_of_which_one_file_was_written_is_none(found: Found) -> None:
    """Both processes say it; the run goes on from the state before, to the bits of one that nothing disturbed."""
    for said in found["cut"]:
        assert "Process 1 could not write its part of the state: [Errno 5] Input/output error." in said
    assert found["left"] == [[10, 20], [NAMES[0]]]
    assert found["resumed"] == found["calm"]


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_copies_of_a_gpu_wait_for_nothing_and_use_their_memory_again(one_process: None, tmp_path: Path) -> None:
    """The numbers are those at the time of the save, though a step changes them before the copies are made."""
    with simulated():
        weight, bias = (torch.rand(shape, device=device()) for shape in ((6, 4), (3,)))
        pod = Pod.__new__(Pod)
        pod.layouts, pod.coordinate = {"w": Layout.unsplit(weight, 1)}, (0, 0)
        states, expected, memory = States(True), {}, set[int]()
        for step in (1, 2):
            expected[step] = {"model.w": weight.held.clone(), "sums.total": bias.held.clone()}
            before = READ.copy()
            states.save(pod, tmp_path, step, {"model.w": weight, "sums.total": bias}, {}, lambda step: None)
            weight += 1
            assert before == READ and STAGED.total() == 2 * step
            states.flush()
            memory |= {tensor.data_ptr() for tensor in PINNED}
        assert len(memory) == 2
    for step, tensors in expected.items():
        [file] = checkpoint.folder(tmp_path, step).iterdir()
        torch.testing.assert_close(load_file(file), tensors, rtol=0, atol=0)
