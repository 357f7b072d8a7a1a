"""Beginnings of texts in a cache folder: the same tokens with and without it, and no file of another text is used."""

import os
import threading
from collections.abc import Callable
from copy import deepcopy
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from generation_toys import of_kinds_of_memory
from safetensors.torch import load, save
from torch import nn

from keifu.inference.text.engine import Engine
from keifu.inference.text.paged import folder as folder_module, stored
from keifu.inference.text.paged.folder import CacheFolder
from keifu.inference.text.paged.pool import Pool
from keifu.inference.text.runner import TorchRunner
from keifu.inference.text.sampling_params import SamplingParams
from keifu.models import llama

SAMPLING = SamplingParams(temperature=1.0, max_tokens=6, seed=1)
PROMPT = [(7 * place + place * place) % 261 for place in range(60)]
OTHER = [(11 * place + 3) % 261 for place in range(60)]
MANY = 2**30
Answer = list[int]


@pytest.fixture(autouse=True)
def _small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "TOKENS", 16)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the messages that the cache folder logs."""
    messages = list[str]()
    monkeypatch.setattr(folder_module.LOG, "warning", lambda form, *words: messages.append(form % words))
    return messages


def grouped(seed: int = 3, **changes: Any) -> nn.Module:
    """Return a small model with weights large enough that the next token depends on those before it."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 261, "context_length": 90, "dim": 24, "hidden_dim": 36, "n_layers": 2}
    model = llama.build(llama.Config(**sizes | changes, n_heads=4, n_kv_heads=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12) if parameter.ndim > 1 else parameter
    return model


def asked(engine: Engine, prompt: list[int]) -> tuple[Answer, int]:
    """Return the answer to a prompt, and the number of its tokens that were not computed."""
    request = engine.request(prompt, SAMPLING)
    engine.add(request)
    answer = [piece.token for piece in engine.pieces()]
    return answer, request.cached


def after_restart(
    model: nn.Module, path: Path, prompt: list[int], limit: int = MANY, **more: Any
) -> tuple[Answer, int]:
    """Return the answer of a new engine, and the number of tokens that came from the folder. All files are written."""
    folder = CacheFolder(path, limit)
    found = asked(Engine(model, None, folder=folder, **more), prompt)
    folder.flush()
    return found


def names(path: Path) -> list[Path]:
    return sorted(path.glob("*" + folder_module.ENDING))


@of_kinds_of_memory
def test_a_restart_gives_the_same_tokens_and_computes_less(model: nn.Module, tmp_path: Path, logged: list[str]) -> None:
    plain, _ = asked(Engine(model, None), PROMPT)
    first, computed = after_restart(model, tmp_path, PROMPT)
    second, cached = after_restart(model, tmp_path, PROMPT)
    assert first == second == plain and computed == 0
    if logged:
        assert cached == 0 and not names(tmp_path)
        [message] = {*logged}
        assert message.startswith("The cache folder is not used for this model, because its ")
    else:
        assert cached == 48 and len(names(tmp_path)) == 4


@pytest.mark.parametrize("joined", [False, True])
def test_blocks_of_a_pool_are_read_and_written_as_they_are(joined: bool) -> None:
    pool = Pool(grouped().new_state(0, 1), 40, joined)
    for x in (*pool.keys, *pool.values):
        x.normal_()
    before = [x.clone() for x in (*pool.keys, *pool.values)]
    pool.write([9, 0], pool.read([2, 4], 4), 4)
    for x, old in zip((*pool.keys, *pool.values), before, strict=True):
        assert torch.equal(x[:, 36:40], old[:, 8:12]) and torch.equal(x[:, :4], old[:, 16:20])
        assert torch.equal(x[:, 4:36], old[:, 4:36])


def test_a_second_question_about_a_document_uses_what_the_first_read(tmp_path: Path) -> None:
    model = grouped()
    questions = [[*PROMPT, *OTHER[:9]], [*PROMPT, *OTHER[20:25]]]
    after_restart(model, tmp_path, questions[0])
    expected, _ = asked(Engine(model, None), questions[1])
    assert after_restart(model, tmp_path, questions[1]) == (expected, 48)


def test_an_answer_is_stored_too(tmp_path: Path) -> None:
    model = grouped()
    answer, _ = after_restart(model, tmp_path, PROMPT)
    conversation = [*PROMPT, *answer, 5, 6, 7]
    assert after_restart(model, tmp_path, conversation) == (asked(Engine(model, None), conversation)[0], 64)


def test_blocks_in_memory_are_extended_from_the_folder(tmp_path: Path) -> None:
    """The running engine knows a beginning, and another process has stored more of the same text."""
    model, folder = grouped(), CacheFolder(tmp_path, MANY)
    engine = Engine(model, None, TorchRunner(model, 40, 8), folder=folder)
    asked(engine, PROMPT[:30])
    after_restart(model, tmp_path, PROMPT, runner=TorchRunner(model, 40, 8))
    assert asked(engine, PROMPT) == (asked(Engine(model, None), PROMPT)[0], 48)


def test_what_memory_lacks_room_for_is_computed(tmp_path: Path) -> None:
    model = grouped()
    after_restart(model, tmp_path, PROMPT)
    folder, runner = CacheFolder(tmp_path, MANY), TorchRunner(model, 5)
    engine = Engine(model, None, runner, folder=folder)
    expected = [asked(Engine(model, None), prompt)[0] for prompt in (PROMPT, OTHER, PROMPT)]
    requests = [engine.request(prompt, SAMPLING) for prompt in (PROMPT, OTHER, PROMPT)]
    for request in requests:
        engine.add(request)
    found: list[Answer] = [[], [], []]
    for piece in engine.pieces():
        found[piece.index].append(piece.token)
    assert found == expected


def in_float64(model: nn.Module) -> nn.Module:
    return deepcopy(model).double()


def changed_in_place(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(model.parameters())[5, 5] += 0.01
    return model


@pytest.mark.parametrize(
    "change",
    [
        changed_in_place,
        in_float64,
        lambda model: grouped(seed=4),
        lambda model: grouped(rope_theta=500.0),
        lambda model: grouped(sliding_window=70),
    ],
)
def test_files_of_other_weights_and_types_are_not_used(
    change: Callable[[nn.Module], nn.Module], tmp_path: Path, logged: list[str]
) -> None:
    model = grouped()
    after_restart(model, tmp_path, PROMPT)
    other = change(model)
    assert after_restart(other, tmp_path, PROMPT) == (asked(Engine(other, None), PROMPT)[0], 0)
    assert len(names(tmp_path)) == 8 and not logged


@pytest.mark.parametrize("changed", ["version", "layout", "instructions"])
def test_files_of_another_version_or_machine_are_not_used(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = grouped()
    after_restart(model, tmp_path, PROMPT)
    if changed == "instructions":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another")
    else:
        monkeypatch.setattr(stored, "__version__" if changed == "version" else "LAYOUT", "another")
    assert after_restart(model, tmp_path, PROMPT)[1] == 0


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def change_tensors(path: Path, **tensors: torch.Tensor) -> None:
    """Write other tensors with the right checksum."""
    content = load(path.read_bytes())
    del content["checksum"]
    content |= tensors
    checksum = torch.tensor([*folder_module._checksum(content)], dtype=torch.uint8)
    path.write_bytes(save({**content, "checksum": checksum}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "a flipped bit": (flip, "the checksum is wrong"),
    "no safetensors": (lambda path: path.write_text("hello" * 100), "is damaged"),
    "enormous": (lambda path: os.truncate(path, 10**7), "bytes of tensors"),
    "no tokens": (lambda path: change_tensors(path, tokens=torch.zeros(0)), "has the tokens of another text"),
    "no identity": (lambda path: change_tensors(path, identity=torch.ones(32)), "was made by another model"),
    "other shapes": (lambda path: change_tensors(path, **{"keys.0": torch.zeros(1)}), "has other tensors"),
    "more tensors": (lambda path: change_tensors(path, more=torch.zeros(1)), "has other tensors"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_ignored_with_one_line_and_replaced(name: str, tmp_path: Path, logged: list[str]) -> None:
    model = grouped()
    expected, _ = after_restart(model, tmp_path, PROMPT)
    damage, reason = DAMAGES[name]
    second = sorted(names(tmp_path), key=lambda path: -path.stat().st_mtime_ns)[1]
    damage(second)
    assert after_restart(model, tmp_path, PROMPT) == (expected, 16)
    [message] = logged
    assert reason in message and second.name in message
    assert after_restart(model, tmp_path, PROMPT) == (expected, 48) and len(logged) == 1


@pytest.mark.parametrize("group", [0, 2])
def test_a_file_of_another_conversation_under_this_name_is_not_used(
    group: int, tmp_path: Path, logged: list[str]
) -> None:
    """Its checksum and its model are right, and its shapes too: only its tokens are of another text."""
    model = grouped()
    expected, _ = after_restart(model, tmp_path / "a", PROMPT)
    after_restart(model, tmp_path / "b", OTHER)
    mine, others = (
        sorted(names(tmp_path / each), key=lambda path: -path.stat().st_mtime_ns)[group] for each in ("a", "b")
    )
    mine.write_bytes(others.read_bytes())
    assert after_restart(model, tmp_path / "a", PROMPT) == (expected, 16 * group)
    assert [message.partition(".safetensors ")[2] for message in logged] == ["has the tokens of another text."]


def test_the_file_of_another_model_under_this_name_is_not_used(tmp_path: Path, logged: list[str]) -> None:
    models = grouped(), grouped(seed=4)
    answers = [after_restart(model, tmp_path / str(n), PROMPT)[0] for n, model in enumerate(models)]
    both = (sorted(names(tmp_path / n), key=lambda path: -path.stat().st_mtime_ns) for n in "01")
    for mine, others in zip(*both, strict=True):
        mine.write_bytes(others.read_bytes())
    assert after_restart(models[0], tmp_path / "0", PROMPT) == (answers[0], 0)
    assert 1 <= len(logged) <= 3 and all("was made by another model" in message for message in logged)


def test_the_folder_keeps_its_limit_and_what_was_used_last(tmp_path: Path) -> None:
    model = grouped()
    (tmp_path / "notes.txt").write_text("mine")
    after_restart(model, tmp_path, PROMPT)
    size = sum(path.stat().st_size for path in names(tmp_path))
    for path in names(tmp_path):
        path.unlink()
    folder = CacheFolder(tmp_path, 3 * size)
    for number in range(6):
        for prompt in (PROMPT, [number, *OTHER[:59]]):
            asked(Engine(model, None, folder=folder), prompt)
            folder.flush()
            assert sum(path.stat().st_size for path in names(tmp_path)) <= 3 * size
    assert after_restart(model, tmp_path, PROMPT, 3 * size)[1] == 48
    assert after_restart(model, tmp_path, [0, *OTHER[:59]], 3 * size)[1] == 0
    CacheFolder(tmp_path, size).flush()  # a smaller limit holds at once
    assert sum(path.stat().st_size for path in names(tmp_path)) <= size
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_beginning_of_a_text_is_removed_last(tmp_path: Path) -> None:
    model = grouped()
    after_restart(model, tmp_path, PROMPT)
    sizes = [path.stat().st_size for path in names(tmp_path)]
    CacheFolder(tmp_path, sum(sizes) - 1).flush()
    assert 0 < len(names(tmp_path)) < 4
    assert after_restart(model, tmp_path, PROMPT)[1] == 16 * min(3, len(sizes) - 1)


def test_a_full_disk_is_told_once_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    model = grouped()
    expected, _ = asked(Engine(model, None), PROMPT)

    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:9])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        folder = CacheFolder(tmp_path, MANY)
        engine = Engine(model, None, folder=folder)
        for prompt in (PROMPT, OTHER):
            assert asked(engine, prompt) == (asked(Engine(model, None), prompt)[0], 0)
            folder.flush()
    told = [message for message in logged if "stores nothing for the next 60 seconds" in message]
    assert told == logged and "The disk is full" in told[0] and not [*tmp_path.iterdir()]
    # the module alone: a server in another thread of the process waits by the same clock
    monkeypatch.setattr(folder_module, "time", SimpleNamespace(monotonic=lambda: 10**9))
    assert asked(engine, PROMPT) == (expected, 48)
    folder.flush()
    assert len(names(tmp_path)) == 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_two_writers_of_one_folder_get_the_same_tokens(tmp_path: Path) -> None:
    """A process and two threads of another one write, read and remove files at the same time."""
    model = grouped()
    prompts = [[number, *PROMPT[:40], *OTHER[:9]] for number in range(8)]
    expected = [asked(Engine(model, None), prompt)[0] for prompt in prompts]
    after_restart(model, tmp_path, PROMPT)
    limit = 2 * sum(path.stat().st_size for path in names(tmp_path))
    found: list[list[Answer]] = [[], []]

    def work(answers: list[Answer]) -> None:
        folder = CacheFolder(tmp_path, limit)
        for prompt in prompts:
            answers.append(asked(Engine(model, None, folder=folder), prompt)[0])
        folder.flush()

    child = in_a_child(lambda: work([]))
    threads = [threading.Thread(target=work, args=(answers,)) for answers in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected, expected] and os.waitpid(child, 0)[1] == 0
    for prompt, answer in zip(prompts, expected, strict=True):
        assert after_restart(model, tmp_path, prompt, limit)[0] == answer


def in_a_child(work: Callable[[], Any]) -> int:
    """Start another process that does this work. Return its number."""
    if child := os.fork():
        return child
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("moment", range(1, 5))
def test_a_process_killed_while_it_writes_loses_nothing(moment: int, tmp_path: Path) -> None:
    """It ends at a sync: of the first file, of the folder after its renaming, and so on."""
    model, prompt, number = grouped(), [*PROMPT[:40], *OTHER[:9]], count(1)
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(number) == moment:
            os._exit(9)
        real(descriptor)

    def work() -> None:
        os.fsync = fsync
        after_restart(model, tmp_path, prompt)

    assert os.waitstatus_to_exitcode(os.waitpid(in_a_child(work), 0)[1]) == 9
    written = moment // 2
    assert len(names(tmp_path)) == written
    assert after_restart(model, tmp_path, prompt) == (asked(Engine(model, None), prompt)[0], 16 * written)
    assert after_restart(model, tmp_path, prompt)[1] == 48
