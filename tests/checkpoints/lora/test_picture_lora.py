"""LoRAs for the U-Net and the text's encoder: every published spelling, both ways, against diffusers' numbers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from keifu import checkpoints, cli
from keifu.checkpoints.lora.diffusion import WRITTEN, apply_lora, attach_lora, save_lora
from keifu.checkpoints.lora.peft import layers
from keifu.errors import UserError
from keifu.layers.lora import LoraSettings, adapters, attach

diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
UNET = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2")
TEXT = ("q_proj", "v_proj", "out_proj", "fc1")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def adapted(folder: Path, low: Callable[[str], LoraSettings], wanted: Callable[[str], bool]) -> Any:
    """Return keifu's model with adapters that change something."""
    model = checkpoints.load_model(folder)
    torch.manual_seed(7)
    known = layers(model)
    attach(model, {target: low(label) for label, target in known.items() if wanted(label)})
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.b.normal_(std=0.3)
            if adapter.length is not None:
                adapter.length.mul_(1.1)
    return model.eval()


def usual(label: str) -> bool:
    part, _, rest = label.partition(".")
    return rest.endswith(UNET) if part == "unet" else part == "text_encoder" and rest.endswith(TEXT)


@torch.no_grad()
def seen(model: Any) -> tuple[Tensor, Tensor]:
    """Return the outputs of keifu's encoder and U-Net for fixed inputs."""
    ids, latents = inputs()
    context = model.encode_text(ids)
    return context, model(latents, torch.tensor([30]), model.project(context))


@torch.no_grad()
def seen_by_diffusers(pipeline: Any) -> tuple[Tensor, Tensor]:
    ids, latents = inputs()
    context = pipeline.text_encoder(ids).last_hidden_state
    return context, pipeline.unet(latents, torch.tensor([30]), context).sample


def inputs() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(2)
    return torch.randint(0, 500, (1, 77), generator=random), torch.randn(1, 4, 8, 6, generator=random)


def fresh(pipeline: Any) -> Any:
    """Return the pipeline with copies of its models, into which nothing was loaded."""
    parts = {name: copy.deepcopy(part) for name, part in pipeline.components.items()}
    return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)


def close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("style", [*WRITTEN, "processors"])
def test_each_spelling_is_read_by_diffusers_and_back(pipeline, tmp_path, style: str) -> None:
    wanted = usual if style != "processors" else lambda n: n.startswith("unet.") and n.endswith(UNET[:4])
    every = style == "kohya"  # diffusers mistakes alphas that differ within such a file
    model = adapted(
        pipeline[1], lambda label: LoraSettings(rank=3, alpha=6.0 if every or "to_q" in label else 3.0), wanted
    )
    file = tmp_path / "lora.safetensors"
    save_lora(model, file, "diffusers" if style == "processors" else style)
    if style == "processors":  # as old training scripts wrote them
        changes = ((".to_", ".processor.to_"), ("to_out.0.", "to_out."), (".lora.", "_lora."))
        old = load_file(file)
        for now, then in changes:
            old = {name.replace(now, then): tensor for name, tensor in old.items()}
        assert all(".processor.to_" in name and "_lora." in name for name in old)
        save_file(old, file)
    expected, plain = seen(model), seen(checkpoints.load_model(pipeline[1]))
    assert (expected[1] - plain[1]).abs().max() > 0.01
    theirs = fresh(pipeline[0])
    theirs.load_lora_weights(str(tmp_path), weight_name=file.name)
    close(expected, seen_by_diffusers(theirs))
    read = attach_lora(checkpoints.load_model(pipeline[1]), file)
    before, after = ({a.target.label: a for a in adapters(each)} for each in (model, read))
    assert before.keys() == after.keys()
    for label, adapter in before.items():
        assert torch.equal(adapter.a, after[label].a)
        assert torch.equal(adapter.change(), after[label].change())
    close(seen(read), expected)
    close(seen(apply_lora(checkpoints.load_model(pipeline[1]), file)), expected)


