"""No tensor on the wrong device: every model and objective, sampler and cache runs on a simulated second device, where
an operation on tensors of two devices is refused, and gives there what it gives on the CPU.

A new model or objective is a row of `CASES`; those that are in no row are named by a test.
"""

import ast
import sys
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import others_slow
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

import simulated_device  # noqa: E402
from model_entries import ENTRIES  # noqa: E402
from simulated_device import TwoDevices, device, simulated  # noqa: E402

from keifu import (
    checkpoints,
    devices,  # noqa: E402
)
from keifu.alignment.dpo import dpo  # noqa: E402
from keifu.alignment.grpo import grpo  # noqa: E402
from keifu.alignment.ppo import (
    PPOSettings,
    ppo,  # noqa: E402
)
from keifu.alignment.reward_model import ranking_loss  # noqa: E402
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer  # noqa: E402
from keifu.inference.images.pixel_diffusion import (
    ImageRequest,
    PixelPipeline,  # noqa: E402
    denoising_strip,
)
from keifu.inference.images.samplers import SAMPLERS  # noqa: E402
from keifu.inference.text.engine import Engine
from keifu.inference.text.generate import generate_batch  # noqa: E402
from keifu.inference.text.sampling_params import SamplingParams  # noqa: E402
from keifu.inference.text.translation import (
    TranslationParams,
    search,  # noqa: E402
)
from keifu.layers.attention.positions import sinusoids  # noqa: E402
from keifu.layers.counter_rng import (
    gumbel,
    normal,
    uniform,  # noqa: E402
)
from keifu.layers.diffusion.noise_schedule import Noise  # noqa: E402
from keifu.models import bert, gpt1, llama, mlp, seq2seq, task_head, transformer
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.dalle import dalle, discrete_vae
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, ddpm, dit, latent_diffusion, vq_vae
from keifu.models.unclip import conditioning, decoder as unclip_decoder, prior as unclip_prior, unclip
from keifu.models.variants import t5
from keifu.recipes.neurons import mlp as mlp_recipe  # noqa: E402
from keifu.training.objectives.autoencoders import (
    AutoencoderKLLoss,  # noqa: E402
    TextImageLoss,
    VQLoss,
    discrete_vae_loss,  # noqa: E402
)
from keifu.training.objectives.contrastive import contrastive_loss  # noqa: E402
from keifu.training.objectives.diffusion import (
    DiffusionLoss,
    TextDiffusionLoss,  # noqa: E402
    draw_noise,  # noqa: E402
)
from keifu.training.objectives.language_modeling import (
    causal_language_modeling,
    finetuning_loss,  # noqa: E402
    masked_language_modeling,  # noqa: E402
    span_corruption,  # noqa: E402
    translation,  # noqa: E402
)
from keifu.training.objectives.unclip import UnclipLoss  # noqa: E402
from keifu.training.settings import Settings  # noqa: E402
from keifu.training.trainer import Trainer  # noqa: E402

CPU = torch.device("cpu")
SMALL = {"vocab_size": 31, "context_length": 16, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4}
RECURRENT = {"vocab_size": 31, "context_length": 16, "dim": 12, "embedding_dim": 8, "attention_dim": 8, "maxout_dim": 8}
NETWORK = {"size": 8, "channels": 1, "dim": 8, "n_residual_blocks": 1, "multipliers": (1, 2), "norm_groups": 4,
           "middle_groups": 4, "dropout": 0.0}  # fmt: skip
