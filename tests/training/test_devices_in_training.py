"""What a run does with its device: batches made beside the computation, number formats, memory that runs out."""

import json
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_toys import Sequences, objective, run, settings, toy

sys.path.insert(0, str(Path(__file__).parent.parent))

from simulated_device import device, simulated  # noqa: E402

from keifu import devices  # noqa: E402
from keifu.models import gpt2  # noqa: E402
from keifu.processes import Processes, use  # noqa: E402
from keifu.recipes.assistant.finetuning import Lora, to_train  # noqa: E402
from keifu.training.hardware import cost, failures, flops  # noqa: E402
from keifu.training.hardware.precision import (  # noqa: E402
    LossScale,
    deterministic,
    resolve_dtype,
    tensor_float32,
)
from keifu.training.loader import Loader  # noqa: E402
from keifu.training.loop import train  # noqa: E402
from keifu.training.objectives.language_modeling import causal_language_modeling  # noqa: E402
from keifu.training.run import checkpoint  # noqa: E402
from keifu.training.settings import Settings  # noqa: E402
from keifu.training.trainer import Trainer  # noqa: E402


class Counted(Sequences):
    """Notes every batch that is made, and whether two are made at the same time."""

    def __init__(self):
        super().__init__()
        self.made, self.busy = [], False

    def batch(self, step: int):
        assert not self.busy, "data are used in two threads at once"
        self.busy = True
        self.made.append(step)
        found = super().batch(step)
        self.busy = False
        return found


def ended(directory: Path) -> dict[str, torch.Tensor]:
    return checkpoint.latest(directory)[0].tensors


def same(one: Path, other: Path) -> bool:
    a, b = ended(one), ended(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def ahead(monkeypatch) -> None:
    """Make batches ahead on a CPU too."""
    monkeypatch.setattr("keifu.training.loop.prefetches", lambda device: True)


def test_batches_made_ahead_change_no_bit_and_none_is_made_in_vain(tmp_path: Path, monkeypatch) -> None:
    train(toy(), objective, Sequences(), settings(), run(tmp_path / "plain"))
    monkeypatch.setattr("keifu.training.loop.prefetches", lambda device: True)
    data = Counted()
    train(toy(), objective, data, settings(), run(tmp_path / "ahead"))
    assert same(tmp_path / "plain", tmp_path / "ahead")
    steps = [number for number in data.made if number < 12]
    assert steps == [0, 0, *range(12)] or steps == [0, *range(12)]  # the first ones measure the cost


def test_a_run_that_makes_batches_ahead_is_resumed_to_the_bit(tmp_path: Path, ahead: None) -> None:
    train(toy(), objective, Sequences(), settings(keep=9), run(tmp_path / "whole"))
    train(toy(), objective, Sequences(), settings(keep=9), run(tmp_path / "cut"))
    for step in (9, 12):
        checkpoint.remove(tmp_path / "cut", step)
    train(toy(), objective, Sequences(), settings(keep=9), run(tmp_path / "cut", resume=True))
    assert same(tmp_path / "whole", tmp_path / "cut")


def test_an_error_in_the_thread_reaches_the_run_after_the_steps_before_it(tmp_path: Path, ahead: None) -> None:
    class Broken(Sequences):
        def batch(self, step: int):
            if step == 8:
                raise RuntimeError("the shard is gone")
            return super().batch(step)

    with pytest.raises(RuntimeError, match="the shard is gone"):
        train(toy(), objective, Broken(), settings(), run(tmp_path))
    assert checkpoint.steps(tmp_path)[-1] == 8


def test_a_batch_that_was_made_in_vain_is_dropped() -> None:
    data = Counted()
    loader = Loader(data.batch, torch.device("cpu"), ahead=True)
    loader.get(3, 4)
    assert torch.equal(loader.get(7)["tokens"], Sequences().batch(7)["tokens"])
    loader.close()
    assert data.made == [3, 4, 7]


def scarce(rows: int, after: int):
    """Return the objective with too little memory for more than `rows` rows after `after` calls."""
    calls = 0

    def limited(model, batch):
        nonlocal calls
        calls += 1
        if calls > after and len(batch["tokens"]) > rows:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3000000 bytes.")
        return objective(model, batch)

    return limited


def test_out_of_memory_halves_the_rows_and_the_run_goes_on(tmp_path: Path, capsys) -> None:
    train(toy(dropout=0.0), scarce(2, 12), Sequences(), settings(), run(tmp_path / "scarce"))
    train(toy(dropout=0.0), objective, Sequences(), settings(), run(tmp_path / "enough"))
    one, other = ended(tmp_path / "scarce"), ended(tmp_path / "enough")
    for name in one:
        if "calls" not in name:
            torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4)
    told = capsys.readouterr().err
    assert "3 MB more were asked for; from here 3 rows are computed at a time" in told and "from here 1 rows" in told
    resolved = json.loads((tmp_path / "scarce" / "recipe.json").read_text())["resolved"]
    assert resolved["micro_batch"] == 1


