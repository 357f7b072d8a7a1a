"""A plan's seconds and bytes worked out by hand, for a model and devices of round numbers.

10⁹ weights, 10 layers of width 1000 with half as many keys, 2000 tokens, a context of 100. A device makes half of
10¹⁵ FLOP/s, moves 10¹² bytes/s of its memory, 0.7 · 10¹¹ to three others and 0.7 · 10¹⁰ beyond them.
"""

from dataclasses import replace

import pytest

from keifu.errors import UserError
from keifu.training.hardware import plan
from keifu.training.hardware.plan import Architecture, DeviceKind, PodLayout, Trained

MODEL = Architecture(10**9, 10, 1000, 1000, 500, 10, 2000, 100, kv_heads=5, hidden=4000)
KIND = DeviceKind(
    1e15, 80e9, 1e12, 1e11, 1e10, 500, machine=4, products=0.5, attention=2, elementwise=100, logits=10, update=20
)  # fmt: skip


def near(**figures: float) -> object:
    """Return figures that are compared to seven digits; the names have spaces."""
    return pytest.approx({name.replace("_", " "): figure for name, figure in figures.items()}, rel=1e-7)


def test_one_device() -> None:
    """Eight rows in micro-batches of two. A token takes 6 · 10⁹ FLOPs and 12 · 10 · 1000 · 100 of attention, which
    count three times in time."""
    made = plan._planned(MODEL, PodLayout(1, 1, 1, 2, "none"), 1, KIND, 800)
    assert made.flops == 6_012_000_000 and made.tokens == 800
    seconds = {"products": 800 * 6.036e9 / 5e14, "elementwise": 800 * (1e6 + 2e4) / 1e12, "update": 0.02}
    assert made.seconds == near(**seconds, tensor_exchanges=0, other_exchanges=0)
    activations = 200 * (34 * 10_000 + 2 * 2000)
    assert made.memory == near(weights=2e9, gradients=2e9, optimizer=12e9, activations=activations, gathered_layers=0)
    step = 0.0096576 + 0.000816 + 0.02
    assert made.step == pytest.approx(step) and made.rate == pytest.approx(800 / step)
    assert made.utilisation == pytest.approx(800 / step * 6.012e9 / 1e15)
    assert made.hours(1e9) == pytest.approx(1e9 / 800 * step / 3600)


def test_two_machines_that_share_shards_and_matrices_and_compute_blocks_again() -> None:
    """Each pod of four devices has four rows in two passes. A device reads the other half of its 10⁹ bytes of weights
    three times a pass, and sends half of its gradients twice, of which half is hidden."""
    made = plan._planned(MODEL, PodLayout(2, 2, 2, 1, "blocks"), 8, KIND, 800)
    products, elementwise = 100 * (4 / 3 * 6.012e9 + 4 / 3 * 24e6) / 5e14, 4 / 3 * 100 * 1.02e6 / 1e12
    gathers = 3 * 2 * 0.5e9 / 0.7e11 - 0.8 * (products + elementwise)
    pods = 0.5 * 2 * 2 * 1e9 / 2 * 0.5 / 0.7e10
    exchanges = 8 * 4 / 3 * 100 * 10_000 * 2 / 0.7e11
    assert made.seconds == near(
        products=products, elementwise=elementwise, update=0.005, tensor_exchanges=exchanges,
        other_exchanges=gathers + pods,
    )  # fmt: skip
    activations = 50 * (2 * 10_000 + 34 * 1000 + 2 * 2000)
    assert made.memory == near(
        weights=0.5e9, gradients=0.5e9, optimizer=3e9, activations=activations, gathered_layers=0.2e9
    )
    assert made.tokens == 800 and made.rate == pytest.approx(100 / made.step)


