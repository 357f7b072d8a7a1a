"""Every model learns: each is trained on a toy set until it knows it by heart, in seconds."""

import math
from dataclasses import replace

import pytest
import torch
from model_entries import ENTRIES

from keifu.data.images.io import to_signed
from keifu.inference.images.autoregressive import sample_image_tokens
from keifu.inference.images.latent_diffusion import text_denoiser
from keifu.inference.images.pixel_diffusion import ImageRequest, PixelPipeline, SeededNoise
from keifu.inference.images.samplers import configure_sampler
from keifu.inference.images.single_pass import GeneratorPipeline
from keifu.inference.text.unmasking import Unmasking, unmask
from keifu.layers.attention.masks import real_tokens
from keifu.layers.diffusion.noise_schedule import Noise
from keifu.models import (
    bert,
    llama,
    mlp,
    perceptron,
    seq2seq,
    transformer,
)
from keifu.models.classic import gan
from keifu.models.clip import clip, image as clip_image, text as clip_text
from keifu.models.dalle import dalle, discrete_vae
from keifu.models.diffusion import autoencoder_kl, conditioned_unet, ddpm, dit, latent_diffusion, llada, vq_vae
from keifu.models.speech import whisper
from keifu.models.unclip import conditioning, decoder as unclip_decoder, prior as unclip_prior, unclip
from keifu.models.variants import t5
from keifu.recipes.neurons.mlp import LOSSES
from keifu.training.objectives.adversarial import adversarial_loss
from keifu.training.objectives.autoencoders import AutoencoderKLLoss, Ramp, TextImageLoss, VQLoss, discrete_vae_loss
from keifu.training.objectives.contrastive import contrastive_loss
from keifu.training.objectives.diffusion import DiffusionLoss, TextDiffusionLoss, draw_noise
from keifu.training.objectives.language_modeling import (
    causal_language_modeling,
    masked_diffusion,
    masked_language_modeling,
    transcription,
    translation,
)
from keifu.training.objectives.unclip import UnclipLoss
from keifu.training.settings import Settings
from keifu.training.trainer import Trainer

