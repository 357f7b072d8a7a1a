"""Tensors that are read when they are used: of a slice, no more than its rows and columns."""

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_on_another_device import CPU, TRANSLATORS, WRITERS  # noqa: E402

from keifu.errors import UserError  # noqa: E402
from keifu.layers.lazy import Index, LazyTensor, TensorReader, build_lazily, settle  # noqa: E402

WHOLE = torch.arange(24.0).view(6, 4)
ROWS = (slice(2, 4), slice(0, 4))
WORK: dict[str, tuple[Callable[[Tensor], Tensor], list[Index]]] = {  # and what is read for it
    "chunk": (lambda x: x.chunk(3)[1] * 1, [ROWS]),
    "split": (lambda x: x.split([2, 2, 2])[1] * 1, [()]),
    "rows": (lambda x: x[2:4] * 1, [ROWS]),
    "from the end": (lambda x: x[-4:-2] * 1, [ROWS]),
    "columns": (lambda x: x[:, 1:3].clone() * 1, [(slice(0, 6), slice(1, 3))]),
    "rows of columns": (lambda x: x[:, 1:][2:4] * 1, [(slice(2, 4), slice(1, 4))]),
    "parts": (lambda x: torch.cat([x[:1], x[5:]]), [(slice(0, 1), slice(0, 4)), (slice(5, 6), slice(0, 4))]),
    "parameter": (lambda x: nn.Parameter(x).detach()[2:4] * 1, [ROWS]),
    "another type": (lambda x: x.double()[2:4] * 1, [ROWS]),
    "copy": (lambda x: copy.deepcopy(nn.Parameter(x)).data.clone()[2:4] * 1, [ROWS]),
    "nothing": (lambda x: x[3:3] * 1, []),
    "zeros": (lambda x: torch.zeros_like(x) + x.new_zeros(4), []),
    "steps": (lambda x: x[::2] * 1, [()]),
    "product": (lambda x: nn.functional.linear(torch.ones(2, 4), x), [()]),
}


def lazy(read: list[Index]) -> LazyTensor:
    def note(index: Index, file: object) -> Tensor:
        read.append(index)
        return WHOLE[index]

    return LazyTensor.of(TensorReader(partial(note, file=torch)), torch.empty(()).expand(6, 4))  # no copy of a file


@pytest.mark.parametrize("work", WORK)
def test_what_is_used_is_read(work: str) -> None:
    read, (function, expected) = list[Index](), WORK[work]
    assert torch.equal(function(lazy(read)), function(WHOLE))
    assert read == expected


def test_what_is_used_as_a_whole_is_read_once() -> None:
    read = list[Index]()
    x = lazy(read)
    assert torch.equal(x @ x.T + x[:, :1], WHOLE @ WHOLE.T + WHOLE[:, :1]) and read == [()]


def test_a_change_stays_and_is_not_one_of_the_file() -> None:
    x, before = lazy([]), WHOLE.clone()
    x[1:2].mul_(0)
    x.add_(1)
    assert not (x[1] - 1).any() and torch.equal(x[2:] * 1, WHOLE[2:] + 1) and torch.equal(WHOLE, before)
    assert torch.equal(x.clone()[2:] * 1, WHOLE[2:] + 1)


def test_settled_parameters_are_own_and_stay_shared() -> None:
    first, second, read = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False), list[Index]()
    first.weight = second.weight = nn.Parameter(lazy(read), requires_grad=False)
    model = nn.Sequential(first, second)
    settle(model)
    assert first.weight is second.weight and type(first.weight) is nn.Parameter and not first.weight.requires_grad
    assert torch.equal(first.weight, WHOLE) and first.weight.data_ptr() != WHOLE.data_ptr() and read == [()]


@pytest.mark.parametrize("name", [*WRITERS, "transformer"])
def test_a_model_that_is_drawn_lazily_has_the_numbers_of_one_that_is_not(name: str) -> None:
    build = (WRITERS | TRANSLATORS)[name]
    built, after = [], []
    for make in (build, partial(build_lazily, build, CPU)):
        torch.manual_seed(5)
        built.append(make())
        after.append(torch.rand(1))
    whole, lazy = built
    assert torch.equal(*after) and all(isinstance(p, LazyTensor) for p in lazy.parameters())
    one, other = ({**dict(model.named_parameters()), **dict(model.named_buffers())} for model in (whole, lazy))
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert torch.equal(
            other[key][1:] * 1 if tensor.dim() else other[key], tensor[1:] * 1 if tensor.dim() else tensor
        )
    settle(lazy)
    assert all(torch.equal(p, q) for p, q in zip(lazy.parameters(), whole.parameters(), strict=True))


def test_a_tensor_that_depends_on_another_is_drawn_with_it() -> None:
    def build() -> nn.Module:
        model = nn.Linear(3, 3)
        noise = torch.randn(3, 3)
        model.weight = nn.Parameter(noise @ noise.T + torch.eye(3))
        with torch.no_grad():
            model.weight[1:] *= 3
            model.bias.copy_(model.weight.norm(dim=1))
            model.weight.data = 2 * model.weight
        return model.half().float()

    torch.manual_seed(1)
    whole = build()
    torch.manual_seed(1)
    lazy = build_lazily(build, CPU)
    torch.rand(7)
    settle(lazy)
    assert torch.equal(lazy.get_parameter("weight"), whole.get_parameter("weight"))
    assert torch.equal(lazy.get_parameter("bias"), whole.get_parameter("bias"))


OTHER = partial(nn.init.normal_, generator=torch.Generator())
READING = nn.init.trunc_normal_, nn.init.orthogonal_, torch.linalg.qr, Tensor.tolist, OTHER


@pytest.mark.parametrize("initialise", READING)
def test_an_initialisation_that_reads_what_it_drew_is_refused(initialise: Callable[[Tensor], object]) -> None:
    def build() -> nn.Module:
        model = nn.Linear(3, 3)
        initialise(model.weight)
        return model

    with pytest.raises((UserError, NotImplementedError)):
        build_lazily(build, CPU)