def test_a_file_of_diffusers_and_how_strongly_it_acts(pipeline, tmp_path) -> None:
    theirs = fresh(pipeline[0])
    wanted = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["to_q", "to_out.0", "proj_out"], init_lora_weights=False
    )
    theirs.unet.add_adapter(wanted)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(theirs.unet))
    file = next(tmp_path.glob("*.safetensors"))
    close(seen(apply_lora(checkpoints.load_model(pipeline[1]), file)), seen_by_diffusers(theirs))
    half = fresh(pipeline[0])
    half.load_lora_weights(str(tmp_path), adapter_name="one")
    half.set_adapters(["one"], [0.5])
    close(seen(apply_lora(checkpoints.load_model(pipeline[1]), file, 0.5)), seen_by_diffusers(half))


@pytest.mark.parametrize("style", ["peft", "kohya"])
def test_every_layer_with_dora_there_and_back(pipeline, tmp_path, style: str) -> None:
    """Convolutions of 3 x 3, those that change the resolution, and lengths, by the merged weights."""
    model = adapted(
        pipeline[1], lambda label: LoraSettings(2, 2.0, dora=True), lambda label: not label.startswith("vae.")
    )
    save_lora(model, tmp_path / "a.safetensors", style)
    read = attach_lora(checkpoints.load_model(pipeline[1]), tmp_path / "a.safetensors")
    close(seen(read), seen(model))
    close(seen(apply_lora(checkpoints.load_model(pipeline[1]), tmp_path / "a.safetensors")), seen(model))
    save_lora(read, tmp_path / "b.safetensors", style)
    first, second = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_what_does_not_fit_is_named(pipeline, tmp_path) -> None:
    model = adapted(pipeline[1], lambda label: LoraSettings(3, 3.0), usual)
    save_lora(model, tmp_path / "lora.safetensors", "kohya")
    good = load_file(tmp_path / "lora.safetensors")
    down = next(name for name in good if "to_q.lora_down" in name)
    strange = "lora_unet_nowhere.lora_down.weight"
    cases: dict[str, dict[str, Tensor]] = {
        f"{strange} belongs to no layer": {**good, strange: good[down].clone()},
        "x.hada_w1_a is of a LoHa, which keifu does not implement": {"x.hada_w1_a": good[down]},
        f"{down} has the shape (3, 5) where (3, 12) is needed": {**good, down: torch.zeros(3, 5)},
        "attn1.to_q.lora_A.weight is missing": {name: tensor for name, tensor in good.items() if name != down},
        "they are empty": {},
    }
    for said, tensors in cases.items():
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=r"do not fit this LatentDiffusion") as error:
            apply_lora(checkpoints.load_model(pipeline[1]), tmp_path / "bad.safetensors")
        assert said in str(error.value), said
    whole = adapted(pipeline[1], lambda label: LoraSettings(2, 2.0), lambda label: label.startswith("vae."))
    with pytest.raises(UserError, match=r"the text's encoder, not of vae\."):
        save_lora(whole, tmp_path / "x.safetensors", "kohya")
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        apply_lora(model, tmp_path / "lora.pt")
    with pytest.raises(UserError, match="Did you mean 'kohya'"):
        save_lora(model, tmp_path / "x.safetensors", "kohia")


def test_the_command_draws_with_loras_and_again(pipeline, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    save_lora(adapted(pipeline[1], lambda label: LoraSettings(3, 3.0), usual), "one.safetensors")
    words = ["draw", str(pipeline[1]), "a cat", "--steps", "2", "--seed", "1", "--guidance", "2", "--size", "16"]
    for name, more in {"a": (), "b": ("--lora", "one.safetensors"), "c": ("--lora", "one.safetensors:0.25")}.items():
        cli.main([*words, *more, "-o", f"{name}.png"])
    pictures = [np.asarray(Image.open(f"{name}.png")) for name in "abc"]
    assert len({picture.tobytes() for picture in pictures}) == 3
    cli.main(["draw", "--again", "c.png"])
    Path("one.safetensors").rename("moved.safetensors")
    with pytest.raises(SystemExit):
        cli.main(["draw", "--again", "c.png"])
    assert "one.safetensors is not there, or is another one now: name its place (--lora)" in capsys.readouterr().err
    cli.main(["draw", "--again", "c.png", "--lora", "moved.safetensors"])
    for more, said in (
        (["--lora", "none.safetensors:2"], "There is no LoRA none.safetensors"),
        (["--again", "a.png", "--lora", "moved.safetensors"], "was drawn without the LoRA"),
    ):
        with pytest.raises(SystemExit):
            cli.main([*(words if "--again" not in more else ["draw"]), *more])
        assert said in capsys.readouterr().err