CPU = torch.device("cpu")
SMALL = {"vocab_size": 31, "context_length": 16, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
LANGUAGE_MODELS = {name: (entry.module, entry.toy) for name, entry in ENTRIES.items()} | {
    "mistral": (llama, llama.Config(**SMALL, n_kv_heads=1, sliding_window=5, tied=True)),
    "qwen2": (llama, llama.Config(**SMALL, qkv_bias=True)),
}


WITH_MUON = ("gpt2", "deepseek-v3")  # biases and experts; Muon knows no model
# Models of LLaMA's blocks, which learn here; their own gradients are compared in tests/test_on_another_device.py.
LIKE_LLAMA = ("mistral", "qwen2", "smollm3", "phi3")
OPTIMIZERS = [
    pytest.param("adamw", name, marks=[pytest.mark.slow] if name in LIKE_LLAMA else []) for name in LANGUAGE_MODELS
] + [pytest.param("muon", name, marks=[] if name in WITH_MUON else [pytest.mark.slow]) for name in LANGUAGE_MODELS]


@pytest.mark.parametrize(("optimizer", "name"), OPTIMIZERS)
def test_a_language_model_learns_rows_by_heart(optimizer, name):
    module, config = LANGUAGE_MODELS[name]
    torch.manual_seed(0)
    model = module.build(config).train()
    steps, rate = {"adamw": (50, 1.5e-2), "muon": (80, 1e-2)}[optimizer]
    steps = 3 * steps if name == "lstm" else steps  # a step of a recurrent network teaches less
    settings = Settings(steps=steps, batch_size=8, optimizer=optimizer, learning_rate=rate, weight_decay=0.0)
    batch = {"tokens": torch.randint(0, 31, (8, 13))}
    losses = learned(model, causal_language_modeling, settings, lambda step: batch, until=0.35)
    assert losses[0] > 3.0  # nothing was known: log 31 is 3.43
    # The first token of a row cannot be known from anything before it, so a row's second token may stay open.
    assert losses[-1] < 0.35


PAIRS = {"vocab_size": 31, "context_length": 16, "dim": 32}
RECURRENT = {**PAIRS, "embedding_dim": 24, "attention_dim": 32, "maxout_dim": 32}
TRANSLATORS = {
    "seq2seq-attention": (seq2seq, seq2seq.Config(**RECURRENT)),
    "seq2seq-fixed": (seq2seq, seq2seq.Config(**RECURRENT, context="fixed")),
    "seq2seq-plain": (seq2seq, seq2seq.Config(**RECURRENT, encoder="forward", context="none", output="state")),
    "transformer": (transformer, transformer.Config(**SMALL, dropout=0.0)),
    "t5": (t5, t5.Config(**SMALL, head_dim=8, dropout=0.0)),
    "transformer-apart": (transformer, transformer.Config(**SMALL, dropout=0.0, shared=False, tied=False)),
}


OTHER_TRANSLATORS = {"seq2seq-fixed", "seq2seq-plain", "transformer-apart"}  # marked slow


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in OTHER_TRANSLATORS else []) for name in TRANSLATORS]
)
def test_an_encoder_decoder_learns_pairs_by_heart(name):
    module, config = TRANSLATORS[name]
    torch.manual_seed(0)
    model = module.build(config).train()
    steps = 150 if module is seq2seq else 60
    settings = Settings(steps=steps, batch_size=8, learning_rate=1e-2, weight_decay=0.0)
    lengths = torch.randint(2, 8, (2, 8, 1))
    masks = [torch.arange(7) < lengths[0], torch.arange(9) < lengths[1] + 2]
    batch = {"source": torch.randint(3, 31, (8, 7)), "target": torch.randint(3, 31, (8, 9))}
    batch |= {"source_mask": masks[0], "target_mask": masks[1]}
    losses = learned(model, translation, settings, lambda step: batch, until=0.3)
    assert losses[0] > 3.0 and losses[-1] < 0.3


def test_whisper_learns_sounds_by_heart():
    torch.manual_seed(0)
    config = whisper.Config(**SMALL, audio_length=10, n_mels=6)
    model = whisper.build(config).train()
    settings = Settings(steps=100, batch_size=8, learning_rate=5e-3, weight_decay=0.0)
    mask = torch.arange(9) < torch.randint(4, 10, (8, 1))
    batch = {"features": torch.randn(8, 6, 20), "target": torch.randint(3, 31, (8, 9)), "target_mask": mask}
    losses = learned(model, transcription, settings, lambda step: batch, until=0.3)
    assert losses[0] > 3.0 and losses[-1] < 0.3


@pytest.mark.slow
def test_llada_learns_rows_by_heart_and_writes_them():
    """Each row begins with its number, and is written from masks alone behind it."""
    torch.manual_seed(0)
    model = llada.build(llada.Config(**SMALL, mask_token=30)).train()
    settings = Settings(steps=600, batch_size=32, learning_rate=5e-3, weight_decay=0.0)
    tokens = torch.randint(8, 30, (4, 13))
    tokens[:, 0] = torch.arange(4)
    batch = {"tokens": tokens.repeat(8, 1), "rates": (torch.randperm(32) + 1) / 32}
    losses = learned(model, masked_diffusion, settings, lambda step: batch | {"draws": draw_noise(0, step, 32)})
    assert losses[0] > 3.0 and sum(losses[-20:]) < 20 * 0.7
    for row in tokens.tolist():
        assert unmask(model, [row[0], *[30] * 12], Unmasking(steps=6)) == row


