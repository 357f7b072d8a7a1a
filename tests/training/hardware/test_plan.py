"""Plans on paper: beside what was published, how they follow the devices, and what is refused."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from keifu.commands.reference import plan as plan_command
from keifu.commands.reference.plan import architecture
from keifu.commands.shared.flags import parse_command
from keifu.errors import UserError
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.models import llama
from keifu.models.diffusion import dit
from keifu.models.sizes import published_sizes
from keifu.recipes.assistant.finetuning import Lora, to_train
from keifu.training.hardware import cost, flops, plan
from keifu.training.hardware.flops import count_flops
from keifu.training.hardware.plan import DEVICES, Plan, Trained, parse_amount, parse_devices
from keifu.training.objectives.diffusion import DiffusionLoss
from keifu.training.objectives.language_modeling import causal_language_modeling
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

SIZES = {size.name: size for size in published_sizes()}


def planned(name: str, devices: str, batch: float = 4e6) -> Plan:
    return plan.plan(architecture(SIZES[name]), *parse_devices(devices), batch)


def test_training_takes_about_what_was_published() -> None:
    """LLaMA (section 2.4), PaLM (table 3), Llama 2 (table 2), GPT-3 (appendix D)."""
    llama, palm = planned("llama-65b", "2048xA100-80G"), planned("palm-540b", "6144xTPU-v4", 2048 * 2048)
    assert llama.rate == pytest.approx(380, rel=0.25)
    assert llama.hours(1.4e12) / 24 / 2048 == pytest.approx(21, rel=0.25)
    assert palm.utilisation == pytest.approx(0.462, rel=0.25)
    assert planned("llama2-70b", "2000xA100-80G").hours(2e12) == pytest.approx(1.72e6, rel=0.25)
    assert architecture(SIZES["gpt3-175b"]).flops * 300e9 / 8.64e19 == pytest.approx(3640, rel=0.05)


@pytest.mark.parametrize(
    ("name", "count", "batch", "rates"),
    [
        ("llama3.1-8b", 8, 131e3, (5762, 6667)),  # not compiled, and compiled
        ("llama3.1-8b", 128, 2e6, (5605, 6514)),
        ("llama3.1-70b", 256, 4e6, (829,)),  # with float8
        ("llama3.1-405b", 512, 4e6, (100, 128)),  # with float8 and pipelines
    ],
)
def test_training_on_h100_takes_what_torchtitan_published(
    name: str, count: int, batch: float, rates: tuple[float, ...]
) -> None:
    """Its runs of December 2024, tokens/s on each GPU."""
    made = planned(name, f"{count}xH100-80G", batch)
    assert all(made.rate == pytest.approx(rate, rel=0.15) for rate in rates)


def test_what_is_computed_again_takes_time_and_saves_memory() -> None:
    model, (devices, kind) = architecture(SIZES["llama-7b"]), parse_devices("8xH100-80G")
    ways = [plan._planned(model, plan.PodLayout(1, 8, 1, 4, how), devices, kind, 4e6) for how in plan.AGAIN]
    kept = [made.memory["activations"] for made in ways]
    assert kept == sorted(kept, reverse=True) and kept[0] > 5 * kept[2]
    assert ways[0].step < ways[1].step < ways[2].step
    assert ways[1].seconds["products"] == ways[0].seconds["products"]


def test_adapters_of_a_7b_with_4096_tokens_fit_24_gigabytes() -> None:
    model, (devices, kind) = architecture(SIZES["llama-7b"], 4096), parse_devices("1xRTX4090-24G")
    with pytest.raises(UserError, match="does not fit"):
        plan.plan(model, devices, kind, 65_536)
    made = {base: plan.plan(model, devices, kind, 65_536, Trained(16, base)) for base in ("float", "int4")}
    assert all(sum(each.memory.values()) <= plan.USED * 24e9 for each in made.values())
    assert made["float"].layout.checkpointing == "blocks"
    row = plan.PodLayout(1, 1, 1, 1, "blocks")
    bytes_of = [sum(plan._memory(model, row, Trained(16, base)).values()) for base in ("float", "int4")]
    assert 14e9 < bytes_of[0] < 18e9 and 5e9 < bytes_of[1] < 8e9
    assert Trained(16).parameters(model) == 39_976_960  # as PEFT counts them


def test_averages_in_8_bits_take_6_bytes_less_of_a_parameter_and_are_not_split() -> None:
    model, (devices, kind) = architecture(SIZES["gpt2"]), parse_devices("8xA100-80G")
    usual, small = (plan.plan(model, devices, kind, 4e6, Trained(optimizer_state=how)) for how in ("float32", "int8"))
    layout = small.layout
    assert layout.shard == layout.tensor == 1
    row = plan.PodLayout(8, 1, 1, 1, "none")
    kept = [plan._memory(model, row, Trained(optimizer_state=how))["optimizer"] for how in ("float32", "int8")]
    assert kept[0] - kept[1] == pytest.approx(6 * model.parameters) and usual.step <= small.step


@pytest.mark.parametrize("how", ["none", "selective", "blocks"])
def test_activations_with_adapters_are_those_that_are_planned(how: Any) -> None:
    """Measured on two and on four layers of LLaMA's shape; attention has more than 256 tokens, as on a GPU."""
    found = []
    for layers in (2, 4):
        sizes: dict[str, Any] = {"vocab_size": 64, "context_length": 288, "dim": 64, "hidden_dim": 176, "n_heads": 2}
        model = to_train(llama.build(llama.Config(**sizes, n_layers=layers)).bfloat16(), Lora(rank=4), 0)
        settings = Settings(batch_size=1, micro_batch=1, precision="bfloat16", activation_checkpointing=how)
        trainer = Trainer(model, causal_language_modeling, settings)
        found.append(cost.activations(trainer, {"tokens": torch.randint(64, (1, 289))})[0])
    measured, planned_bytes = (found[1] - found[0]) / 2 / 288 / 64, plan.WITH_ADAPTERS[how]
    assert 0.9 * planned_bytes < measured <= planned_bytes + 1


