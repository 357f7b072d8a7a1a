"""Check on a machine without a GPU, with torch's CUDA wheel: a forward pass on fake CUDA tensors reads nothing back.

Operators are dispatched as on CUDA, no kernel runs. A read of a value (`.item()`) is an error of the fake tensors.
"""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from keifu.models import gpt2, llama


def check(name: str, model: torch.nn.Module, vocab_size: int) -> None:
    """Compute logits of fake tokens and print their shape."""
    tokens = torch.zeros(2, 16, dtype=torch.long, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        logits = model(tokens)
    assert logits.device.type == "cuda" and logits.shape == (2, 16, vocab_size)
    print(f"{name}: logits {tuple(logits.shape)} of {logits.dtype}, no value read")


def main() -> None:
    """Check two models."""
    sizes = {"vocab_size": 64, "context_length": 32, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
    for name, package in (("GPT-2", gpt2), ("LLaMA", llama)):
        with FakeTensorMode():
            check(name, package.build(package.Config(**sizes)).to("cuda").eval(), 64)


if __name__ == "__main__":
    main()