def test_bert_learns_masked_words_and_neighbours_by_heart():
    torch.manual_seed(0)
    model = bert.build(bert.Config(**SMALL, dropout=0.0)).train()
    settings = Settings(steps=150, batch_size=8, learning_rate=5e-3, weight_decay=0.0)
    tokens, places = torch.randint(1, 31, (8, 13)), torch.stack([torch.randperm(13)[:3] for _ in range(8)])
    batch = {
        "tokens": tokens.scatter(1, places, 0), "targets": tokens.gather(1, places), "places": places,
        "segments": (torch.arange(13) > 6).long().expand(8, 13), "random_next": torch.randint(0, 2, (8,)),
        "mask": torch.ones(8, 13, dtype=torch.bool), "word_weight": torch.full((8,), 104 / 24),
        "pair_weight": torch.full((8,), 104 / 8),
    }  # fmt: skip
    losses = learned(model, masked_language_modeling, settings, lambda step: batch, until=0.05)
    assert losses[0] > 3.9  # nothing was known: log 31 + log 2 is 4.13
    assert losses[-1] < 0.05


NETWORK = {
    "size": 8, "channels": 1, "dim": 16, "n_residual_blocks": 1, "multipliers": (1, 2), "norm_groups": 4,
    "middle_groups": 4,
}  # fmt: skip
# their formulas are compared in tests/training; unCLIP learns pictures with the same network
LEARNED_BELOW = {"ddpm", "ddpm-improved", "ddpm-velocity", "ddpm-flow", "dit-velocity"}
FLOW = Noise("flow", target="flow")
TRANSFORMER = dit.TransformerConfig(8, 2, 1, None, n_heads=2, head_dim=16, n_layers=2, n_classes=2)
DRAWING: dict[str, ddpm.Config | dit.Config] = {
    "ddpm": ddpm.Config(**NETWORK, dropout=0.0),
    "ddpm-improved": ddpm.Config(
        **NETWORK, dropout=0.0, scale_shift=True, n_classes=2, null_class=True, residual_down=(0,), residual_up=(1,),
        noise=Noise(schedule="cosine", variance="learned_range"),
    ),
    "ddpm-velocity": ddpm.Config(**NETWORK, dropout=0.0, noise=Noise(schedule="cosine", target="velocity")),
    "ddpm-flow": ddpm.Config(**NETWORK, dropout=0.0, noise=FLOW),
    "dit-flow": dit.Config(TRANSFORMER, None, noise=FLOW),
    "dit-velocity": dit.Config(replace(TRANSFORMER, n_classes=0), None, noise=Noise("cosine", target="velocity")),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LEARNED_BELOW else []) for name in DRAWING],
)
def test_a_drawing_network_learns_two_pictures_by_heart(name):
    """A bar that stands and one that lies: what is drawn is one of them, and of a class it is the right one."""
    torch.set_num_threads(1)  # layers this small gain nothing from a second
    torch.manual_seed(0)
    config = DRAWING[name]
    model = (dit if isinstance(config, dit.Config) else ddpm).build(config).train()
    steps = 200 if name == "ddpm-flow" else 160
    settings = Settings(steps=steps, batch_size=32, learning_rate=1e-2, warmup=20, weight_decay=0.0, final_ratio=0.0)
    bars = torch.full((2, 1, 8, 8), -1.0)
    bars[0, 0, :, 3:5] = bars[1, 0, 3:5] = 1.0
    labels = torch.arange(32) % 2
    given = {"pictures": bars[labels]} | ({"labels": labels} if config.n_classes else {})
    loss = DiffusionLoss(config.noise, label_dropout=0.1)
    losses = learned(model, loss, settings, lambda step: given | {"draws": draw_noise(0, step, 32)})
    assert losses[0] > 0.7 and sum(losses[-20:]) < 20 * 0.15
    model.eval()
    for label in range(2) if config.n_classes else [None]:
        drawn = PixelPipeline(model).draw(ImageRequest(steps=20, label=label), range(4))
        apart = (drawn[:, None].float() / 127.5 - 1 - bars).abs().mean((2, 3, 4))
        assert (apart.min(1).values < 0.25).all()
        assert label is None or (apart.argmin(1) == label).all()


