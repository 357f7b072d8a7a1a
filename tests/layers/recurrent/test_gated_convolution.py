"""The gated short convolution of LFM2: documents, padding and states do not mix."""

import pytest
import torch

from keifu.layers.attention.masks import CausalMask, DocumentMask
from keifu.layers.recurrent.gated_convolution import GatedConvolution


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1, 3, 5])
@torch.no_grad()
def test_documents_and_padding_reach_no_other_token(size: int, bias: bool) -> None:
    torch.manual_seed(3)
    mixer, x = GatedConvolution(6, size, bias), torch.randn(2, 9, 6)
    if mixer.convolution.bias is not None:
        torch.nn.init.normal_(mixer.convolution.bias)
    alone = torch.cat([mixer(part) for part in x.split([3, 4, 2], 1)], 1)
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]).expand(2, -1)
    torch.testing.assert_close(mixer(x, DocumentMask(documents)), alone)
    assert size == 1 or not torch.allclose(mixer(x), alone)
    padded = mixer(x, CausalMask(0, 9, torch.tensor([4, 0])))
    torch.testing.assert_close(padded[0, 4:], mixer(x[:1, 4:])[0])