WRITERS = {
    name: partial(entry.build, dim=16, hidden_dim=24)
    for name, entry in ENTRIES.items()
    if name != "lstm"  # the simulated device has no fused cell, and torch computes the layers there
}
WRITERS |= {"mistral": lambda: llama.build(llama.Config(**SMALL, n_kv_heads=1, sliding_window=5, tied=True))}
TRANSLATORS = {
    "seq2seq": lambda: seq2seq.build(seq2seq.Config(**RECURRENT)),
    "seq2seq-fixed": lambda: seq2seq.build(seq2seq.Config(**RECURRENT, context="fixed")),
    "seq2seq-plain": lambda: seq2seq.build(
        seq2seq.Config(**RECURRENT, encoder="forward", context="none", output="state")
    ),
    "transformer": lambda: transformer.build(transformer.Config(**SMALL, dropout=0.0)),
    "t5": lambda: t5.build(t5.Config(**SMALL, head_dim=8, dropout=0.0)),
}
DRAWERS = {
    "ddpm": lambda: ddpm.build(ddpm.Config(**NETWORK)),
    "ddpm-improved": lambda: ddpm.build(
        ddpm.Config(**NETWORK, scale_shift=True, n_classes=2, null_class=True, residual_down=(0,), residual_up=(1,),
                    noise=Noise(schedule="cosine", variance="learned_range"))
    ),
    "dit": lambda: dit.build(
        dit.Config(dit.TransformerConfig(8, 2, 1, None, n_heads=2, head_dim=8, n_layers=2, n_classes=2), None,
                   noise=Noise("flow", target="flow"))
    ),
}  # fmt: skip


def words(*shape: int) -> Tensor:
    return torch.randint(3, 31, shape)


def sides() -> dict[str, Tensor]:
    lengths = torch.tensor([[5], [7], [2]])
    masks = {"source_mask": torch.arange(7) < lengths, "target_mask": torch.arange(9) < lengths + 2}
    return {"source": words(3, 7), "target": words(3, 9)} | masks


