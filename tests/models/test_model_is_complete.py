"""Every model of the registry is complete: sizes, tests, formats, speed and a page. Failures name a file and a row.

A model that lacks something on purpose is in `REFUSED`: its refusal is checked.
"""

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from keifu.checkpoints.gguf.config import architecture_for
from keifu.checkpoints.lora.peft import adapt
from keifu.checkpoints.registry import MODELS, families_of
from keifu.commands.reference.plan import architecture
from keifu.distributed.tensor import split_stacks
from keifu.errors import UserError
from keifu.layers.lora import LoraSettings, adapters, merge
from keifu.layers.transformer.decoder import DecoderLM
from keifu.models.sizes import published_sizes
from keifu.native.compiler import Unavailable
from keifu.native.describe import describe
from keifu.training.hardware.flops import count_flops

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
MIXTURES = ["mixture.mixtral", "mixture.qwen3_moe", "mixture.olmoe", "mixture.deepseek_v3", "mixture.gpt_oss"]
DELTAS = ["hybrid.qwen3_next", "hybrid.qwen3_5"]
HYBRIDS = [*DELTAS, "hybrid.lfm2"]
CAPPED = ["variants.gemma2", "variants.nanochat"]
WITHOUT_GGUF = [f"variants.{name}" for name in ("phi3", "exaone4", "glm4", "ministral", "nanochat")]
REFUSED = {  # what keifu refuses, with the models and the words of the refusal
    "gguf": dict.fromkeys(
        ["gpt1", "gpt3", "palm", "classic.lstm", *WITHOUT_GGUF, *MIXTURES[3:], *HYBRIDS], "writes no GGUF"
    ),
    "native": {"mixture.deepseek_v3": "LatentAttention, which native"}
    | dict.fromkeys(HYBRIDS, "(GatedDeltaNet|GatedConvolution), which native")
    | {"classic.lstm": "RecurrentBlock, which native"}
    | dict.fromkeys([*CAPPED, "variants.granite"], "is a (SoftCappedLM|ScaledRMSNorm), which native"),
    "tensor": dict.fromkeys([*MIXTURES, *HYBRIDS, *CAPPED, "variants.granite"], "which tensor parallelism cannot split")
    | {"classic.lstm": "no Transformer block to split"},
    "plan": {"classic.lstm": "no Transformer of tokens alone"},
    "adapters": {"classic.lstm": "has no linear layers"},
}
WITHOUT = {  # rows that a model cannot have, with the reason
    "published config": {
        "palm": "PaLM's weights were not published, and Cohere's config.json is in test_parity",
        "classic.lstm": "no other program writes a config.json of it",
    },
    "page": {},
    "another device": {"classic.lstm": "the simulated device has no fused cell, and torch computes the layers there"},
}


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


@cache
def toys() -> dict[str, Any]:
    """Return the Config of the first toy of each language model, by the name of its model's file."""
    rows = table_file("test_learning.py").LANGUAGE_MODELS.values()
    return {name_of(config): config for _, config in reversed([*rows])}


def name_of(config: Any) -> str:
    return type(config).__module__.removeprefix("keifu.models.")


def toy(name: str) -> DecoderLM:
    torch.manual_seed(0)
    return families_of(name)[MODELS[name][-1]].module.build(toys()[name]).eval()


def is_language_model(name: str) -> bool:
    """Return whether the published sizes of a model are decoders of tokens."""
    module = families_of(name)[MODELS[name][-1]].module
    return module.build.__annotations__.get("return") is DecoderLM


LANGUAGE_MODELS = [name for name in MODELS if is_language_model(name)]


