"""Every model of the registry is complete: sizes, tests, formats, speed and a page. Failures name a file and a row.

What a model lacks on purpose is in `REFUSED`, in its own file, with the reason: the refusal is checked.
"""

import importlib.util
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from model_entries import ENTRIES
from torch import nn

from keifu.checkpoints.gguf.config import architecture_for
from keifu.checkpoints.lora.peft import adapt
from keifu.checkpoints.registry import MODELS, families_of
from keifu.commands.reference.plan import architecture
from keifu.distributed.tensor import split_stacks
from keifu.errors import UserError
from keifu.layers.lora import LoraSettings, adapters, merge
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models.registration import row
from keifu.models.sizes import published_sizes
from keifu.native.compiler import Unavailable
from keifu.native.describe import describe
from keifu.training.hardware.flops import count_flops

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
TOYS = {entry.name: entry for entry in reversed(ENTRIES.values())}


@cache
def table_file(path: str) -> ModuleType:
    """Import a file of the tests; files next to it can be imported by it."""
    file = TESTS / path
    sys.path.insert(0, str(file.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"complete_{file.stem}", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module


def name_of(config: Any) -> str:
    return type(config).__module__.removeprefix("keifu.models.")


def toy(name: str) -> DecoderLM:
    torch.manual_seed(0)
    return TOYS[name].build().eval()


def is_language_model(name: str) -> bool:
    """Return whether the published sizes of a model are decoders of tokens."""
    return import_module(f"keifu.models.{name}").build.__annotations__.get("return") is DecoderLM


LANGUAGE_MODELS = [name for name in MODELS if is_language_model(name)]


def need(condition: object, file: str, row: str) -> None:
    """Fail with the file to change and the row to add."""
    assert condition, f"{file}: add {row}."


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_sizes_and_a_page(name: str) -> None:
    if vars(import_module(f"keifu.models.{name}")).get("SIZES"):
        found = any(size.model == name for size in published_sizes())
        need(found, "src/keifu/models/sizes.json", f"{name} by running `python -m keifu.models.sizes`")
    if not is_language_model(name):
        return
    link = f"models/{name.replace('.', '/')}.py"
    english = [page for page in (ROOT / "docs/lineage").glob("*.md") if not page.name.endswith(".ja.md")]
    need(any(link in page.read_text(encoding="utf-8") for page in english), "docs/lineage/*.md", f"a link to {link}")


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_is_tested(name: str) -> None:
    """The model has its entry in the tests, from which the other tables are made, and is compared with transformers."""
    need(name in TOYS, "tests/model_entries.py", f"an entry of {name} to ENTRIES")
    published = {config["model_type"] for entry in ENTRIES.values() for config in entry.published.values()}
    kinds = {kind for kind in families_of(name) if not kind.startswith("keifu_")}
    need(not kinds or published & kinds, "tests/model_entries.py", f"the config.json of a published {name}")
    cases = {case().model_type for case in table_file("checkpoints/hf/test_parity.py").CASES.values()}
    missing = sorted(kinds - cases)
    need(not missing, "tests/checkpoints/hf/test_parity.py", f"a row of {', '.join(missing)} to CASES")
    native, refused = table_file("native/native_toys.py").TOYS, row(name).refused
    assert (name in built(native)) == ("native" not in refused)
    gguf = {name_of(config) for config in table_file("checkpoints/gguf/gguf_toys.py").CONFIGS.values()}
    file = f"src/keifu/models/{name.replace('.', '/')}.py"
    need((name in gguf) == ("gguf" not in refused), file, "either GGUF, or the reason for gguf to REFUSED")


def built(table: dict[str, Any]) -> set[str]:
    return {name_of(make().config) for make in table.values()}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_runs_everywhere_or_is_refused(name: str) -> None:
    """The registry, plans, GGUF, the native step and tensor parallelism know the model, or its row says why not."""
    model = toy(name)
    check("native", name, Unavailable, lambda: describe(model))
    check("gguf", name, UserError, lambda: architecture_for(type(model.config)()))
    names: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}
    check("tensor", name, UserError, lambda: split_stacks(model, names))
    for size in published_sizes():
        if size.model == name:
            check("plan", name, UserError, lambda size=size: architecture(size))


def check(what: str, name: str, error: type[Exception], work: Any) -> None:
    """Run `work`: it succeeds, or fails with the reason that the model's row has, and with no other."""
    if (reason := row(name).refused.get(what)) is not None:
        with pytest.raises(error, match=re.escape(reason)):
            work()
        return
    try:
        work()
    except error as refusal:
        pytest.fail(f'src/keifu/models/{name.replace(".", "/")}.py: support "{what}", or add it to REFUSED: {refusal}')


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_a_language_model_decodes_counts_and_takes_adapters(name: str) -> None:
    model, tokens = toy(name), torch.arange(11)[None] % 7
    whole, state = model(tokens), model.new_state(1, 11)
    parts = [model(tokens[:, :4], state), *(model(tokens[:, i : i + 1], state) for i in range(4, 11))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert count_flops(lambda: model(tokens)) > 2 * 11 * model.embedding.weight.numel()
    check("adapters", name, UserError, lambda: adapt(model, ["all-linear"], LoraSettings(rank=2)))
    if "adapters" in row(name).refused:
        return
    torch.testing.assert_close(model(tokens), whole, rtol=1e-5, atol=1e-5)
    for adapter in adapters(model):
        nn.init.normal_(adapter.b, std=0.1)
    changed = model(tokens)
    assert not torch.allclose(changed, whole)
    torch.testing.assert_close(merge(model)(tokens), changed, rtol=1e-4, atol=1e-4)