@pytest.mark.parametrize("name", ["gpt2", "llama-7b", "qwen3-4b", "gemma3-1b", "palm-8b", "llama3.1-70b"])
@pytest.mark.parametrize("kind", ["A100-40G", "H100-80G", "TPU-v5p"])
def test_a_plan_fits_its_devices(name: str, kind: str) -> None:
    made = planned(name, f"64x{kind}")
    layout = made.layout
    assert layout.pods * layout.shard * layout.tensor == 64
    assert sum(made.memory.values()) < DEVICES[kind].memory
    assert 0 < made.utilisation < 1 and made.step > 0


def test_no_plan_has_a_mesh_that_the_trainer_refuses() -> None:
    """Heads, heads of keys and the units of a feed-forward network are split."""
    model = architecture(SIZES["llama3.1-70b"])
    assert [model.can_split(tensor) for tensor in (1, 2, 8, 16, 3)] == [True, True, True, True, False]
    assert not replace(model, kv_heads=12).can_split(8)
    assert not replace(model, hidden=28_670).can_split(4)
    for name in ("qwen2.5-7b", "gemma3-1b", "llama-65b"):
        if name in SIZES:
            made = planned(name, "64xH100-80G")
            assert architecture(SIZES[name]).can_split(made.layout.tensor)


def test_a_mixture_computes_with_its_active_parameters_and_is_not_split() -> None:
    """Mixtral 8x7B uses 12.9 B of 46.7 B parameters for a token (Jiang et al., 2024, section 2.1)."""
    mixture = architecture(SIZES["mixtral-8x7b"])
    assert mixture.active == pytest.approx(12.9e9, rel=0.002) and mixture.parameters == pytest.approx(46.7e9, rel=0.001)
    assert mixture.active and mixture.flops - mixture.attention == 6 * mixture.active
    assert planned("mixtral-8x7b", "64xH100-80G").layout.tensor == 1


def test_more_devices_take_fewer_days_and_no_fewer_hours() -> None:
    few, many = planned("llama-7b", "64xA100-80G"), planned("llama-7b", "512xA100-80G")
    assert many.hours(1e12) / 512 < few.hours(1e12) / 64
    assert many.hours(1e12) >= few.hours(1e12) * 0.99


def test_grouped_heads_leave_room_for_more_sequences() -> None:
    many, few = (plan.inference(architecture(SIZES[name]), *parse_devices("8xA100-80G"), 4096)
                 for name in ("llama2-70b", "llama-65b"))  # fmt: skip
    assert many["cache_bytes"] * 7 < few["cache_bytes"]
    assert many["sequences"] > 7 * few["sequences"] and many["rate"] > few["rate"]


def test_this_machine_is_a_device_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products and its memory are a computer's; elementwise work counts for more than on a GPU."""
    calls, measured = itertools.count(), flops.time_call

    def few(work: Callable[[], object], device: torch.device) -> float:
        """Copy memory three times instead of a hundred times, which takes seconds; products come after that."""
        return math.inf if 3 <= next(calls) < 100 else measured(work, device)

    monkeypatch.setattr(flops, "time_call", few)
    monkeypatch.setattr(flops, "matmul_peak", lambda device, dtype, seconds: flops.measure_peak(device, dtype, 0.1))
    count, kind = parse_devices("1xthis-CPU")
    assert count == 1 and 1e9 < kind.flops < 1e14 and 1e8 < kind.bandwidth < 2e12 and kind.memory > 1e8
    made = plan.plan(architecture(SIZES["gpt2"], 128), 1, kind, 512)
    assert made.layout.pods == made.layout.shard == made.layout.tensor == 1
    again = plan.plan(architecture(SIZES["gpt2"], 128), 1, replace(kind, bandwidth=kind.bandwidth / 2), 512)
    for part, factor in (("products", 1), ("elementwise", 2), ("update", 2)):
        assert again.seconds[part] == pytest.approx(factor * made.seconds[part]) and made.seconds[part] > 0
    assert made.memory["optimizer"] == 12 * SIZES["gpt2"].parameters