def pictures(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def answers() -> dict[str, Tensor]:
    """Return a batch that methods with rollouts learn from."""
    mask = torch.arange(9) >= torch.tensor([[3], [5], [4]])
    each = {name: torch.randn(3, 9) for name in ("old", "reference", "values", "returns")}
    return {"tokens": words(3, 9), "mask": mask, "share": torch.full((3,), 0.2), "reward": torch.rand(3)} | each


def headed(form: str, labels: tuple[str, ...]) -> nn.Module:
    decoder = gpt1.build(gpt1.Config(**SMALL, dropout=0.0))
    return task_head.add_head(decoder, task_head.Config(decoder.config, form, labels, classifier_dropout=0.0))


def bert_case():
    model = bert.build(bert.Config(**SMALL, dropout=0.0))
    places = torch.tensor([[0, 4], [3, 5], [1, 2]])
    return model, masked_language_modeling, {
        "tokens": words(3, 9), "targets": words(3, 2), "places": places, "mask": torch.ones(3, 9, dtype=torch.bool),
        "segments": (torch.arange(9) > 6).long().expand(3, 9), "random_next": torch.tensor([0, 1, 1]),
        "word_weight": torch.full((3,), 4.5), "pair_weight": torch.full((3,), 9.0),
    }  # fmt: skip


def clip_case(image):
    text = clip_text.Config(31, 8, 16, 24, 1, 2, end_id=30, embedding_dim=8)
    tokens = torch.cat([torch.randint(0, 30, (3, 5)), torch.full((3, 1), 30)], 1)
    batch = {"pictures": pictures(3, 3, image.image_size, image.image_size), "tokens": tokens}
    return clip.build(clip.Config(text, image)), contrastive_loss(lambda pixels: pixels / 127.5 - 1), batch


def ddpm_case(name: str):
    model = DRAWERS[name]()
    batch = {"pictures": pictures(3, 1, 8, 8), "labels": torch.tensor([0, 1, -1]), "draws": draw_noise(0, 1, 3)}
    return model, DiffusionLoss(model.noise, "min_snr" if name == "ddpm" else "simple", None, 0.1), batch


def vae_case():
    model = discrete_vae.build(discrete_vae.Config(8, 1, 8, (8, 8), 1, 8))
    ramps = {"temperature": torch.full((3,), 0.5), "kl_weight": torch.full((3,), 0.1)}
    return model, discrete_vae_loss, {"pictures": pictures(3, 1, 8, 8), "draws": draw_noise(0, 1, 3), **ramps}


def dalle_case():
    vae = discrete_vae.Config(8, 1, 8, (8, 8), 1, 8)
    model = dalle.build(dalle.Config(31, 3, 16, 24, 4, 4, kernel=3, vae=vae))
    model.vae.requires_grad_(False)
    real = torch.tensor([[True, True, False], [True, True, True]])
    codes = model.vae.encode(torch.rand(2, 1, 8, 8) * 2 - 1)
    return model, TextImageLoss(), {"tokens": words(2, 3), "real": real, "codes": codes, "text_share": torch.ones(2)}


def latent_model() -> nn.Module:
    text = clip_text.Config(31, 3, 16, 24, 1, 2, end_id=9, projected=False)
    unet = conditioned_unet.Config(4, 2, 2, (8,), 1, (0,), (0,), 2, context_dim=16, norm_groups=4)
    noise = Noise("cosine", target="velocity", clip=None, spacing="trailing")
    autoencoder = autoencoder_kl.Config(8, 1, 2, (8, 8), 1, 4, scale=1.0)
    return latent_diffusion.build(latent_diffusion.Config(text, unet, autoencoder, noise))


def latent_case():
    model = latent_model()
    model.autoencoder.requires_grad_(False)
    loss = TextDiffusionLoss(model.noise, label_dropout=0.5, empty=torch.tensor([9, 9, 9]))
    return model, loss, {"pictures": torch.randn(3, 2, 4, 4), "tokens": words(3, 3), "draws": draw_noise(0, 1, 3)}


def autoencoder_case():
    return (
        latent_model().autoencoder,
        AutoencoderKLLoss(),
        {"pictures": pictures(3, 1, 8, 8), "draws": draw_noise(0, 1, 3)},
    )


def codebook_case():
    model = vq_vae.build(vq_vae.Config(8, 1, 4, (8, 8), 1, codebook_size=8, norm_groups=4))
    return model, VQLoss(), {"pictures": pictures(3, 1, 8, 8)}


def unclip_case():
    seen = Noise(schedule="cosine", steps=50, target="picture")
    config = unclip.Config(
        clip_text.Config(31, 4, 8, 16, 1, 2, end_id=30, embedding_dim=8), conditioning.Config(2, 8, 32, 8),
        unclip_decoder.Config(8, 1, 1, (8, 16), 1, (1,), (1,), 16, 8, norm_groups=4),
        unclip_prior.Config(4, 8, n_layers=1, n_heads=2, head_dim=8), None, None, None, None, seen, seen,
    )  # fmt: skip
    tokens, real = torch.tensor([[1, 30, 30, 30], [2, 5, 30, 30]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    batch = {"pictures": pictures(2, 1, 8, 8), "embeddings": torch.randn(2, 8), "tokens": tokens, "real": real}
    none = torch.tensor([[30] * 4]), torch.tensor([[True, False, False, False]])
    aim = UnclipLoss(DiffusionLoss(seen), DiffusionLoss(seen), None, (8, 8), 8, none, 0.3, 0.3, 0.3)
    return unclip.build(config), aim, batch | {"draws": draw_noise(0, 1, 2)}


def dpo_case():
    mask = torch.arange(9) >= torch.tensor([[[3], [5]], [[2], [6]]])
    batch = {"tokens": words(2, 2, 9), "mask": mask, "reference": torch.randn(2, 2)}
    return WRITERS["llama"](), partial(dpo, loss="dpo", beta=0.1), batch


def ppo_case():
    model = nn.Module()
    model.policy, model.value = WRITERS["gpt2"](), headed("score", ("reward",))
    batch = answers() | {"advantage": torch.randn(3, 9), "pretraining": words(3, 1, 6)}
    return model, partial(ppo, rule=PPOSettings()), batch


def grpo_case():
    objective = partial(grpo, clip=(0.2, 0.2), beta=0.1, variant="grpo")
    return WRITERS["llama"](), objective, answers() | {"advantage": torch.randn(3)}


def ranking_case():
    tokens, levels = words(2, 3, 7), torch.tensor([[1.0, 2.0, 0.0], [0.0, torch.nan, 1.0]])
    return headed("score", ("reward",)), ranking_loss, {"tokens": tokens, "mask": tokens > 5, "levels": levels}


def finetuning_case(form: str, labels: tuple[str, ...], sequences: int):
    tokens, real = words(3, sequences, 7), torch.arange(7) < torch.tensor([[[5]], [[7]], [[2]]])
    batch = {"tokens": tokens, "mask": real.expand(3, sequences, 7), "targets": torch.tensor([0, 1, 1])}
    return headed(form, labels), finetuning_loss, batch


def mlp_case():
    model = mlp.build(mlp.Config(dim=5, hidden_dims=(7,), n_outputs=3))
    return model, mlp_recipe.objective("cross_entropy"), {"inputs": torch.randn(4, 5), "targets": torch.arange(4) % 3}


CASES = {
    **{
        name: lambda name=name: (WRITERS[name](), causal_language_modeling, {"tokens": words(3, 9)})
        for name in WRITERS
    },
    **{name: lambda name=name: (TRANSLATORS[name](), translation, sides()) for name in TRANSLATORS},
    **{name: lambda name=name: ddpm_case(name) for name in DRAWERS},
    "denoising": lambda: (WRITERS["palm"](), span_corruption, {"tokens": words(3, 9), "mask": torch.rand(3, 9) < 0.5}),
    "bert": bert_case,
    "clip": lambda: clip_case(clip_image.Config(16, 4, 3, 16, 24, 1, 2, embedding_dim=8)),
    "clip-resnet": lambda: clip_case(clip_image.ResNetConfig(64, 4, (1, 1, 1, 1), 2, 8)),
    "discrete-vae": vae_case,
    "dalle": dalle_case,
    "latent-diffusion": latent_case,
    "autoencoder": autoencoder_case,
    "vq-vae": codebook_case,
    "unclip": unclip_case,
    "dpo": dpo_case,
    "grpo": grpo_case,
    "ppo": ppo_case,
    "reward": ranking_case,
    "classification": lambda: finetuning_case("classification", ("yes", "no"), 1),
    "multiple-choice": lambda: finetuning_case("choice", (), 2),
    "mlp": mlp_case,
}  # fmt: skip


def gradients(model: nn.Module, objective, batch: dict[str, Tensor], place: torch.device) -> tuple[dict, dict]:
    """Return means and gradients of a step, computed in two parts, and of a validation."""
    trainer = Trainer(model, objective, Settings(steps=1, batch_size=3, micro_batch=2, precision="float32"))
    batch = {name: tensor.to(place) for name, tensor in batch.items()}
    found = trainer.gradient(0, batch)
    named = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    trainer.update(found)
    return found.sums.means() | {"after": trainer.validation([batch])["loss"]}, named


# Models of blocks that other cases have on a device; they learn in tests/test_learning.py.
LIKE_LLAMA = {"qwen3", "granite", "ministral", "olmo2"}


@pytest.mark.parametrize("name", others_slow(CASES, *(name for name in CASES if name not in LIKE_LLAMA)))
def test_a_step_there_is_a_step_on_the_cpu(name: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, objective, batch = CASES[name]()
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    means, expected = gradients(model.train(), objective, batch, CPU)
    model.load_state_dict(kept)
    model.zero_grad()
    with simulated():
        found, named = gradients(model.to(device()).train(), objective, batch, device())
    assert found == pytest.approx(means, rel=1e-3, abs=1e-4) and named.keys() == expected.keys()
    for key in named:
        torch.testing.assert_close(named[key], expected[key], rtol=1e-3, atol=3e-5)


def test_every_models_file_is_in_a_row() -> None:
    folder = Path(llama.__file__).parent
    defined = {
        f"keifu.models.{path.stem}"
        for path in folder.glob("[!_]*.py")
        if any(isinstance(node, ast.FunctionDef) and node.name == "build" for node in ast.parse(path.read_text()).body)
    }
    covered = set[str]()
    for case in CASES.values():
        model = case()[0]
        covered |= {type(part).__module__ for part in model.modules()}
        covered |= {type(part.config).__module__ for part in model.modules() if hasattr(part, "config")}
    assert defined - covered == {"keifu.models.perceptron"}  # which learns by its own rule, without a gradient


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    trained = train_tokenizer("bpe", ["ab"], 260, special_tokens=["<|pad|>"])
    return Tokenizer(trained.backend, {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})


ALL_AT_ONCE = [
    SamplingParams(max_tokens=4, temperature=0, seed=1, log_probabilities=True),
    SamplingParams(max_tokens=5, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=2),
    SamplingParams(max_tokens=3, presence_penalty=0.4, frequency_penalty=0.3, seed=3, log_probabilities=True),
]


# Each kind of cache and of attention; the others are marked slow. A step of training runs for all models.
QUICK_WRITERS = {"gpt2", "llama", "palm", "gemma3", "deepseek-v3", "gpt-oss", "qwen3-next", "nanochat"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK_WRITERS else [pytest.mark.slow]) for name in WRITERS]
)
def test_texts_written_there_are_those_of_the_cpu(name: str, tokenizer: Tokenizer) -> None:
    """Texts of different lengths in one batch, prefixes that are shared, every setting; a step reads once."""
    torch.manual_seed(0)
    model = WRITERS[name]()
    module = sys.modules[type(model.config).__module__]
    model = module.build(type(model.config)(**{**vars(model.config), "vocab_size": 261, "context_length": 48})).eval()
    prompts = [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9, 10, 11], [3]]
    expected = generate_batch(model, tokenizer, prompts, ALL_AT_ONCE)
    with simulated():
        found = generate_batch(model.to(device()), tokenizer, prompts, ALL_AT_ONCE)
    assert [text.tokens for text in found] == [text.tokens for text in expected]


def test_a_step_of_decoding_waits_for_the_device_once(tokenizer: Tokenizer) -> None:
    model, counts = llama.build(llama.Config(**{**SMALL, "vocab_size": 261, "context_length": 48})).eval(), []
    tokenizer = Tokenizer(tokenizer.backend, {})
    with simulated() as reads:
        model = model.to(device())
        for length in (4, 9):
            reads.clear()
            generate_batch(
                model, tokenizer, [[5, 6], [7, 8, 9]], SamplingParams(max_tokens=length, temperature=0.8, seed=1)
            )
            counts.append(sum(reads.values()))
    assert counts[1] - counts[0] == 5


def test_the_same_numbers_are_drawn_on_a_device_without_float64(tokenizer: Tokenizer, monkeypatch) -> None:
    torch.manual_seed(0)
    model = llama.build(llama.Config(**{**SMALL, "vocab_size": 261, "context_length": 48})).eval()
    seeds = torch.tensor([1, 2**40, -7])
    drawn = normal(seeds, (5,)), gumbel(seeds, (5,)), uniform(seeds, seeds), sinusoids(torch.arange(9), 6)
    expected = generate_batch(model, tokenizer, [[5, 6], [7]], ALL_AT_ONCE[:2])
    with simulated():
        monkeypatch.setattr(simulated_device, "WIDE", [])
        monkeypatch.setattr("keifu.layers.wide.WITHOUT", {"sim"})
        there = seeds.to(device())
        again = normal(there, (5,)), gumbel(there, (5,)), uniform(there, there), sinusoids(
            torch.arange(9, device=device()), 6
        )  # fmt: skip
        for one, other in zip(drawn, again, strict=True):
            assert other.device == device()
            torch.testing.assert_close(other.cpu(), one.float(), rtol=1e-6, atol=1e-7)
        found = generate_batch(model.to(device()), tokenizer, [[5, 6], [7]], ALL_AT_ONCE[:2])
    assert [text.tokens for text in found] == [text.tokens for text in expected]


@pytest.mark.parametrize("name", TRANSLATORS)
def test_beams_there_are_those_of_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    model, sources = TRANSLATORS[name]().eval(), [[3, 4, 5, 6], [7], [8, 9]]
    expected = search(model, sources, TranslationParams(beam=3))
    with simulated():
        found = search(model.to(device()), sources, TranslationParams(beam=3))
    assert [each.tokens for each in found] == [each.tokens for each in expected]


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_pictures_drawn_there_are_those_of_the_cpu(sampler: str) -> None:
    torch.manual_seed(0)
    model = ddpm.build(ddpm.Config(**NETWORK, noise=Noise(steps=12))).eval()
    wanted = ImageRequest(steps=None if sampler == "ddpm" else 4, sampler=sampler)
    expected = PixelPipeline(model).draw(wanted, [1, 2])
    with simulated():
        found = PixelPipeline(model.to(device())).draw(wanted, [1, 2])
    assert found.device == CPU and (found.int() - expected.int()).abs().max() <= 1


def results(writer: nn.Module, translator: nn.Module, drawer: nn.Module) -> list[Any]:
    """Return generated tokens by PyTorch and by the native step if there is one, translations, and a picture."""
    found: list[Any] = []
    sampling = SamplingParams(5, frequency_penalty=0.5, seed=1, logit_bias=((3, 1.0),), log_probabilities=True)
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(deepcopy(writer).to(dtype), None)
        engine.add(engine.request([1, 2, 3], sampling))
        while engine.work:
            found += engine.step()
        sources, settings = [[3, 4, 5, 6], [7], [8, 9]], TranslationParams(beam=3, max_tokens=4)
        found += search(deepcopy(translator).to(dtype), sources, settings)
    strip = denoising_strip(list(PixelPipeline(drawer).drawing(ImageRequest("dpm++-2m", 4), [1])))
    return [*found, strip.pictures.tolist()]


def test_torchs_default_type_and_device_change_no_result() -> None:
    """Native code wrote float32 into memory of the default type, over its end."""
    torch.manual_seed(0)
    models = WRITERS["llama"](), TRANSLATORS["transformer"](), DRAWERS["ddpm"]()
    expected = results(*models)
    for default in (torch.float64, torch.bfloat16, torch.device("meta")):
        try:
            if isinstance(default, torch.dtype):
                torch.set_default_dtype(default)
            with default if isinstance(default, torch.device) else nullcontext():
                assert results(*models) == expected, default
        finally:
            torch.set_default_dtype(torch.float32)


def test_a_model_is_loaded_straight_to_the_device_that_is_chosen(tmp_path: Path) -> None:
    model = WRITERS["mistral"]()
    checkpoints.save(model, None, tmp_path)
    with simulated():
        there, here = checkpoints.load_model(tmp_path), checkpoints.load_model(tmp_path, device="cpu")
        with devices.choosing(devices.Choice("cpu")):
            said = checkpoints.load_model(tmp_path)
        assert {p.device.type for p in there.state_dict().values()} == {"sim"}
        assert {p.device.type for each in (here, said) for p in each.state_dict().values()} == {"cpu"}
        for one, other in zip(there.state_dict().values(), here.state_dict().values(), strict=True):
            assert torch.equal(one.cpu(), other)


def test_an_operation_on_two_devices_is_refused() -> None:
    model = WRITERS["gpt2"]()
    with simulated():
        with pytest.raises(TwoDevices):
            model.to(device())(words(1, 3))
        with pytest.raises(TwoDevices):
            torch.ones(3, device=device()) + torch.ones(3)
        assert float(torch.ones(3, device=device()).sum() + torch.tensor(1.0)) == 4.0
