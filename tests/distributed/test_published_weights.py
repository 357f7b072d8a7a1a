"""Published weights that processes share: each reads its part of the file, and none ever holds the whole model."""

from typing import Any

import group_toys
import pytest
import torch

from keifu.checkpoints.hf.write import save
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models import bert, gpt2, llama, transformer

WORDS = {**group_toys.WORDS, "vocab_size": 30}
MODELS = {  # each has joined q, k and v; of LLaMA gate and up are apart in the file, GPT-2's matrices are transposed
    "llama": llama.Config(**WORDS, n_kv_heads=2),
    "tied": llama.Config(**WORDS, n_kv_heads=2, tied=True),
    "gpt2": gpt2.Config(**WORDS),
    "transformer": transformer.Config(**WORDS),
    "gpt": llama.Config(**WORDS),
    "dpo": llama.Config(**WORDS),
    "bert": bert.Config(**WORDS, pooled=True, words=True, next_sentence=True),
    "classifier": bert.Config(**WORDS, pooled=True, words=False, next_sentence=False, labels=("no", "yes")),
    "large": llama.Config(2000, 64, 512, 1024, 6, 8, n_kv_heads=4),  # 65 MB
}
CASES = [(model, mesh, lora) for model in ("llama", "tied", "gpt2") for mesh in ("shard", "tensor") for lora in (0, 2)
         if not lora or mesh == "shard"]  # fmt: skip
CASES += [("large", "shard", 0), ("large", "tensor", 0), ("large", "shard", 2)]
RECIPES = [*((name, "shard") for name in ("gpt", "transformer", "bert", "classifier", "dpo")), ("dpo", "tensor")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the results of two processes."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = train_tokenizer("wordpiece", ["a cat sat on a mat"] * 9, 30)
    for name, config in MODELS.items():
        torch.manual_seed(0)
        kind = {"gpt2": gpt2, "transformer": transformer, "bert": bert, "classifier": bert}.get(name, llama)
        model = kind.build(config)
        own = tokenizer if kind is bert or name == "gpt" else None
        save(model.bfloat16() if name == "tied" else model, own, folder / name)
    wanted = [{"name": f"{model}-{mesh}-{lora}", "work": "published", "model": str(folder / model), "lora": lora,
               "mesh": {mesh: 2}} for model, mesh, lora in CASES]  # fmt: skip
    wanted += [{"name": f"{recipe}-{mesh}", "work": "published", "model": str(folder / recipe), "recipe": recipe,
                "mesh": {mesh: 2}} for recipe, mesh in RECIPES]  # fmt: skip
    wanted += [{"name": f"drawn-{mesh}", "work": "drawn", "mesh": {mesh: 2}} for mesh in ("shard", "tensor")]
    return group_toys.start(folder, wanted, 2)


@pytest.mark.parametrize(("model", "mesh", "lora"), CASES)
def test_each_process_reads_its_part(model: str, mesh: str, lora: int, found: dict[str, Any]) -> None:
    """Half of every matrix, with those of a joined one and a tied head; tensor parallelism has norms, and an embedding
    that is no head, whole."""
    case = found[f"{model}-{mesh}-{lora}"]
    assert case["right"]
    assert case["read"] <= (0.5 if mesh == "shard" else 0.54)


@pytest.mark.parametrize(("recipe", "mesh"), RECIPES)
def test_each_process_reads_its_part_of_what_a_recipe_goes_on_from(
    recipe: str, mesh: str, found: dict[str, Any]
) -> None:
    """DPO's log-probabilities of its reference are computed by the split model, and are those of the whole one."""
    case = found[f"{recipe}-{mesh}"]
    assert case["right"]
    assert case["read"] <= (0.52 if mesh == "shard" else 0.54)


@pytest.mark.parametrize("mesh", ["shard", "tensor"])
def test_a_new_model_is_never_whole_on_a_process(mesh: str, found: dict[str, Any]) -> None:
    """Each process draws one matrix at a time and keeps its part, with the numbers of one process. With `tensor` the
    allocator keeps more of what is freed between the parts."""
    case = found[f"drawn-{mesh}"]
    assert case["right"] and case["grown"] < {"shard": 0.7, "tensor": 1.0}[mesh], case


@pytest.mark.parametrize(("mesh", "lora"), [("shard", 0), ("tensor", 0), ("shard", 2)])
def test_no_process_holds_the_whole_model(mesh: str, lora: int, found: dict[str, Any]) -> None:
    """At any moment, of its memory that is no part of the file."""
    assert found[f"large-{mesh}-{lora}"]["grown"] < 0.8  # about 0.6, and more if the allocator keeps what was freed
