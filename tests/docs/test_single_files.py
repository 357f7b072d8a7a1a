"""The single-file editions: short, alone with torch, and with the library's numbers."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from keifu.alignment import ppo
from keifu.commands.reference import eject
from keifu.errors import UserError
from keifu.models import bert, gpt2, llama, mlp, seq2seq, transformer
from keifu.models.clip import clip, image, text
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, ddpm

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/single"
sys.path.insert(0, str(ROOT / "docs/_site"))

import singles  # noqa: E402 # pyright: ignore[reportMissingImports] (its folder is no package)

FILES = sorted(path.stem for path in FOLDER.glob("*.py"))
MOST_LINES = 200
SHORT = {  # arguments of `main` with which a file does everything in a few seconds
    "attention": {"steps": 1}, "bert": {"steps": 1}, "clip": {"steps": 1}, "ddpm": {"steps": 1}, "gpt2": {"steps": 1},
    "instructgpt": {"fine_tuning": 1, "comparisons": 1, "rounds": 1}, "llama": {"steps": 1}, "neurons": {"steps": 1},
    "latent_diffusion": {"autoencoder_steps": 1, "steps": 1}, "transformer": {"steps": 1},
}  # fmt: skip

WRITING = {
    "gpt2",
    "llama",
    "ddpm",
    "instructgpt",
    "latent_diffusion",
}  # whose results take seconds however short the training is
PICTURES = {"ddpm": "ddpm.png", "latent_diffusion": "latent_diffusion.png"}


@cache
def single(name: str) -> ModuleType:
    """Import a file of the folder under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"single_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def shuffled(model: nn.Module) -> nn.Module:
    """Give a model weights that are large enough to show a difference."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def copied(ours: nn.Module, library: nn.Module, without: tuple[str, ...] = ()) -> nn.Module:
    """Copy the library's weights by their names, all of them."""
    ours.load_state_dict({name: tensor for name, tensor in library.state_dict().items() if name not in without})
    return ours.eval()


