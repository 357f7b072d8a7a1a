"""All instruction sets with fused multiplication give the same bits (AMX with quantised weights); the portable one all
but the last of them."""

import pytest
import torch
from native_toys import toy

from keifu.native.model import pack

pytestmark = pytest.mark.usefixtures("opened")


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "palm"])
def test_the_same_logits_with_every_instruction_set(kind: str, weights: str) -> None:
    packed = pack(toy(kind), weights)
    rows = torch.randint(0, 101, (1, 50), generator=torch.Generator().manual_seed(2))
    best = packed.library.call("instructions")
    logits = []
    try:
        for number in range(best + 1):
            packed.library.call("use_instructions", number)
            logits.append(packed(rows))
    finally:
        packed.library.call("use_instructions", best)
    fused = logits[1:4] if weights == "bf16" else logits[1:]
    assert all(torch.equal(other, fused[0]) for other in fused)
    assert all((other - logits[-1]).norm() < 0.05 * logits[-1].norm() for other in logits)