def test_logits_are_made_in_parts() -> None:
    """Rows that are computed together take activations each, and logits up to 134 MB."""
    model = architecture(SIZES["gpt2"])
    layouts = (plan.PodLayout(1, 1, 1, rows, "none") for rows in (1, 64, 128))
    few, many, more = (plan._memory(model, layout)["activations"] for layout in layouts)
    each = 34 * model.context * model.dim * model.layers
    assert few == each + 2 * model.context * model.vocab
    assert more - many == 64 * each and many == 64 * each + 2 * 2**26


@pytest.mark.parametrize(
    ("name", "billions"), [("dit-s-2", 6.06), ("dit-b-2", 23.01), ("dit-l-2", 80.71), ("dit-xl-2", 118.64)]
)
def test_a_diffusion_transformer_computes_what_was_published(name: str, billions: float) -> None:
    """Multiplications of a picture (Peebles and Xie, 2022, table 4); its tokens are patches."""
    model = architecture(SIZES[name])
    assert model.flops * model.context / 6 == pytest.approx(billions * 1e9, rel=0.002)
    made = planned(name, "8xA100-80G", 65_536)
    assert made.tokens == 65_536 and made.layout.tensor == 1 and made.memory["weights"] < 2 * model.parameters


def small_dit(monkeypatch: pytest.MonkeyPatch, layers: int) -> tuple[plan.Architecture, Trainer]:
    """Return a plan of a small diffusion Transformer of 256 patches, and its training."""
    transformer = dit.TransformerConfig(32, 2, 4, 8, 4, 32, layers, 10)
    config = dit.Config(transformer, autoencoder=None, noise=Noise(variance="learned_range", clip=None))
    monkeypatch.setitem(dit.SIZES, "dit-xl-2", config)
    model = dit.build(config).bfloat16()
    return architecture(SIZES["dit-xl-2"]), Trainer(model, DiffusionLoss(config.noise), Settings(precision="bfloat16"))


PICTURES = {"pictures": torch.zeros(2, 4, 32, 32).bfloat16(), "draws": torch.arange(2), "labels": torch.arange(2)}