def need(condition: object, file: str, row: str) -> None:
    """Fail with the file to change and the row to add."""
    assert condition, f"{file}: add {row}."


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_sizes_and_a_page(name: str) -> None:
    module = families_of(name)[MODELS[name][-1]].module
    if vars(module).get("SIZES"):
        found = any(size.model == name for size in published_sizes())
        need(found, "src/keifu/models/sizes.json", f"{name} by running `python -m keifu.models.sizes`")
    if name in WITHOUT["page"] or not is_language_model(name):
        return
    link = f"models/{name.replace('.', '/')}.py"
    english = [page for page in (ROOT / "docs/lineage").glob("*.md") if not page.name.endswith(".ja.md")]
    need(any(link in page.read_text(encoding="utf-8") for page in english), "docs/lineage/*.md", f"a link to {link}")


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_is_tested(name: str) -> None:
    """Each table of toys has a row for the model."""
    need(name in toys(), "tests/test_learning.py", f"a row of {name} to LANGUAGE_MODELS")
    cases = [case().model_type for case in table_file("checkpoints/hf/test_parity.py").CASES.values()]
    missing = [kind for kind in families_of(name) if not kind.startswith("keifu_") and kind not in cases]
    need(not missing, "tests/checkpoints/hf/test_parity.py", f"a row of {', '.join(missing)} to CASES")
    configs = table_file("checkpoints/hf/test_published_configs.py").PUBLISHED.values()
    published = {config["model_type"] for config in configs} & {*MODELS[name]}
    need(
        published or name in WITHOUT["published config"],
        "tests/checkpoints/hf/test_published_configs.py",
        f"the config.json of a published {name} to PUBLISHED",
    )
    device = table_file("test_on_another_device.py").WRITERS
    need(
        name in {*built(device), *WITHOUT["another device"]},
        "tests/test_on_another_device.py",
        f"a row of {name} to WRITERS",
    )
    native = table_file("native/native_toys.py").TOYS
    need(name in {*built(native), *REFUSED["native"]}, "tests/native/native_toys.py", f"a row of {name} to TOYS")
    gguf = {name_of(config) for config in table_file("checkpoints/gguf/test_gguf.py").CONFIGS.values()}
    need(name in {*gguf, *REFUSED["gguf"]}, "tests/checkpoints/gguf/test_gguf.py", f"a row of {name} to CONFIGS")


def built(table: dict[str, Any]) -> set[str]:
    return {name_of(make().config) for make in table.values()}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_runs_everywhere_or_is_refused(name: str) -> None:
    """The registry, plans, GGUF, the native step and tensor parallelism know the model, or say why not."""
    model = toy(name)
    check("native", name, Unavailable, lambda: describe(model))
    check("gguf", name, UserError, lambda: architecture_for(type(model.config)()))
    names: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}
    check("tensor", name, UserError, lambda: split_stacks(model, names))
    for size in published_sizes():
        if size.model == name:
            check("plan", name, UserError, lambda size=size: architecture(size))


def check(what: str, name: str, error: type[Exception], work: Any) -> None:
    """Run `work`: it succeeds, or fails with the words that are written for this model, and with no others."""
    if name in REFUSED[what]:
        with pytest.raises(error, match=REFUSED[what][name]):
            work()
        return
    try:
        work()
    except error as refusal:
        pytest.fail(f"{__file__}: support {name}, or add a row of {name} to REFUSED[{what!r}]: {refusal}")


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_a_language_model_decodes_counts_and_takes_adapters(name: str) -> None:
    model, tokens = toy(name), torch.arange(11)[None] % 7
    whole, state = model(tokens), model.new_state(1, 11)
    parts = [model(tokens[:, :4], state), *(model(tokens[:, i : i + 1], state) for i in range(4, 11))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert count_flops(lambda: model(tokens)) > 2 * 11 * model.embedding.weight.numel()
    check("adapters", name, UserError, lambda: adapt(model, ["all-linear"], LoraSettings(rank=2)))
    if name in REFUSED["adapters"]:
        return
    torch.testing.assert_close(model(tokens), whole, rtol=1e-5, atol=1e-5)
    for adapter in adapters(model):
        nn.init.normal_(adapter.b, std=0.1)
    changed = model(tokens)
    assert not torch.allclose(changed, whole)
    torch.testing.assert_close(merge(model)(tokens), changed, rtol=1e-4, atol=1e-4)