@pytest.mark.parametrize("network", [pytest.param("dcgan", marks=pytest.mark.slow), "mlp"])
def test_a_gan_learns_two_pictures_by_heart(network):
    """Drawings are near one of the two. DCGAN draws both; the fully connected GAN collapses to one of them."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = gan.build(gan.Config(size=8, latent_dim=4, network=network, widths=(16, 32), hidden_dim=64)).train()
    settings = Settings(
        steps=400, batch_size=32, learning_rate=3e-3, betas=(0.5, 0.999), schedule="constant", weight_decay=0.0,
        clip=0.0, micro_batch=32,
    )  # fmt: skip
    pictures = halves()[torch.arange(32) % 2]
    learned(model, adversarial_loss, settings, lambda step: {"pictures": pictures, "draws": draw_noise(0, step, 32)})
    drawn = GeneratorPipeline(model.eval()).draw(ImageRequest(seed=0), range(40))
    apart = (drawn[:, None].float() - halves()).abs().mean((2, 3, 4)) / 127.5
    assert (apart.min(1).values < 0.3).float().mean() > 0.7
    assert network == "mlp" or 0.2 < apart.argmin(1).float().mean() < 0.8


TOWERS = {
    "vit": clip_image.Config(16, 4, 3, 32, 64, 2, 4, embedding_dim=16),
    "resnet": clip_image.ResNetConfig(64, 4, (1, 1, 1, 1), 2, 16),
}


@pytest.mark.parametrize("name", TOWERS)
def test_clip_learns_pairs_by_heart(name):
    torch.manual_seed(0)
    text, image = clip_text.Config(31, 8, 32, 64, 1, 4, end_id=30, embedding_dim=16), TOWERS[name]
    model = clip.build(clip.Config(text, image)).train()
    aim = contrastive_loss(lambda pixels: pixels / 127.5 - 1)
    settings = Settings(steps=60, batch_size=8, learning_rate=3e-3, weight_decay=0.0, warmup=5)
    tokens = torch.cat([torch.randint(0, 30, (8, 6)), torch.full((8, 1), 30)], 1)
    size = image.image_size
    batch = {"pictures": torch.randint(0, 256, (8, 3, size, size)).byte(), "tokens": tokens}
    losses = learned(model, aim, settings, lambda step: batch, until=0.1)
    assert losses[0] > 1.5  # nothing was known: log 8 is 2.08
    assert losses[-1] < 0.1


def learned(model, objective, settings, batch, until: float = -math.inf) -> list[float]:
    """Train until a loss is below `until`, and return the loss of each step. `batch` gets the step."""
    trainer, losses = Trainer(model, objective, settings, dtype=torch.float32), []
    for step in range(settings.steps):
        gradient = trainer.gradient(step, batch(step))
        losses.append(gradient.sums.means()["loss"])
        if losses[-1] < until:
            break
        trainer.update(gradient)
    return losses


def halves() -> torch.Tensor:
    """Return a picture that is white on the left and one that is white at the top, as bytes."""
    made = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    made[0, 0, :, :4] = made[1, 0, :4] = 255
    return made


@pytest.mark.slow
def test_dalle_learns_two_pictures_and_their_texts_by_heart():
    """First a codebook for them, then what to say for each text."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = discrete_vae.Config(8, 1, 8, (16, 16), 1, 8)
    model = dalle.build(dalle.Config(11, 3, 32, 64, 2, 4, kernel=3, vae=vae)).train()
    settings = Settings(steps=150, batch_size=16, learning_rate=1e-2, warmup=10, weight_decay=0.0, final_ratio=0.0)
    ramps = {"temperature": Ramp(1.0, 1 / 16, 120), "kl_weight": Ramp(0.0, 0.1, 20)}
    which = torch.arange(16) % 2

    def pictures(step: int) -> dict[str, torch.Tensor]:
        told = {name: torch.full((16,), ramp.at(step)) for name, ramp in ramps.items()}
        return {"pictures": halves()[which], "draws": draw_noise(0, step, 16), **told}

    losses = learned(model.vae, discrete_vae_loss, settings, pictures)
    again = model.vae(to_signed(halves()))
    assert losses[-1] < losses[0] - 1 and (again - to_signed(halves())).abs().mean() < 0.1
    codes, tokens = model.vae.encode(to_signed(halves())), torch.tensor([[1, 2, 9], [3, 9, 9]])
    real = real_tokens(tokens, 9)
    rows = {"tokens": tokens, "real": real, "codes": codes, "text_share": torch.full((2,), 2 / 5)}
    model.vae.requires_grad_(False)
    batch = {name: tensor[which] for name, tensor in rows.items()}
    losses = learned(model, TextImageLoss(), replace(settings, steps=60), lambda step: batch)
    assert losses[0] > 1.5 and losses[-1] < 0.15
    assert (sample_image_tokens(model.eval(), tokens, real, [1, 2]) == codes).float().mean() > 0.95