def test_operations_of_a_diffusion_transformer_are_those_that_torch_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of the pictures themselves, which are not computed, are in the plan."""
    model, trainer = small_dit(monkeypatch, 4)
    assert model.parameters == sum(parameter.numel() for parameter in trainer.model.parameters())
    counted = count_flops(lambda: cost.backward(trainer, PICTURES))
    assert 2 * 256 * model.flops == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("how", ["none", "selective", "blocks"])
def test_activations_of_a_diffusion_transformer_are_planned(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for layers in (2, 4):
        model, trainer = small_dit(monkeypatch, layers)
        trainer = Trainer(
            trainer.model, trainer.objective, Settings(precision="bfloat16", activation_checkpointing=how)
        )
        found.append(cost.activations(trainer, PICTURES)[0])
    measured = (found[1] - found[0]) / 2 / (2 * 256) / 128
    assert measured == pytest.approx(model.activations[how], rel=0.03)


@pytest.mark.parametrize(("text", "amount"), [("300B", 3e11), ("1.4T", 1.4e12), ("5000", 5e3), ("2k", 2e3)])
def test_amounts_have_letters(text: str, amount: float) -> None:
    assert parse_amount(text, "--tokens") == amount


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["llama-65b", "--devices", "2xA100-80G"], "does not fit: it takes at least .* GB on each device"),
        (["llama-7b", "--devices", "2048xA100-80"], "no device 'A100-80'. Did you mean 'A100-80G'"),
        (["llama-7b", "--devices", "8xh100"], "no device 'h100'. Did you mean 'H100-80G'"),
        (["llama-7b", "--devices", "lots"], "is a number up to 999,999, x and a kind"),
        (["llama-7b", "--tokens", "many"], "--tokens is a number such as 300B"),
        (["llama-7b", "--batch", "many"], "--batch is a number such as 300B"),
        (["gpt2", "--devices", "2xthis-CPU"], "no device 'this-CPU'. Did you mean '1xthis-CPU'"),
        (["lama-7b"], "Did you mean .*'llama-7b'"),
        (["stable-diffusion-1"], "is no Transformer of tokens alone: plans are of such models and of DiT"),
        (["dit-xl-2", "--inference"], "draws pictures: a plan is of its whole training"),
        (["llada-8b", "--inference"], "writes by passes over the whole text, without a cache"),
        (["dit-xl-2", "--lora.rank", "16"], "draws pictures: a plan is of its whole training"),
        (["dit-xl-2", "--context-length", "64"], "follow from its size: leave out --context-length"),
        (["llama3.1-405b", "--inference", "--devices", "8xA100-80G"], "do not fit into"),
        (["llama-7b", "--inference", "--lora.rank", "16"], "--inference trains nothing: leave out --tokens"),
        (["llama-7b", "--inference", "--tokens", "3B"], "--inference trains nothing: leave out --tokens"),
        (["llama-7b", "--inference", "--batch", "4M"], "--inference trains nothing: leave out --tokens"),
        (["whisper-tiny.en", "--inference"], "whisper-tiny.en transcribes recordings"),
    ],
)
def test_what_cannot_be_planned_is_said(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse_command(plan_command, words, "keifu plan")()


def test_the_command_prints_the_mesh_that_train_takes(capsys: pytest.CaptureFixture[str]) -> None:
    parse_command(plan_command, ["llama-65b", "--devices", "2048xA100-80G", "--tokens", "1.4T"], "keifu plan")()
    text = capsys.readouterr().out
    assert "--mesh.pods 1 --mesh.shard 256 --mesh.tensor 8 --mesh.sync-each" in text
    made = plan.plan(architecture(SIZES["llama-65b"]), 2048, parse_devices("1xA100-80G")[1], 4e6)
    hours = 1.4e12 / made.rate / 3600  # of one device; made.rate is of one device too
    assert f"1.4e+12 tokens: {hours / 24 / 2048:,.1f} days, {hours:,.0f} device hours" in text
    assert f", {hours * 400 * plan.POWER / 1e6:,.3g} MWh" in text  # an A100 takes 400 W
    assert f"{1.4e12 * architecture(SIZES['llama-65b']).flops / (1e15 * 86_400):,.4g} PF-days" in text
    assert 15 < hours / 24 / 2048 < 35  # 21 days were published
    parse_command(plan_command, ["dit-xl-2"], "keifu plan")()
    text = capsys.readouterr().out
    assert "65,536 patches in" in text and "2.62e+10 patches: " in text


def test_memory_is_printed_in_gigabytes_of_a_thousand_million_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, of Llama 65B: 65.3 thousand million weights, 80 layers, and 8192 numbers of all keys of a token."""
    size = SIZES["llama-65b"].parameters
    parse_command(plan_command, ["llama-65b", "--devices", "64xA100-80G"], "keifu plan")()
    [line] = [line for line in capsys.readouterr().out.splitlines() if "a device's memory" in line]
    parts = {name: float(figure) for name, figure in re.findall(r"([a-z][a-z ]*) ([\d.]+)[,)]", line)}
    assert parts["weights"] == round(2 * size / 64 / 1e9, 1) and parts["optimizer"] == round(12 * size / 64 / 1e9, 1)
    total, memory = re.findall(r"([\d.]+) GB of (\d+)", line)[0]
    assert memory == "80" and float(total) == pytest.approx(sum(parts.values()), abs=0.3)
    parse_command(plan_command, ["llama-65b", "--devices", "8xA100-80G", "--inference"], "keifu plan")()
    assert "5.37 GB" in capsys.readouterr().out  # 2 (keys, values) · 2 bytes · 80 · 8192 · 2048 positions


def test_the_mesh_of_several_pods_sums_gradients_as_the_plan_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    parse_command(plan_command, ["llama-7b", "--devices", "64xA100-80G"], "keifu plan")()
    text = capsys.readouterr().out
    assert "--mesh.pods 8 --mesh.shard 8 --mesh.tensor 1 --mesh.sync-each --mesh.gradient-sum overlapped" in text


def test_adapters_save_the_gradients_of_the_frozen_matrices() -> None:
    """6 FLOPs per parameter and token are 2 forward, 2 for the inputs' gradients and 2 for the weights'."""
    model = architecture(SIZES["llama-7b"], 4096)
    attention = model.flops - 6 * model.parameters
    assert Trained(16).flops(model) == 4 * model.parameters + attention and attention > 0.01 * model.flops
    assert Trained().flops(model) == 6 * model.parameters + attention
    mixture = replace(model, active=model.parameters // 3)
    assert Trained(16).flops(mixture) == 4 * mixture.active + attention
