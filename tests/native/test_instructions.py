"""All instruction sets with fused multiplication give the same bits (AMX with quantised weights); the portable one all
but the last of them."""

import pytest
import torch
from native_toys import toy

from keifu.native.library import INSTRUCTIONS
from keifu.native.model import pack

pytestmark = pytest.mark.usefixtures("opened")


@pytest.mark.parametrize("weights", ["f32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "palm", "mixtral", "gpt-oss"])
def test_the_same_logits_with_every_instruction_set(kind: str, weights: str) -> None:
    packed = pack(toy(kind), weights)
    rows = torch.randint(0, 101, (1, 50), generator=torch.Generator().manual_seed(2))
    best = packed.library.call("instructions")
    had = [name for number, name in enumerate(INSTRUCTIONS) if packed.library.call("has_instructions", number)]
    logits = {}
    try:
        for name in had:
            packed.library.call("use_instructions", INSTRUCTIONS.index(name))
            logits[name] = packed(rows)
    finally:
        packed.library.call("use_instructions", best)
    fused = [logits[name] for name in had if name != "portable" and (name, weights) != ("amx", "bf16")]
    assert all(torch.equal(other, fused[0]) for other in fused)
    assert all((other - fused[0]).norm() < 0.05 * fused[0].norm() for other in logits.values())
