"""Triton's kernels of decoding, run by its interpreter on a CPU and compiled for two kinds of NVIDIA GPUs."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="could not import 'triton'")

NUMBERS = """
import torch
from keifu.layers.attention.attention import attend
from keifu.layers.attention.masks import CausalMask
from keifu.layers.attention.positions import Positions, Rotary
from keifu.layers.transformer import triton_kernels as kernels
from keifu.layers.transformer.decoding import DecodingBlock
from keifu.models import llama

torch.manual_seed(0)
for interleaved in (False, True):
    for width, head_dim in ((12, 12), (8, 14)):
        rotation = Rotary(width, interleaved=interleaved)(torch.arange(5)[None])
        heads = torch.randn(5, 7, head_dim)
        expected = torch.cat([rotation.apply(heads[None, :, :4])[0], heads[:, 4:]], 1)
        kernels.turn(heads, 4, rotation.cos[0], rotation.sin[0], interleaved)
        torch.testing.assert_close(heads, expected, rtol=1e-6, atol=1e-6)
both = torch.randn(3, 2600)
torch.testing.assert_close(kernels.gate(both), torch.nn.functional.silu(both[:, :1300]) * both[:, 1300:])


class Whole:
    "A cache that begins empty."

    def attend_joined(self, heads, n_heads, window, scoring):
        q, k, v = heads.transpose(1, 2).split([n_heads, 1, 1], 1)
        return attend(q, k, v, "causal", scoring)


model = llama.build(llama.Config(41, 16, dim=24, hidden_dim=40, n_layers=1, n_heads=3, n_kv_heads=1)).eval()
x, places = torch.randn(1, 9, 24), Positions(torch.arange(9)[None])
with torch.no_grad():
    expected = model.blocks[0](x, mask=CausalMask(0, 9, None, x.device), positions=places)
    for used in (None, kernels):
        found = DecodingBlock(model.blocks[0], used)(x.clone(), None, places, Whole())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
print("equal")
"""

COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from keifu.layers.transformer import triton_kernels as kernels

pointer, number = "*bf16", "i32"
turned = {"heads": pointer, "cos": "*fp32", "sin": "*fp32", "row": number, "pairs": number, "step": number,
          "apart": number, "head_dim": "constexpr", "width": "constexpr"}
gated = {"gate_up": pointer, "result": pointer, "hidden": number, "width": "constexpr"}
for name, signature, constants in (("_turn", turned, {"head_dim": 64, "width": 32}), ("_gate", gated, {"width": 1024})):
    for capability in (80, 90):
        source = ASTSource(vars(kernels)[name], signature, constants)
        made = compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(made.asm["cubin"]) > 1000
print("equal")
"""


@pytest.mark.parametrize(("program", "interpreted"), [(NUMBERS, "1"), (COMPILED, "0")], ids=["numbers", "compiled"])
def test_kernels_compute_what_pytorch_computes_and_compile(program: str, interpreted: str) -> None:
    """Triton decides when it is imported whether it interprets, so each has a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": interpreted, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "equal\n", done.stderr