@pytest.mark.slow
def test_a_codebook_learns_two_pictures_by_heart():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = vq_vae.build(vq_vae.Config(8, 1, 4, (8, 8), 1, codebook_size=8, norm_groups=4)).train()
    settings = Settings(steps=80, batch_size=8, learning_rate=1e-2, warmup=10, weight_decay=0.0, final_ratio=0.0)
    which = torch.arange(8) % 2
    losses = learned(model, VQLoss(), settings, lambda step: {"pictures": halves()[which]})
    with torch.no_grad():
        again, codes = model(to_signed(halves())), model.encode(to_signed(halves()))
    assert losses[-1] < losses[0] / 3 and (again - to_signed(halves())).square().mean() < 0.1
    assert len(codes.unique()) > 1 and not torch.equal(*codes)


@pytest.mark.slow
def test_latent_diffusion_learns_two_pictures_by_heart():
    """First latents for them, then which of them a text asks for."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = clip_text.Config(11, 3, 16, 32, 1, 2, end_id=9, projected=False)
    unet = conditioned_unet.Config(4, 2, 2, (16,), 1, (0,), (0,), 2, context_dim=16, norm_groups=4)
    noise = Noise("cosine", target="velocity", clip=None, spacing="trailing")
    autoencoder = autoencoder_kl.Config(8, 1, 2, (8, 8), 1, 4, scale=1.0)
    model = latent_diffusion.build(latent_diffusion.Config(text, unet, autoencoder, noise)).train()
    assert model.autoencoder is not None
    settings = Settings(steps=60, batch_size=8, learning_rate=1e-2, warmup=10, weight_decay=0.0, final_ratio=0.0)
    which = torch.arange(8) % 2
    losses = learned(
        model.autoencoder, AutoencoderKLLoss(), settings,
        lambda step: {"pictures": halves()[which], "draws": draw_noise(0, step, 8)},
    )  # fmt: skip
    assert losses[-1] < 0.4 < losses[0]
    model.autoencoder.requires_grad_(False)
    model.text.requires_grad_(False)
    with torch.no_grad():
        latents = model.to_latents(to_signed(halves()))
    latents = latents / latents.std()
    tokens, empty = torch.tensor([[1, 2, 9], [3, 9, 9]]), torch.tensor([9, 9, 9])
    loss = TextDiffusionLoss(noise, label_dropout=0.1, empty=empty)
    losses = learned(
        model, loss, replace(settings, steps=120),
        lambda step: {"pictures": latents[which], "tokens": tokens[which], "draws": draw_noise(0, step, 8)},
    )  # fmt: skip
    assert losses[0] > 0.7 and sum(losses[-20:]) < 20 * 0.3
    network = text_denoiser(model.eval(), tokens, tokens, 1.0, 0.0)
    path = configure_sampler(noise, "ddim", 20, None, False, 0.0)
    with torch.no_grad():
        *_, last = path.run(path.denoiser(network), torch.randn(2, 2, 4, 4), path.schedule, SeededNoise([1, 2]))
    apart = (last.x[:, None] - latents).abs().mean((2, 3, 4))
    assert apart.argmin(1).tolist() == [0, 1]


def test_unclip_learns_what_two_captions_mean_by_heart():
    """Its prior gives for each of two captions the embedding that belongs to it, and its decoder the bar of that."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seen = Noise(schedule="cosine", steps=50, target="picture")
    config = unclip.Config(
        clip_text.Config(31, 4, 8, 16, 1, 2, end_id=30, embedding_dim=8), conditioning.Config(2, 8, 32, 8),
        unclip_decoder.Config(8, 1, 1, (8, 16), 1, (1,), (1,), 16, 8, norm_groups=4),
        unclip_prior.Config(4, 8, n_layers=1, n_heads=2, head_dim=8), None, None, None, None, seen, seen,
    )  # fmt: skip
    model = unclip.build(config).train()
    tokens, real = torch.tensor([[1, 30, 30, 30], [2, 5, 30, 30]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    points, bars = torch.randn(2, 8).clamp(-1, 1), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    bars[0, :, :, 3:5] = bars[1, :, 3:5] = 255
    none = torch.tensor([[30] * 4]), torch.tensor([[True, False, False, False]])
    aim = UnclipLoss(DiffusionLoss(seen), DiffusionLoss(seen), None, (8, 8), 8, none, text_dropout=0.1)
    settings = Settings(steps=40, batch_size=16, learning_rate=1e-2, warmup=10, weight_decay=0.0, final_ratio=0.0)
    which = torch.arange(16) % 2
    batch = {"pictures": bars[which], "embeddings": points[which], "tokens": tokens[which], "real": real[which]}
    losses = learned(model, aim, settings, lambda step: {**batch, "draws": draw_noise(0, step, 16)})
    assert losses[0] > 1 and sum(losses[-10:]) < 10 * 0.25
    model.eval()
    random, way = SeededNoise([1, 2]), configure_sampler(seen, "ddim", 10)
    with torch.no_grad():
        caption = model.encode_text(tokens, real)
        *_, last = way.run(
            way.denoiser(lambda x, t: model.predict_embedding(x, t, caption)), random(points), way.schedule, random
        )
        assert (last.x - points).abs().mean() < 0.25
        conditions, x = model.embed(model.prior.restored(last.x), caption), random(torch.empty(2, 1, 8, 8))
        *_, last = way.run(way.denoiser(lambda x, t: model(x, t, conditions)), x, way.schedule, random)
    apart = (last.x[:, None] - (bars.float() / 127.5 - 1)).abs().mean((2, 3, 4))
    assert apart.argmin(1).tolist() == [0, 1] and apart.min(1).values.max() < 0.25


def test_a_network_learns_a_table_by_heart():
    torch.manual_seed(0)
    config = mlp.Config(dim=5, hidden_dims=(32,), n_outputs=3, activation="relu")
    model, x, labels = mlp.build(config), torch.randn(24, 5), torch.randint(0, 3, (24,))
    targets = torch.nn.functional.one_hot(labels, 3).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(300):
        optimizer.zero_grad()
        LOSSES["cross_entropy"](model(x), targets).backward()
        optimizer.step()
    assert (model(x).argmax(-1) == labels).all()


def test_a_neuron_learns_a_plane():
    torch.manual_seed(0)
    neuron, x = perceptron.build(perceptron.Config(3)), torch.randn(40, 3)
    x = x[(x @ torch.tensor([1.0, -2.0, 0.5]) - 0.3).abs() > 0.3]
    targets = (x @ torch.tensor([1.0, -2.0, 0.5]) - 0.3 >= 0).double()
    for _ in range(100):
        for row, target in zip(x.double(), targets, strict=True):
            neuron.correct(row, float(target))
    assert (neuron(x.double()) == targets).all()
