"""Several processes learn what one learns: by data parallelism to the bits of one that adds up micro-batches, split by
any mesh to rounding; a state of one is resumed by any other."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import group_toys
import language_models
import pytest
import torch
from group_toys import learn
from model_entries import ENTRIES
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh

from keifu.distributed.mesh import Mesh, Shape
from keifu.distributed.tensor import tensor_parallel
from keifu.errors import UserError
from keifu.models import llama
from keifu.recipes.assistant.finetuning import Lora, to_train

Found = dict[str, Any]
Weights = dict[str, torch.Tensor]
ADAPTED = ["gpt2-lora", "llama-lora", "palm-lora"]
OVERLAPPED: dict[str, Any] = {"gradient_sum": "overlapped"}


def close(found: Found, expected: Found, tolerance: float = 1e-6) -> None:
    for name in ("losses", "validation"):
        assert found[name] == pytest.approx(expected[name], rel=tolerance), name
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def cases(meshes: list[dict[str, Any]], kinds: list[str], **more: Any) -> list[dict[str, Any]]:
    return [{"name": f"{kind}{place}", "kind": kind.removesuffix("-overlapped"), "mesh": mesh, **more}
            for kind in kinds for place, mesh in enumerate(meshes)]  # fmt: skip


AXES: dict[str, dict[str, Any]] = {
    "shard": {"mesh": {"shard": 2}, "micro_batch": 2}, "tensor": {"mesh": {"tensor": 2}, "micro_batch": 4},
    "pods": {"mesh": OVERLAPPED},
}  # fmt: skip
UNSPLIT = tuple(name for name, entry in ENTRIES.items() if "tensor" in entry.row.refused)
# Models whose kinds of layers others of the fast tests have: a split knows layers and no model.
LIKE_OTHERS = {
    "qwen2": "gpt2", "mistral": "gemma3", "qwen3": "gemma3", "smollm3": "llama", "phi3": "llama", "granite": "llama",
    "ministral": "llama", "exaone4": "olmo2", "gemma2": "gemma3", "qwen3-moe": "mixtral",
}  # fmt: skip
# Each other model is split in the fast tests: over tensors, or over shards if tensor parallelism refuses it.
FAST_MESHES = [(name, "shard" if name in UNSPLIT else "tensor") for name in language_models.LANGUAGE_MODELS
               if name not in LIKE_OTHERS]  # fmt: skip
FAST_MESHES += [("gpt2", "shard"), ("llama", "shard"), ("gpt2", "pods"), ("mixtral", "pods"), ("qwen3-next", "pods")]
OTHER_MESHES = [(name, axis) for name in language_models.LANGUAGE_MODELS for axis in AXES
                if (name, axis) not in FAST_MESHES and not (axis == "tensor" and name in UNSPLIT)]  # fmt: skip


def every_model(fast: bool) -> list[dict[str, Any]]:
    """Return the cases that train language models: those of the fast tests, and what is refused, or the others."""
    chosen = [*FAST_MESHES, *((name, "tensor") for name in UNSPLIT)] if fast else OTHER_MESHES
    return [{"name": f"every-{axis}", "work": "every_model", "names": [name for name, on in chosen if on == axis],
             **options} for axis, options in AXES.items()]  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Found]]:
    """Return the folder of the runs of two processes, and their results."""
    folder = tmp_path_factory.mktemp("two")
    wanted = cases([{}], ["gpt2"], steps=4)
    wanted += cases([{}, {"shard": 2}], ["clip"], steps=5, evaluate_every=3, evaluate_share=1.0)
    wanted += cases([{"activation_checkpointing": True}], ["ddpm"], steps=4)
    wanted += cases([{"shard": 2}], ["dit"], steps=4)
    wanted += cases([{"shard": 2}, {"tensor": 2}], ["llama"], steps=5, optimizer="muon", ema=0.9,
                    shard_bytes=20_000)  # fmt: skip
    wanted += [{"name": f"joined-{axis}", "kind": "gpt2", "mesh": {axis: 2}, "steps": 3, "shard_bytes": 10**9}
               for axis in ("shard", "tensor")]  # fmt: skip
    wanted.append({"name": "palm", "kind": "palm", "steps": 6, "stop": 3})
    wanted.append({"name": "joined", "kind": "palm", "mesh": {"tensor": 2, "activation_checkpointing": True},
                   "steps": 4, "optimizer": "adafactor"})  # fmt: skip
    wanted += cases([{"tensor": 2}], ["scores", "translation"], steps=3)
    wanted += cases([{"tensor": 2}], ADAPTED, steps=5, stop=3)
    wanted += [{"name": f"peak{again}", "work": "peak", "mesh": {"shard": 2, "activation_checkpointing": again}}
               for again in (False, True)]  # fmt: skip
    wanted += every_model(fast=True)
    wanted += cases([OVERLAPPED], ["ddpm-overlapped", "clip-overlapped"], steps=4)
    wanted.append({"name": "saved", "work": "saved", "mesh": {"shard": 2}})
    wanted += counted([{}, {"shard": 2}, {"shard": 2, "sync_each": True}, OVERLAPPED])
    return folder, group_toys.start(folder, wanted, 2)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Found]]:
    """Return the folder and the results of a run of one process, which is done once."""

    @cache
    def run(kind: str, steps: int, **options: Any) -> tuple[Path, Found]:
        folder = tmp_path_factory.mktemp("alone")
        return folder, learn(kind, folder, steps, **options)

    return run


MUON = {"optimizer": "muon", "ema": 0.9, "shard_bytes": 10**9}


def counted(meshes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return gradients of 8 rows, in 1 and 4 micro-batches a process."""
    world = max(mesh.get("pods", 1) * mesh.get("shard", 1) for mesh in meshes)
    return [{"name": f"counted{place}-{parts}", "work": "exchanges", "kind": "gpt2", "mesh": mesh, "rows": 4 * world,
             "micro_batch": 4 // parts} for place, mesh in enumerate(meshes) for parts in (1, 4)]  # fmt: skip


@pytest.mark.parametrize("kind", ["gpt2", "ddpm"])
def test_two_pods_have_the_bits_of_one_process_with_two_micro_batches(kind: str, two: Any, tmp_path: Path) -> None:
    alone = learn(kind, tmp_path, 4, micro_batch=3)
    assert two[1][f"{kind}0"]["losses"] == alone["losses"]
    assert two[1][f"{kind}0"]["weights"] == alone["weights"]


@pytest.mark.parametrize("place", [0, 1], ids=["whole", "shard"])
def test_contrastive_losses_are_those_of_the_large_batch(place: int, two: Any, alone: Any) -> None:
    """Also in the steps behind a validation, which gathers weights and has no backward pass."""
    close(two[1][f"clip{place}"], alone("clip", 5, evaluate_every=3, evaluate_share=1.0)[1])


def test_a_diffusion_transformer_is_split_by_its_blocks(two: Any, tmp_path: Path) -> None:
    close(two[1]["dit0"], learn("dit", tmp_path, 4))


def test_two_pods_resume_to_the_bits_of_one_process(two: Any, tmp_path: Path) -> None:
    alone = learn("palm", tmp_path, 6, micro_batch=3)
    assert two[1]["palm"]["weights"] == alone["weights"]


@pytest.mark.parametrize("place", [0, 1], ids=["shard", "tensor"])
def test_a_split_model_has_the_losses_of_the_whole(place: int, two: Any, alone: Any) -> None:
    """Grouped heads and dropout; Muon, whose update depends on whole matrices; a moving average for validation."""
    close(two[1][f"llama{place}"], alone("llama", 5, **MUON)[1], 1e-5)


def test_one_head_of_keys_is_on_both_processes(two: Any, tmp_path: Path) -> None:
    close(two[1]["joined"], learn("palm", tmp_path, 4, optimizer="adafactor"))


@pytest.mark.parametrize("place", [0, 1], ids=["shard", "tensor"])
def test_a_split_model_is_written_in_parts_of_which_none_is_the_whole(place: int, two: Any, alone: Any) -> None:
    """As Hugging Face's shards, whose numbers are those of one process's model."""
    whole = load_file(alone("llama", 5, **MUON)[0] / "model.safetensors")
    files = sorted((two[0] / f"llama{place}").glob("model-*.safetensors"))
    assert len(files) > 3 and max(file.stat().st_size for file in files) < 22_000
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("axis", ["shard", "tensor"])
def test_what_is_one_matrix_in_the_file_is_written_as_one(axis: str, two: Any, alone: Any) -> None:
    """GPT-2's queries, keys and values, which are three here and split one by one."""
    folders = two[0] / f"joined-{axis}", alone("gpt2", 3, shard_bytes=10**9)[0]
    found, whole = (load_file(folder / "model.safetensors") for folder in folders)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("place", "adds"), [(0, 1), (1, 1), (2, 4), (3, 1)], ids=["whole", "shard", "sync each", "overlapped"]
)
def test_gradients_are_exchanged_once_a_step(place: int, adds: int, two: Any) -> None:
    """However many micro-batches; unless the mesh asks for more. Weights are gathered for each pass; the numbers are
    those of one micro-batch, after a step that was given up too."""
    one, four = (two[1][f"counted{place}-{parts}"] for parts in (1, 4))
    for name in ("alltoall_base_", "_reduce_scatter_base_", "allreduce_", "allgather_", "allreduce_coalesced_"):
        assert four["counted"].get(name, 0) == one["counted"].get(name, 0) * (adds if "scatter" in name else 1), name
    assert four["counted"].get("_allgather_base_", 0) == 4 * one["counted"].get("_allgather_base_", 0)
    for name in ("loss", "norm"):
        assert four["counted"][name] == pytest.approx(one["counted"][name], rel=1e-6)
        assert four["again"][name] == four["counted"][name]


def test_activations_that_are_computed_again_need_no_memory(two: Any) -> None:
    """With FSDP: the same gradient, and less than half of the memory of a step."""
    kept, again = two[1]["peakFalse"], two[1]["peakTrue"]
    assert again["loss"] == kept["loss"] and again["norm"] == pytest.approx(kept["norm"], rel=1e-6)
    assert again["grown"] < kept["grown"] / 2


@pytest.fixture(scope="module")
def other_meshes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train each language model on the meshes that `two` leaves out, and return the folder of the weights."""
    folder = tmp_path_factory.mktemp("other-meshes")
    group_toys.start(folder, every_model(fast=False), 2)
    return folder


@pytest.mark.parametrize("name", UNSPLIT)
def test_tensor_parallelism_refuses_a_language_model_that_it_cannot_split(name: str, two: Any) -> None:
    assert ENTRIES[name].row.refused["tensor"] in two[1]["every-tensor"][name]


@pytest.mark.parametrize(("name", "axis"), FAST_MESHES)
def test_a_language_model_on_two_processes_learns_the_weights_of_one(name: str, axis: str, two: Any) -> None:
    """Compare weights, because a gradient that is summed over half of the processes hardly changes a loss."""
    same_weights(two[0] / f"every-{axis}", name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axis"), OTHER_MESHES)
def test_a_language_model_on_another_mesh_learns_the_weights_of_one(name: str, axis: str, other_meshes: Path) -> None:
    same_weights(other_meshes / f"every-{axis}", name)


@cache
def learned_alone(name: str) -> tuple[Weights, Weights]:
    """Return the weights with which one process begins, and those that it learns."""
    begun = {key: weight.detach() for key, weight in language_models.build(name).named_parameters()}
    return begun, language_models.trained(name)


def same_weights(folder: Path, name: str) -> None:
    """Compare the weights that several processes have written with those of one."""
    found, (begun, alone) = load_file(folder / f"{name}.safetensors"), learned_alone(name)
    assert found.keys() == alone.keys()
    for key, weight in alone.items():
        moved = float((weight - begun[key]).abs().max())
        assert moved > 5e-5, key
        assert float((found[key] - weight).abs().max()) < 5e-3 * moved, key


def test_autograd_keeps_no_whole_weights_of_a_sharded_model(two: Any) -> None:
    """In bfloat16: FSDP gathers bfloat16 weights, so that autocast makes no copies, which would be kept."""
    assert two[1]["saved"]["kept"] <= two[1]["saved"]["shard"] / 4


@pytest.mark.slow
def test_sharded_pods_sum_their_gradients(tmp_path: Path) -> None:
    """Four processes in two pods; a gradient of one pod would give other norms and weights."""
    case = {"name": "pods", "kind": "gpt2", "mesh": {"pods": 2, "shard": 2}, "steps": 3, "rows": 8, "warmup": 0}
    found, alone = group_toys.start(tmp_path, [case], 4)["pods"], learn("gpt2", tmp_path / "a", 3, rows=8, warmup=0)
    close(found, alone)


@pytest.mark.slow
def test_two_sharded_pods_exchange_gradients_once_a_step(tmp_path: Path) -> None:
    found = group_toys.start(tmp_path, counted([{"pods": 2, "shard": 2}]), 4)
    one, four = (found[f"counted0-{parts}"]["counted"] for parts in (1, 4))
    for name in ("alltoall_base_", "_reduce_scatter_base_", "allreduce_", "allgather_"):
        assert four[name] == one[name] > 0, name
    assert four["norm"] == pytest.approx(one["norm"], rel=1e-6)


@pytest.mark.parametrize("kind", ["ddpm", "clip"])
def test_gradients_that_are_summed_in_the_backward_pass_have_the_losses_of_one_process(
    kind: str, two: Any, tmp_path: Path
) -> None:
    close(two[1][f"{kind}-overlapped0"], learn(kind, tmp_path, 4))


@pytest.mark.slow
def test_pods_that_sum_in_the_backward_pass_learn_the_weights_of_one_process(tmp_path: Path) -> None:
    """Four processes as HSDP, also with a sum of each micro-batch within a pod, and with tensor parallelism."""
    meshes = {"hsdp": {"pods": 2, "shard": 2}, "each": {"pods": 2, "shard": 2, "sync_each": True},
              "tensor": {"pods": 2, "tensor": 2}, "whole": {}}  # fmt: skip
    names = ["gpt2", "llama", "mistral", "mixtral"]
    wanted = [{"name": name, "work": "every_model", "mesh": {**mesh, **OVERLAPPED}, "names": names, "micro_batch": 1}
              for name, mesh in meshes.items()]  # fmt: skip
    wanted.append({"name": "clip", "kind": "clip", "mesh": {"pods": 2, "shard": 2, **OVERLAPPED}, "steps": 8})
    found = group_toys.start(tmp_path, wanted, 4)
    close(found["clip"], learn("clip", tmp_path / "alone", 8))
    for mesh in meshes:
        for name in names:
            if name in found[mesh]:
                assert (mesh, name) == ("tensor", "mixtral")  # which it cannot split
            else:
                same_weights(tmp_path / mesh, name)


@pytest.mark.parametrize("kind", ["scores", "translation"])
def test_a_head_that_is_split_over_its_classes_gives_the_losses_of_the_whole(
    kind: str, two: Any, tmp_path: Path
) -> None:
    """With label smoothing; and where the whole matrix is asked for, as log-probabilities and logits do."""
    found, alone = two[1][f"{kind}0"], learn(kind, tmp_path, 3)
    close(found, alone)
    figures = [{name: value for name, value in each["figures"].items() if name.startswith("validation_")}
               for each in (found, alone)]  # fmt: skip
    assert figures[0] == pytest.approx(figures[1], rel=1e-5) and figures[0]


def test_each_process_holds_its_own_classes(two: Any, tmp_path: Path) -> None:
    assert learn("scores", tmp_path, 1, warmup=0)["rows"]["head.weight"] == 31
    assert two[1]["scores0"]["rows"]["head.weight"] == 15
    assert two[1]["joined"]["rows"]["embedding.weight"] == 15


@pytest.mark.parametrize("kind", ADAPTED)
def test_adapters_of_split_matrices_learn_what_those_of_whole_ones_learn(kind: str, two: Any, tmp_path: Path) -> None:
    """With dropout and without, of joined matrices and of a head of keys that both processes have; resumed, and written
    as one process writes them."""
    close(two[1][f"{kind}0"], learn(kind, tmp_path, 5, stop=3))
    found, alone = (load_file(folder / "adapter_model.safetensors") for folder in (two[0] / f"{kind}0", tmp_path))
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "mesh", "kind"), [(3, {"tensor": 3}, "palm-lora"), (4, {"tensor": 4}, "llama-lora"),
                                                     (4, {"shard": 2, "tensor": 2}, "palm-lora")])  # fmt: skip
def test_adapters_on_more_processes(world: int, mesh: dict[str, int], kind: str, tmp_path: Path) -> None:
    """Also heads of keys that some processes share."""
    found = group_toys.start(tmp_path, [{"name": "found", "kind": kind, "mesh": mesh, "rows": 7}], world)["found"]
    close(found, learn(kind, tmp_path / "alone", rows=7), 1e-6)


@pytest.mark.parametrize(("lora", "what"), [(Lora(2, dora=True), "DoRA"), (Lora(2, base="int4"), "--lora.base int4")])
def test_what_tensor_parallelism_cannot_split_of_an_adapter_is_refused(lora: Lora, what: str) -> None:
    model = to_train(llama.build(llama.Config(**group_toys.WORDS | {"hidden_dim": 64})), lora, 0)
    with pytest.raises(UserError, match=f"{what} cannot be split over --mesh.tensor: use --mesh.shard"):
        tensor_parallel(model, Mock(spec=DeviceMesh))


@pytest.mark.parametrize("place", [0, 1], ids=["shard", "tensor"])
def test_one_process_goes_on_with_a_split_model(place: int, two: Any, alone: Any) -> None:
    found = learn("llama", two[0] / f"llama{place}", 7, optimizer="muon", ema=0.9)
    assert found["losses"] == pytest.approx(alone("llama", 7, **MUON)[1]["losses"], rel=1e-5)


MESHES = {
    3: [{}, {"shard": 3}],
    4: [{}, {"pods": 2}, {"pods": 2, "shard": 1, "tensor": 2}, {"shard": 2, "tensor": 2}, {"tensor": 4}],
}


@pytest.mark.slow
@pytest.mark.timeout(3600)  # many groups of processes
@pytest.mark.parametrize("world", MESHES)
def test_any_mesh_has_the_losses_of_one_process(world: int, tmp_path: Path) -> None:
    """Fifty steps; rows that are no multiple of the processes."""
    words = ["gpt2", "palm", "llama", "translation"]
    whole = [mesh for mesh in MESHES[world] if "tensor" not in mesh]
    wanted = cases(MESHES[world], words, rows=7) + cases(whole, ["ddpm", "dit", "clip"], rows=7)
    found = group_toys.start(tmp_path, wanted, world)
    for kind in (*words, "ddpm", "dit", "clip"):
        alone = learn(kind, tmp_path / f"alone-{kind}", rows=7)
        for name, other in found.items():
            if name[:-1] == kind:
                close(other, alone, 2e-6)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # many groups of processes, each of which compiles
@pytest.mark.parametrize("kind", ["gpt2", "llama", "ddpm", "dit"])
def test_blocks_that_are_compiled_learn_the_same(kind: str, tmp_path: Path) -> None:
    meshes = [{}, {"shard": 2}, {"shard": 2, "activation_checkpointing": True}]
    meshes += [{"tensor": 2}] if kind not in ("ddpm", "dit") else []
    wanted = cases([{**mesh, "compile_blocks": True} for mesh in meshes], [kind], steps=8)
    for found in group_toys.start(tmp_path, wanted, 2).values():
        close(found, learn(kind, tmp_path / "alone", 8), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "palm", "ddpm"])
def test_two_pods_have_these_bits_through_a_hundred_steps(kind: str, tmp_path: Path) -> None:
    found = group_toys.start(tmp_path, [{"name": "two", "kind": kind, "steps": 100, "stop": 37}], 2)["two"]
    alone = learn(kind, tmp_path / "alone", 100, micro_batch=3)
    assert found["losses"] == alone["losses"] and found["weights"] == alone["weights"]


@pytest.mark.slow
def test_any_mesh_goes_on_with_the_state_of_another(tmp_path: Path) -> None:
    """From one process to two and three, and from a mesh to another one."""
    expected = learn("llama", tmp_path / "alone", 30)
    learn("llama", tmp_path / "run", 10)
    steps = [(2, {"tensor": 2}), (3, {"shard": 3}), (2, {}), (4, {"shard": 2, "tensor": 2})]
    for number, (world, mesh) in enumerate(steps, 3):
        case = {"name": "run", "kind": "llama", "steps": 5 * number, "mesh": mesh}
        found = group_toys.start(tmp_path, [case], world)["run"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)


@pytest.mark.parametrize(
    ("mesh", "count", "shape"),
    [
        (Mesh(), 4, Shape(4, 1, 1)), (Mesh(pods=2), 4, Shape(2, 2, 1)), (Mesh(shard=2), 4, Shape(2, 2, 1)),
        (Mesh(pods=2, tensor=2), 8, Shape(2, 2, 2)), (Mesh(tensor=4), 4, Shape(1, 1, 4)),
        (Mesh(pods=2), 2, Shape(2, 1, 1)),
    ],
)  # fmt: skip
def test_a_mesh_fills_the_processes(mesh: Mesh, count: int, shape: Shape) -> None:
    assert mesh.fit(count) == shape


@pytest.mark.parametrize("mesh", [Mesh(pods=3), Mesh(shard=3), Mesh(tensor=8), Mesh(pods=4, shard=2)])
def test_a_mesh_that_does_not_fit_is_refused(mesh: Mesh) -> None:
    with pytest.raises(UserError, match="The mesh does not fit: pods .* there are 4"):
        mesh.fit(4)


def test_after_a_restart_there_may_be_fewer_pods() -> None:
    assert Mesh(pods=2, shard=2).fit(2, fewer=True) == Shape(1, 2, 1)
