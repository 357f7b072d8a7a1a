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
from keifu.layers.losses import cross_entropy as ce
from keifu.layers.losses.head import SoftCappedHead
from keifu.layers.losses.cross_entropy import linear_cross_entropy
from keifu.layers.attention.masks import CausalMask
from keifu.layers.attention.positions import Positions, Rotary
from keifu.layers.losses.cross_entropy import _loss_and_gradient
from keifu.layers.quantized import FORMATS, unpack
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


for kind, number in kernels.KINDS.items():
    size = FORMATS[kind].numbers
    for rows, columns, tokens in ((7, 3 * size, 1), (33, 1280, 3)):
        blocks = torch.randint(256, (rows * columns // size, FORMATS[kind].bytes), dtype=torch.uint8) & 0x3F
        blocks[:, 2:] |= torch.randint(256, blocks[:, 2:].shape, dtype=torch.uint8) & (0xC0 if size == 32 else 0)
        if kind == "Q4_K":
            blocks[:, 4:] |= torch.randint(256, blocks[:, 4:].shape, dtype=torch.uint8) & 0xC0
        if kind == "Q6_K":
            blocks[:, :208] |= torch.randint(256, blocks[:, :208].shape, dtype=torch.uint8) & 0xC0
        for dtype in (torch.float32, torch.bfloat16):
            error = 2**-7 if dtype == torch.bfloat16 else 0  # to which the interpreter does not round, it cuts off
            found, expected = kernels.unpack(blocks, number, dtype), unpack(blocks, kind, dtype)
            torch.testing.assert_close(found, expected, rtol=error, atol=0)
        x = torch.randn(tokens, columns)
        found, expected = kernels.product(x, blocks, number), x @ unpack(blocks, kind).view(rows, columns).T
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))

for rows, vocab in ((5, 37), (3, 9001)):
    targets = torch.randint(vocab, (rows,))
    targets[1] = -100
    for smoothing, z_loss, counts, scale in (
        (0.0, 0.0, targets != -100, 1.0), (0.1, 1e-3, torch.rand(rows) * (targets != -100), 80.0),
    ):
        logits = torch.randn(rows, vocab) * scale
        loss, nats, gradient = _loss_and_gradient(logits, targets, smoothing, z_loss, None)
        given = logits.clone()
        found = kernels.cross_entropy_(given, targets, counts, smoothing, z_loss)
        torch.testing.assert_close(given, gradient * counts[:, None], rtol=1e-4, atol=1e-6)
        for one, other in zip(found, (loss, nats), strict=True):
            torch.testing.assert_close(one, other[:, 0] * counts, rtol=1e-5, atol=1e-5)

hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(41, 8, requires_grad=True)
ignored, rows = torch.tensor([3, -100, 40, 0, -100, 7]), torch.randint(41, (6, 2))
for cap, targets in ((None, ignored), (5.0, ignored), (None, rows[:, 1:])):  # the last: of rows of one token
    head = weight if cap is None else SoftCappedHead(weight, cap)
    results = []
    for used in (None, kernels):
        ce.triton_kernels = lambda device, used=used: used
        total, nats = linear_cross_entropy(hidden, head, None, targets, label_smoothing=0.1)
        results.append([total, nats, *torch.autograd.grad(total, (hidden, weight))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
found, _ = kernels.cross_entropy_(torch.randn(2, 9), torch.tensor([9, 8]), torch.ones(2), 0.0, 0.0)
assert found.isnan().tolist() == [True, False]  # a target that is no class stops the run


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
blocks = {"blocks": "*u8", "result": pointer}
unpacked = {**blocks, "count": number, "kind": "constexpr", "width": "constexpr"}
product = {"x": pointer, **blocks, "rows": number, "length": number, "kind": "constexpr", "height": "constexpr",
           "width": "constexpr"}
made = [("_turn", turned, {"head_dim": 64, "width": 32}), ("_gate", gated, {"width": 1024})]
loss = {"logits": pointer, "targets": "*i64", "counts": "*i1", "loss": "*fp32", "nats": "*fp32", "vocab": number,
        "smoothing": "fp32", "z_loss": "fp32", "width": "constexpr"}
made.append(("_cross_entropy", loss, {"width": kernels.CLASSES}))
for kind in kernels.KINDS.values():
    made.append(("_unpack", unpacked, {"kind": kind, "width": kernels.COUNT}))
    made.append(("_product", product, {"kind": kind, "height": kernels.ROWS, "width": kernels.COLUMNS}))
for name, signature, constants in made:
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