def test_where_not_even_one_row_fits_the_run_stops_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(failures.OutOfMemory, match="3 MB more were asked for.*micro_batch"):
        train(toy(), scarce(0, 12), Sequences(), settings(), run(tmp_path))


def test_a_process_that_shares_the_model_makes_no_other_passes_than_the_others(tmp_path: Path) -> None:
    class Split(Processes):
        is_replicated = False

    with use(Split()), pytest.raises(failures.OutOfMemory, match="3 MB more were asked for.*micro_batch"):
        train(toy(), scarce(2, 12), Sequences(), settings(), run(tmp_path))


def test_float16_scales_the_loss_and_resumes_to_the_bit(tmp_path: Path) -> None:
    half = settings(precision="float16", keep=9)
    train(toy(), objective, Sequences(), half, run(tmp_path / "whole"))
    facts = checkpoint.latest(tmp_path / "whole")[0].facts
    assert 1 <= facts["loss_scale"]["value"] <= LossScale.FIRST and facts["loss_scale"]["steps"] > 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (9, 12):
        checkpoint.remove(tmp_path / "cut", step)
    train(toy(), objective, Sequences(), half, run(tmp_path / "cut", resume=True))
    assert same(tmp_path / "whole", tmp_path / "cut")
    assert checkpoint.latest(tmp_path / "cut")[0].facts["loss_scale"] == facts["loss_scale"]


