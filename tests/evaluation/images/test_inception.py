"""Inception's features against torchvision's network, with the two differences of TensorFlow's graph put into it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from keifu.errors import UserError
from keifu.evaluation.images import features as module
from keifu.evaluation.images.features import extractor, inception


def test_without_weights_there_is_none_and_a_wrong_file_is_a_sentence(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEIFU_CACHE", str(tmp_path))
    assert extractor().name.startswith("random convolutions")
    save_file({"a": torch.zeros(1)}, module.place())
    with pytest.raises(UserError, match="inception-2015.safetensors does not hold Inception's weights"):
        inception()
    module.place().write_bytes(b"no weights")
    with pytest.raises(UserError, match="does not hold Inception's weights"):
        inception()


def test_the_same_features_as_torchvision(monkeypatch) -> None:
    theirs = pytest.importorskip("torchvision.models.inception")
    monkeypatch.setattr(module, "SIDE", 107)  # smaller than in use, to be done sooner
    network = theirs.Inception3(aux_logits=False, init_weights=False).eval()
    generator = torch.Generator().manual_seed(0)
    for name, buffer in network.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) * 0.1 + (0.5 if name.endswith("var") else 0))
    last = False

    def pooled(x, kernel_size, stride, padding):
        options = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
        return F.max_pool2d(x, **options) if last else F.avg_pool2d(x, **options, count_include_pad=False)

    def enter(block, inputs) -> None:
        nonlocal last
        last = block is network.Mixed_7c

    for block in (network.Mixed_5b, network.Mixed_6a, network.Mixed_7b, network.Mixed_7c):
        block.register_forward_pre_hook(enter)
    pools = SimpleNamespace(relu=F.relu, max_pool2d=F.max_pool2d, avg_pool2d=pooled)
    monkeypatch.setattr(theirs, "F", pools)
    network.fc, network.dropout = torch.nn.Identity(), torch.nn.Identity()
    x = 2 * torch.rand(1, 3, 40, 52, generator=generator) - 1
    ours = module.Inception(network.state_dict())
    with torch.inference_mode():
        expected = network(F.interpolate(x, (107, 107), mode="bilinear", align_corners=False))
        found = ours(x)
    assert found.shape == (1, 2048)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