def tokens(high: int, *shape: int, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", FILES)
def test_help_is_the_docstring_and_starts_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    monkeypatch.setattr(torch, "manual_seed", pytest.fail)  # with which each of them begins
    found = runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out == found["__doc__"].strip() + "\n"


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_short_and_imports_torch_alone(name: str):
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MOST_LINES
    assert max(map(len, source.splitlines())) <= 120
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        others = {part.split(".")[0] for part in names} - set(sys.stdlib_module_names) - {"torch"}
        assert not others, f"{name}.py imports {others}"


def needed(name: str) -> set[str]:
    """Return the names of a package and of all that it requires, without extras."""
    names = {name}
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            names |= needed(requirement.name)
    return names


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of links to torch and to its requirements, like an environment with torch alone."""
    folder = tmp_path_factory.mktemp("torch_alone")
    for name in needed("torch"):
        found = metadata.distribution(name)
        record = (found.read_text("RECORD") or "").splitlines()  # as text: torch has more than ten thousand files
        for top in {re.split("[/,]", line, maxsplit=1)[0] for line in record} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    return folder


@pytest.mark.skipif(os.name == "nt", reason="a link needs a right there")
@pytest.mark.parametrize(
    "names", [pytest.param({*FILES} - WRITING, id="quick"), pytest.param(WRITING, marks=pytest.mark.slow, id="writing")]
)
def test_main_runs_to_its_result_with_torch_alone(names: set[str], torch_alone: Path, tmp_path: Path):
    program = ["import importlib.util", "assert not any(map(importlib.util.find_spec, ('numpy', 'PIL', 'keifu')))"]
    for name in sorted(names):
        program += [f"print('<{name}>')", f"import {name}", f"{name}.main(**{SHORT[name]})"]
    settings = {"PYTHONPATH": os.pathsep.join(map(str, (torch_alone, FOLDER))), "PYTHONDONTWRITEBYTECODE": "1"}
    settings |= {"OMP_NUM_THREADS": "1"}  # a second thread would spin on a busy core
    command = [sys.executable, "-S", "-W", "ignore", "-c", "\n".join(program)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = re.findall(r"<(\w+)>\n[^<]", done.stdout)
    assert results == sorted(names)
    assert {path.name for path in tmp_path.iterdir()} == {PICTURES[name] for name in names & {*PICTURES}}


def test_gpt2_has_the_librarys_logits_and_loads_published_weights(tmp_path: Path):
    file = single("gpt2")
    sizes = {"vocab_size": 37, "context_length": 19, "dim": 24, "n_layers": 3, "n_heads": 3, "dropout": 0.0}
    library = shuffled(gpt2.build(gpt2.Config(hidden_dim=96, **sizes)))
    given = tokens(37, 3, 17)
    assert torch.equal(copied(file.GPT2(file.Config(**sizes)), library)(given), library(given))

    config = GPT2Config(vocab_size=37, n_embd=24, n_layer=2, n_head=3, n_positions=19, bos_token_id=0, eos_token_id=0)
    published = shuffled(GPT2LMHeadModel(config))
    published.save_pretrained(tmp_path)
    torch.testing.assert_close(file.load(tmp_path)(given), published(given).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_llama_has_the_librarys_logits_loads_published_weights_and_caches(tied: bool, tmp_path: Path):
    file = single("llama")
    sizes = {"vocab_size": 37, "dim": 24, "hidden_dim": 40, "n_layers": 3, "n_heads": 3, "n_kv_heads": 1, "tied": tied}
    library = shuffled(llama.build(llama.Config(**sizes, rope_theta=500.0)))
    ours = copied(file.Llama(file.Config(**sizes, rope_theta=500.0)), library)
    given = tokens(37, 3, 17)
    whole = ours(given)
    assert torch.equal(whole, library(given))

    caches = [[] for _ in ours.blocks]
    parts = [ours(given[:, start:stop], caches) for start, stop in ((0, 5), (5, 6), (6, 17))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=0)  # another kernel, another order of sums

    config = LlamaConfig(
        vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    published = shuffled(LlamaForCausalLM(config))
    published.save_pretrained(tmp_path)
    torch.testing.assert_close(file.load(tmp_path)(given), published(given).logits, atol=1e-5, rtol=0)


def test_transformer_has_the_librarys_logits():
    file = single("transformer")
    sizes = {"vocab_size": 37, "dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 3, "dropout": 0.0}
    library = shuffled(transformer.build(transformer.Config(**sizes)))
    source, target = tokens(37, 3, 9, low=4), tokens(37, 3, 7, low=4)
    source[1, 6:] = 3
    ours = copied(file.Transformer(file.Config(**sizes)), library, without=("logits_bias",))
    assert torch.equal(ours(source, target), library(source, target, source != 3))


def test_attention_has_the_librarys_logits_to_the_last_digit():
    file = single("attention")
    sizes = {"vocab_size": 37, "dim": 10, "embedding_dim": 7, "attention_dim": 6, "maxout_dim": 5}
    library = shuffled(seq2seq.build(seq2seq.Config(**sizes)))
    source, target = tokens(37, 3, 9, low=4), tokens(37, 3, 7, low=4)
    source[1, 6:] = 2
    ours = copied(file.Seq2Seq(file.Config(**sizes)), library)(source, target)
    # The library computes the products of all steps at once, so its sums have another order.
    torch.testing.assert_close(ours, library(source, target, source != 2), atol=2e-6, rtol=0)


def test_bert_has_the_librarys_states_and_logits():
    file = single("bert")
    sizes = {"vocab_size": 37, "context_length": 12, "dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 3}
    library = shuffled(bert.build(bert.Config(**sizes, dropout=0.0)))
    ours = copied(file.Bert(file.Config(**sizes, dropout=0.0)), library)
    given, segments = tokens(37, 3, 9, low=1), tokens(2, 3, 9)
    given[1, 6:] = 0
    states, expected = ours.encode(given, segments, given != 0), library.encode(given, segments, given != 0)
    assert torch.equal(states, expected)
    assert torch.equal(ours.words(states), library.words(expected))
    assert torch.equal(ours.next_sentence(states), library.next_sentence(library.pool(expected)))


def test_clip_has_the_librarys_logits():
    file = single("clip")
    config = clip.Config(
        text.Config(11, 6, 8, 16, n_layers=2, n_heads=2, embedding_dim=4),
        image.Config(8, 4, 3, 12, 16, n_layers=2, n_heads=3, embedding_dim=4),
    )
    library = shuffled(clip.build(config))
    towers = {"text": file.Tower(8, 16, 2, 2), "image": file.Tower(12, 16, 2, 3)}
    ours = copied(file.Clip(file.Config(11, 6, image_size=8, patch_size=4, embedding_dim=4, **towers)), library)
    captions, pictures = tokens(10, 3, 6), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    captions[:, 3] = 10
    assert torch.equal(ours(pictures, captions), library(pictures, captions))


def test_ddpm_has_the_librarys_prediction():
    file = single("ddpm")
    config = ddpm.Config(
        size=8, channels=1, dim=8, multipliers=(1, 2), n_residual_blocks=1, norm_groups=4, middle_groups=4,
        n_classes=3, null_class=True, dropout=0.0,
    )  # fmt: skip
    library = shuffled(ddpm.build(config))
    ours = copied(file.DDPM(file.Config(dim=8, norm_groups=4, n_classes=3)), library)
    given = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    timestep, label = torch.tensor([0, 500, 999]), torch.tensor([0, 3, 2])
    # The library keeps channels last in memory, so its convolutions add in another order.
    torch.testing.assert_close(ours(given, timestep, label), library(given, timestep, label), atol=2e-6, rtol=0)


def in_order(ours: nn.Module, library: nn.Module, names: str) -> None:
    """Copy the library's modules of these names to the modules with weights that ours has, one after the other."""
    parts = [part for part in ours.children() if [*part.parameters()]]
    for part, name in zip(parts, names.split(), strict=True):
        weights = library.get_submodule(name).state_dict()
        part.load_state_dict({re.sub(r"blocks\.0\.(feedforward\.)?", "", key): weights[key] for key in weights})


def test_latent_diffusion_has_the_librarys_latents_pictures_and_prediction():
    file = single("latent_diffusion")
    sizes = {"size": 8, "channels": 3, "latent_channels": 2, "widths": (8, 16), "n_residual_blocks": 1}
    library = shuffled(autoencoder_kl.build(autoencoder_kl.Config(**sizes, norm_groups=4)))
    ours = file.Autoencoder(3, 2, (8, 16), 4)
    middle, last = "{0}.middle.residuals.0 {0}.middle.attentions.0 {0}.middle.residuals.1", "{0}.norm {0}.last"
    down = "{0}.first {0}.levels.0.residuals.0 {0}.levels.0.resample.conv {0}.levels.1.residuals.0"
    up = "{0}.levels.0.residuals.0 {0}.levels.0.residuals.1 {0}.levels.0.resample.conv"
    up += " {0}.levels.1.residuals.0 {0}.levels.1.residuals.1"
    in_order(ours.encoder, library, f"{down} {middle} {last} to_moments".format("encoder"))
    in_order(ours.decoder, library, f"from_latents {{0}}.first {middle} {up} {last}".format("decoder"))
    pictures = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = library.encode(pictures)
    torch.testing.assert_close(ours.encoder(pictures), torch.cat(expected, 1), atol=2e-6, rtol=0)
    torch.testing.assert_close(ours.decoder(expected.mean), library.decode(expected.mean), atol=2e-6, rtol=0)

    config = conditioned_unet.Config(
        size=4, channels=2, predicted_channels=2, widths=(16,), n_residual_blocks=1, attention=(0,), up_attention=(0,),
        n_heads=2, context_dim=6, norm_groups=4,
    )  # fmt: skip
    unet = shuffled(conditioned_unet.build(config))
    noisy, words = torch.randn(3, 2, 4, 4), torch.randn(3, 5, 6)
    timestep = torch.tensor([0, 400, 999])
    ours = file.Denoiser(2, 16, 2, 6, 4)
    blocks = "unet.down.0.{0}.0 unet.middle.{0}.0 {1} unet.up.0.{0}.0 unet.up.0.{0}.1"
    in_order(ours.residuals, unet, blocks.format("residuals", "unet.middle.residuals.1"))
    in_order(ours.transformers, unet, blocks.format("attentions", ""))
    in_order(ours.time, unet, "time.linear1 time.linear2")
    for name in ("first", "norm", "last"):
        ours.get_submodule(name).load_state_dict(unet.get_submodule(f"unet.{name}").state_dict())
    torch.testing.assert_close(ours(noisy, timestep, words), unet(noisy, timestep, words), atol=2e-6, rtol=0)


def test_a_network_has_the_librarys_outputs_and_its_own_backpropagation_the_gradients_of_autograd():
    file = single("neurons")
    library = shuffled(mlp.build(mlp.Config(dim=6, hidden_dims=(5, 4), n_outputs=3)))
    ours = copied(file.MLP(6, (5, 4), 3), library, without=("mean", "scale"))
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(ours(x), library(x))

    targets = tokens(3, 7)
    nn.functional.cross_entropy(ours(x), targets).backward()
    for gradient, parameter in zip(file.backpropagate(ours, x, targets), ours.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=0)


def test_a_perceptron_makes_the_librarys_eleven_corrections_for_and():
    file = single("neurons")
    inputs = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    assert file.Perceptron(2).learn(inputs, torch.tensor([0, 0, 0, 1.0])) == (11, True)
    assert not file.Perceptron(2).learn(inputs, torch.tensor([0, 1.0, 1, 0]))[1]


def test_the_policy_has_the_librarys_logits():
    file = single("instructgpt")
    config = gpt2.Config(12, file.PROMPT + file.DIGITS, 24, 96, n_layers=2, n_heads=3, dropout=0.0)
    library = shuffled(gpt2.build(config))
    given = tokens(12, 3, 12)
    assert torch.equal(copied(file.GPT(dim=24, n_layers=2, n_heads=3), library)(given), library(given))


def test_advantages_are_the_librarys():
    rewards, values = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    ours, returns = single("instructgpt").advantages(rewards, values)
    expected = ppo.advantages(rewards, values, torch.ones(3, 5, dtype=torch.bool), gae_lambda=0.95)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, expected + values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ending", [".md", ".ja.md"])
def test_the_page_of_a_landmark_shows_the_central_part_of_its_file(ending: str) -> None:
    shown = set()
    for path in (ROOT / "docs/lineage").glob("*.md"):
        page = path.read_text(encoding="utf-8")
        if path.name.endswith(".ja.md") == (ending == ".ja.md"):
            assert singles.fill(page) == page, f"python docs/_site/singles.py renews {path.name}"
            named = set(re.findall(r"\]\(../../examples/single/(\w+)\.py\)", page))
            marked = [Path(mark[0]).stem for mark in singles.MARK.findall(page)]
            assert marked == [*named]
            shown |= named
    assert shown == {*FILES}


def test_a_changed_part_would_be_seen() -> None:
    page = (ROOT / "docs/lineage/gpt2.md").read_text(encoding="utf-8")
    assert singles.fill(page.replace("is_causal=True", "is_causal=False", 1)) == page
    with pytest.raises(ValueError, match="defines no 'Blok'"):
        singles.definition("class Block: pass", "Blok")


def test_eject_prints_the_file_that_the_page_of_a_landmark_links(capsys: pytest.CaptureFixture[str]) -> None:
    names = {name: name for name in FILES} | {"latent-diffusion": "latent_diffusion"}
    for path in (ROOT / "docs/lineage").glob("*.md"):
        linked = re.findall(r"\]\(../../examples/single/(\w+)\.py\)", path.read_text(encoding="utf-8"))
        names |= {path.stem.removesuffix(".ja"): name for name in linked}
    assert names["perceptron"] == names["mlp"] == "neurons"
    for name, file in names.items():
        eject.run(eject.Options(name))
        assert capsys.readouterr().out == (FOLDER / f"{file}.py").read_text(encoding="utf-8"), name


@pytest.mark.parametrize(("name", "near"), [("gpt", "gpt3"), ("GPT2", "gpt2"), ("mlpp", "mlp"), ("x", None)])
def test_eject_suggests_a_name_that_is_near_or_none(name: str, near: str | None) -> None:
    with pytest.raises(UserError) as error:
        eject.run(eject.Options(name))
    guess = f" Did you mean {near!r}?" if near else ""
    assert str(error.value).startswith(f"There is no model {name!r}.{guess} There are ")
