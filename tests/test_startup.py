"""What starting up costs, by what it imports: a help or a list needs no torch, a model its own file and no compiler."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from keifu.checkpoints import save
from keifu.checkpoints.registry import FAMILIES, MODELS, families_of
from keifu.commands.reference.models import matching_sizes
from keifu.errors import UserError
from keifu.layers.meta import on_meta
from keifu.models import llama
from keifu.models.sizes import count_sizes, model_files, published_sizes

TINY = llama.Config(vocab_size=11, context_length=8, dim=8, hidden_dim=8, n_layers=1, n_heads=2)


def imported(code: str) -> set[str]:
    """Return the modules that a new process has imported after it has run the code."""
    return imported_and_said(code)[0]


def imported_and_said(code: str) -> tuple[set[str], list[str]]:
    """Return the same, and the lines that the code printed."""
    listing = f"{code}\nimport sys\nprint()\nprint(*sys.modules)"
    keep = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, env=keep, timeout=300)
    assert not done.returncode, done.stderr
    *said, _, modules = done.stdout.splitlines()
    return set(modules.split()), said


def models_of(modules: set[str]) -> set[str]:
    """Return the files of models among these modules."""
    return {name.removeprefix("keifu.models.") for name in modules} & MODELS.keys()


def test_the_list_of_models_imports_no_torch() -> None:
    found = imported("from keifu.cli import main\nmain(['models'])")
    assert not {"torch", "numpy", "keifu.models.llama"} & found


def test_loading_and_writing_import_one_model_and_no_compiler(tmp_path: Path) -> None:
    save(llama.build(TINY), None, tmp_path)
    load = f"from keifu import checkpoints\ncheckpoints.load_model({str(tmp_path)!r})"
    found = imported(f"{load}\nimport keifu.inference.text.generate")
    assert models_of(found) == {"llama"}
    assert not {"torch._dynamo", "sympy", "gguf", "keifu.checkpoints.diffusers.single_file"} & found


LARGEST = (  # thousands of modules each, or more
    "hybrid.qwen3_5", "hybrid.qwen3_next", "mixture.deepseek_v3", "mixture.gpt_oss", "mixture.qwen3_moe",
)  # fmt: skip


def smallest() -> dict[str, str]:
    """Return the name of the smallest published size of each model."""
    sizes = sorted(published_sizes(), key=lambda size: size.parameters, reverse=True)
    return {size.model: size.name for size in sizes}


@pytest.fixture(scope="module")
def counted() -> tuple[set[str], list[str]]:
    """Return the imported modules of a process that counts the smallest size of each model without memory, and the
    counted sizes."""
    code = f"""
from importlib import import_module
from keifu.checkpoints.registry import MODELS
from keifu.models.sizes import count_sizes
names = [name for name in MODELS if name not in {LARGEST}]
modules = {{name: import_module("keifu.models." + name) for name in names}}  # some read the sizes of others
for name, smallest in {smallest()}.items():
    if name in modules:
        modules[name].SIZES = {{smallest: modules[name].SIZES[smallest]}}
print(*map(repr, sorted(count_sizes(names))), sep="\\n")"""
    return imported_and_said(code)


def test_the_table_of_sizes_is_what_the_models_have(counted: tuple[set[str], list[str]]) -> None:
    """Run `python -m keifu.models.sizes` when this fails: it counts again and adds new models."""
    names = {name for model, name in smallest().items() if model not in LARGEST}
    assert counted[1] == [repr(size) for size in sorted(published_sizes()) if size.name in names]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_size_of_a_model_is_what_it_has(name: str) -> None:
    assert count_sizes([name]) == [size for size in published_sizes() if size.model == name]


def test_the_command_that_counts_finds_every_model() -> None:
    modules = {name: import_module(f"keifu.models.{name}") for name in MODELS}
    assert sorted(model_files()) == sorted(name for name, module in modules.items() if "SIZES" in vars(module))


def test_no_model_that_is_built_without_memory_imports_the_compiler(counted: tuple[set[str], list[str]]) -> None:
    assert not {"torch._dynamo", "sympy"} & counted[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_model_types_of_a_file_are_those_of_the_registry(name: str) -> None:
    assert tuple(families_of(name)) == MODELS[name]
    published = vars(import_module(f"keifu.models.{name}")).get("MODEL_TYPES", {})
    assert published.keys() <= {*MODELS[name]}


def test_every_file_of_a_model_is_in_the_registry() -> None:
    folder = Path(llama.__file__).parent
    places = [path.relative_to(folder).with_suffix("") for path in folder.rglob("[!_]*.py")]
    others = ("hf", "registration", "sizes", "task_head")  # the last wraps another
    models = [place for place in places if place.parts[0] not in others]
    whole = {".".join(place.parts) for place in models} - {"diffusion.unet_builder", "multimodal.siglip"}
    assert whole == MODELS.keys()
    assert "llama" in FAMILIES and "lama" not in FAMILIES and len(FAMILIES) == len([*FAMILIES])


def test_a_model_without_memory_has_the_shapes_of_one_with() -> None:
    with on_meta():
        empty = llama.build(TINY)
        assert torch.nn.init.normal_(torch.empty(2, 3)).shape == (2, 3)
        assert torch.nn.init.normal_(tensor=torch.empty(2, 3)).is_meta
    full = llama.build(TINY)
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in full.state_dict().items()}
    assert all(tensor.is_meta for tensor in empty.parameters())
    assert torch.empty(3).normal_().std() > 0, "outside, tensors are filled again"


def test_models_are_found_by_part_of_a_name_and_by_file() -> None:
    assert {size.name for size in matching_sizes("llama2")} == {"llama2-7b", "llama2-13b", "llama2-70b"}
    assert {"smollm2-135m", "mistral-7b"} <= {size.name for size in matching_sizes("LLaMA")}
    with pytest.raises(UserError, match="Did you mean 'llama2-7b'"):
        matching_sizes("lamma2-7b")


def test_a_model_type_that_is_written_is_known(tmp_path: Path) -> None:
    save(llama.build(TINY), None, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] in FAMILIES