def test_a_scale_that_is_too_high_is_lowered_and_the_step_made_all_the_same(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(LossScale, "FIRST", 2.0**120)
    monkeypatch.setattr(LossScale, "INTERVAL", 5)
    train(toy(), objective, Sequences(), settings(precision="float16"), run(tmp_path))
    found = checkpoint.latest(tmp_path)[0]
    assert found.step == 12 and found.facts["loss_scale"]["value"] < 2.0**40
    assert all(bool(tensor.isfinite().all()) for tensor in found.tensors.values())


def test_the_scale_moves_for_float16_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        scale = LossScale(dtype)
        assert scale.value == 1 and not scale.lower()
    scale = LossScale(torch.float16)
    scale.begin(1000.0)
    assert scale.factor == LossScale.FIRST / 1024
    for _ in range(LossScale.INTERVAL):
        scale.count()
    assert scale.value == 2 * LossScale.FIRST
    assert scale.lower() and scale.value == LossScale.FIRST


def words(dtype: torch.dtype, **changed: Any) -> Trainer:
    """Return a trainer of a small language model, whose loss is a sum over thousands of tokens."""
    torch.manual_seed(0)
    model = gpt2.build(gpt2.Config(vocab_size=61, context_length=128, dim=32, hidden_dim=64, n_layers=2, n_heads=4))
    chosen = Settings(**{"batch_size": 32, "micro_batch": 16, **changed})
    return Trainer(model.train(), causal_language_modeling, chosen, dtype=dtype)


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_a_gradient_in_float16_is_that_of_float32(clip: float) -> None:
    """Also when it is clipped: the loss scale is taken out before the norm is measured."""
    batch = {"tokens": torch.randint(61, (32, 129), generator=torch.Generator().manual_seed(1))}
    found = {}
    for dtype in (torch.float32, torch.float16):
        trainer = words(dtype, clip=clip)
        gradient = trainer.gradient(0, batch)
        assert gradient
        total = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
        found[dtype] = float(gradient.norm), float(total)
    assert found[torch.float16] == pytest.approx(found[torch.float32], rel=0.01)
    assert found[torch.float16][1] == pytest.approx(clip or found[torch.float16][0], rel=0.01)


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_the_first_loss_scale_repeats_no_step(rows: int) -> None:
    """Whatever number of tokens the loss is summed over: the scale is that of the mean."""
    trainer = words(torch.float16, batch_size=rows, micro_batch=rows)
    tokens = torch.randint(61, (rows, 129), generator=torch.Generator().manual_seed(1))
    gradient = trainer.gradient(0, {"tokens": tokens})
    assert gradient and bool(gradient.norm.isfinite())
    assert trainer.state.scale.value == LossScale.FIRST
    assert trainer.state.scale.factor == LossScale.FIRST / (128 * rows)


FLAGS: dict[str, Any] = {
    "matmul": lambda: torch.backends.cuda.matmul.allow_tf32, "cudnn": lambda: torch.backends.cudnn.allow_tf32,
    "precision": torch.get_float32_matmul_precision, "algorithms": torch.are_deterministic_algorithms_enabled,
    "kernels": lambda: torch.backends.cudnn.deterministic, "search": lambda: torch.backends.cudnn.benchmark,
}  # fmt: skip


def flags() -> dict[str, Any]:
    """Read all flags, as inductor and other libraries do; a mixed state of the two TF32 interfaces is an error."""
    return {name: read() for name, read in FLAGS.items()}


@pytest.mark.parametrize(("precision", "allowed"), [("auto", True), ("bfloat16", True), ("float32", False)])
def test_tf32_is_set_by_one_interface_and_restored(precision: str, allowed: bool) -> None:
    """float32 is what the recipes of PPO, GRPO and DPO ask for, whose ratios need all its bits."""
    before = flags()
    with tensor_float32(torch.device("cuda"), precision):
        inside = flags()
    assert inside["matmul"] == inside["cudnn"] == allowed
    assert inside["precision"] == ("high" if allowed else "highest")
    assert flags() == before
    with tensor_float32(torch.device("cpu"), "auto"):
        assert flags() == before


def test_deterministic_kernels_are_asked_for_and_the_flags_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = flags()
    with deterministic(torch.device("cuda"), True):
        assert flags() == before | {"algorithms": True, "kernels": True, "search": False}
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert flags() == before
    for kind, wanted in (("cuda", False), ("cpu", True)):
        with deterministic(torch.device(kind), wanted):
            assert flags() == before


def test_the_command_line_asks_for_deterministic_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("keifu.training.loop.deterministic", lambda *given: seen.append(given) or nullcontext())
    with devices.choosing(devices.Choice(deterministic=True)):
        train(toy(), objective, Sequences(), settings(steps=1, warmup=0), run(tmp_path))
    assert seen == [(torch.device("cpu"), True)]


def test_the_memory_of_a_frozen_base_is_not_taken_for_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA: with this much memory the rows that are chosen fit, though the base is larger than all that is free."""
    model = to_train(gpt2.build(gpt2.Config(211, 64, 128, 512, 2, 4)), Lora(2), 0)
    trainer = Trainer(model, causal_language_modeling, Settings(batch_size=16, precision="float32"))
    batch = {"tokens": torch.randint(211, (16, 65), generator=torch.Generator().manual_seed(1))}
    free = cost.estimate(trainer, batch, None)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert frozen > 1.5 * 2**20
    for rows in (2, 5):
        room = int((rows + 0.5) * free.row_bytes + free.fixed_bytes + free.parameter_bytes + free.optimizer_bytes)
        monkeypatch.setattr(cost, "available_memory", lambda device, room=room: int(room / cost.SAFETY))
        assert cost.estimate(trainer, batch, None).micro_batch <= rows


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_the_command_lines_precision_is_that_of_the_run(tmp_path: Path, kind: str) -> None:
    with devices.choosing(devices.Choice(precision=kind)):
        train(toy(), objective, Sequences(), settings(steps=3), run(tmp_path))
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert recipe["settings"]["precision"] == recipe["resolved"]["precision"] == kind


def test_auto_is_half_precision_on_every_gpu() -> None:
    assert resolve_dtype("auto", torch.device("meta")) == torch.float16


@pytest.mark.parametrize(("before", "precision"), [("NVIDIA A100 (cuda:0)", "float16"), ("cpu, 99 threads", "float32")])
def test_a_run_that_goes_on_on_another_device_says_so(tmp_path: Path, capsys, before: str, precision: str) -> None:
    train(toy(), objective, Sequences(), settings(keep=9, precision="auto"), run(tmp_path))
    for step in (9, 12):
        checkpoint.remove(tmp_path, step)
    facts = tmp_path / "state" / "step-00000006.json"
    content = json.loads(facts.read_text())
    content["resolved"] |= {"device": before, "precision": precision}
    del content["facts_sha256"]
    facts.write_text(json.dumps(content | {"facts_sha256": checkpoint._hash(content)}))
    capsys.readouterr()
    train(toy(), objective, Sequences(), settings(keep=9, precision="auto"), run(tmp_path, resume=True))
    told = capsys.readouterr().err
    assert f"The run was on {before} and goes on on cpu" in told and "the same bits" in told
    assert "matrix products in float16" not in told and checkpoint.steps(tmp_path)[-1] == 12


def test_another_number_of_threads_or_place_is_the_same_kind_of_device() -> None:
    assert devices.same_kind("cpu, 2 threads", "cpu, 64 threads")
    assert devices.same_kind("NVIDIA L4 (cuda:0)", "NVIDIA L4 (cuda:1)")
    assert not devices.same_kind("NVIDIA L4 (cuda:0)", "NVIDIA L40 (cuda:0)")


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.float32, 378),
        ("NVIDIA H200", torch.float16, 989),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("Tesla T4", torch.float16, 65),
        ("Tesla T4", torch.bfloat16, None),
        ("Tesla V100-SXM2-16GB", torch.float32, 15.7),
        ("Tesla V100-PCIE-32GB", torch.float16, 112),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA A10G", torch.bfloat16, None),
        ("AMD Instinct MI300X", torch.bfloat16, 1307),
        ("AMD Instinct MI250X", torch.float16, 191.5),
        ("A card of tomorrow", torch.bfloat16, None),
    ],
)
def test_the_peak_of_a_known_gpu_is_its_makers(name: str, dtype: torch.dtype, tera: float | None) -> None:
    assert flops.named_peak(name, dtype) == (None if tera is None else tera * 1e12)


@pytest.mark.parametrize(
    ("name", "units", "gigahertz", "operations"),
    [
        ("NVIDIA H100 PCIe", 114, 1.620, (4096, 4096, 2048)),
        ("NVIDIA H100 80GB HBM3", 132, 1.830, (4096, 4096, 2048)),
        ("NVIDIA A100-SXM4-80GB", 108, 1.410, (2048, 2048, 1024)),
        ("NVIDIA A30", 56, 1.440, (2048, 2048, 1024)),
        ("NVIDIA A40", 84, 1.740, (1024, 1024, 512)),
        ("NVIDIA A10", 72, 1.695, (1024, 1024, 512)),
        ("NVIDIA RTX A6000", 84, 1.800, (1024, 1024, 512)),
        ("NVIDIA L40S", 142, 2.520, (1024, 1024, 512)),
        ("NVIDIA L40", 142, 2.490, (512, 512, 256)),
        ("NVIDIA L4", 58, 2.040, (1024, 1024, 512)),
        ("Tesla T4", 40, 1.590, (0, 1024, 128)),
        ("Tesla V100-PCIE-32GB", 80, 1.380, (0, 1024, 128)),
        ("Tesla V100-SXM2-32GB", 80, 1.530, (0, 1024, 128)),
        ("NVIDIA GeForce RTX 3090", 82, 1.695, (512, 512, 256)),
        ("NVIDIA GeForce RTX 4090", 128, 2.520, (512, 512, 256)),
        ("NVIDIA GeForce RTX 5090", 170, 2.407, (512, 512, 256)),
        ("AMD Instinct MI100", 120, 1.502, (512, 1024, 256)),
        ("AMD Instinct MI210", 104, 1.700, (1024, 1024, 256)),
        ("AMD Instinct MI250X", 110, 1.700, (1024, 1024, 256)),
        ("AMD Instinct MI250", 104, 1.700, (1024, 1024, 256)),
        ("AMD Instinct MI300A", 228, 2.100, (2048, 2048, 1024)),
        ("AMD Instinct MI300X", 304, 2.100, (2048, 2048, 1024)),
    ],
)
def test_a_peak_is_units_times_clock_times_operations(
    name: str, units: int, gigahertz: float, operations: tuple[int, int, int]
) -> None:
    for dtype, each in zip(flops.FORMATS, operations, strict=True):
        computed = units * gigahertz * 1e9 * each
        assert (flops.named_peak(name, dtype) or 0.0) == pytest.approx(computed, rel=0.03)


@pytest.mark.parametrize(
    "optimizer", ["adamw", "muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adadelta", "adafactor"))]
)
def test_a_run_on_another_device_is_that_on_the_cpu(tmp_path: Path, optimizer: str) -> None:
    changed = {"optimizer": optimizer, "ema": 0.9, "micro_batch": 4, "save_every": 4}
    train(toy(), objective, Sequences(), settings(**changed), run(tmp_path / "cpu"))
    with simulated():
        train(toy().to(device()), objective, Sequences(), settings(**changed), run(tmp_path / "there"))
        checkpoint.remove(tmp_path / "there", 12)
        train(toy().to(device()), objective, Sequences(), settings(**changed), run(tmp_path / "there", resume=True))
    one, other = (load_file(tmp_path / where / "state/step-00000012.safetensors") for where in ("cpu", "there"))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_a_step_waits_for_the_device_once(tmp_path: Path) -> None:
    rare = {"log_every": 1000, "evaluate_every": 0, "save_every": 0, "warmup": 0}
    counts = []
    for steps in (4, 9):
        with simulated() as reads:
            train(toy().to(device()), objective, Sequences(), settings(steps=steps, **rare), run(tmp_path / f"{steps}"))
        counts.append(sum(reads.values()))
    assert counts[1] - counts[0] == 5