def test_shards_beyond_a_machine_come_over_the_network() -> None:
    """Eight shards, four rows each in two passes; and four shards of half of each matrix, in one pass."""
    hidden = 100 * 6.036e9 / 5e14 + 100 * 1.02e6 / 1e12  # of a row
    eight = plan._planned(MODEL, PodLayout(1, 8, 1, 2, "none"), 8, KIND, 3200).seconds["other exchanges"]
    assert eight == pytest.approx(2 * 3 * 2e9 * 7 / 8 / 0.7e10 - 0.8 * 4 * hidden)
    four = plan._planned(MODEL, PodLayout(1, 4, 2, 2, "none"), 8, KIND, 800).seconds["other exchanges"]
    assert four == pytest.approx(3 * 1e9 * 3 / 4 / 0.7e10 - 0.8 * hidden)


def test_adapters_of_four_bits() -> None:
    """Rank 16 of q, k, v and out (3 · 1000 + 1000 + 2 · 500 and 1000 + 1000) and of three of 1000 + 4000; 4 · 10⁶
    numbers of embeddings stay in 16 bits."""
    trained = Trained(16, "int4", "int8")
    assert trained.parameters(MODEL) == 16 * 10 * (7000 + 15_000)
    memory = plan._memory(MODEL, PodLayout(1, 1, 1, 2, "selective"), trained)
    activations = 200 * (48 * 10_000 + 57 * 1000 + 2 * 2000)
    assert memory == near(
        weights=8e6 + 4.5 / 8 * 996e6, gradients=4 * 3.52e6, optimizer=6 * 3.52e6, activations=activations,
        gathered_layers=0,
    )  # fmt: skip
    made = plan._planned(MODEL, PodLayout(1, 1, 1, 2, "none"), 1, KIND, 800, trained)
    assert made.memory["weights"] == memory["weights"]
    seconds = made.seconds
    assert seconds["products"] == pytest.approx(800 * (4e9 + 3 * 12e6) / 5e14)
    assert seconds["update"] == pytest.approx(3.52e6 * 20 / 1e12)


@pytest.mark.parametrize(
    ("devices", "sequences", "step", "alone"),
    [(1, 35_800, 2e9 * 35_800 / 5e14, 0.0025),
     (2, 72_600, 2e9 * 72_600 / 1e15 + 2 * 2 * 10 * 72_600 * 1000 * 2 / 0.7e11, 0.00125 + 0.0004)],
)  # fmt: skip
def test_writing(devices: int, sequences: int, step: float, alone: float) -> None:
    """A cache of 100 positions takes 2 · 2 · 10 · 500 · 100 bytes; 0.92 of the memory is used. Alone, the weights are
    read at 0.8 of the bandwidth, and each exchange of two devices takes 10 μs."""
    found = plan.inference(MODEL, devices, KIND, 100)
    assert found["cache_bytes"] == 2e6 and found["sequences"] == sequences
    assert found["rate"] == pytest.approx(sequences / step / devices) and found["alone"] == pytest.approx(1 / alone)


def test_writing_is_as_slow_as_reading_where_that_takes_longer() -> None:
    """With few sequences of long texts: caches are half full, and weights are read with them."""
    found = plan.inference(MODEL, 1, KIND, 1_000_000)
    assert found["sequences"] == 3 and found["cache_bytes"] == 2e10
    assert found["rate"] == pytest.approx(3 / ((2e9 + 3 * 1e10) / 0.8e12))


def test_one_sequence_is_enough_and_less_is_refused() -> None:
    """A cache of 10⁶ positions takes 20 GB, and 0.92 of 24 GB without the weights are 20.08."""
    assert plan.inference(MODEL, 1, replace(KIND, memory=24e9), 1_000_000)["sequences"] == 1
    with pytest.raises(UserError) as caught:
        plan.inference(MODEL, 1, replace(KIND, memory=23.9e9), 1_000_000)
    needed = "2 GB of weights and a cache of 20.00 GB do not fit into 1 x 24 GB"
    assert str(caught.value) == f"{needed}; take more devices."
