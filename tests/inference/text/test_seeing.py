"""A model that sees: its engine gives what the whole sequence gives, and pictures share blocks by their content."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import keifu
from keifu.data.tokenizers.chat_template import CHATML, PICTURES, PLAIN
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.chat.conversation import Conversation
from keifu.inference.chat.prompts import ImagePrompt, InsertedImages, preprocessing, render
from keifu.inference.text.engine import Engine
from keifu.inference.text.generate import generate, generate_batch
from keifu.inference.text.runner import TorchRunner
from keifu.inference.text.sampling_params import SamplingParams
from keifu.models import llama
from keifu.models.clip import image as clip_image
from keifu.models.hf.image_processor import Pixels, Tiles
from keifu.models.multimodal import llava, siglip, smolvlm

GREEDY = SamplingParams(temperature=0, max_tokens=8, seed=0)
MARKED = ["<|im_start|>", "<|im_end|>", "<image>"]


@pytest.fixture(scope="module")
def reader() -> Tokenizer:
    trained = train_tokenizer("bpe", ["ab"], 260, special_tokens=MARKED)
    return Tokenizer(trained.backend, {"eos_token": "<|im_end|>"}, chat_template=PICTURES + CHATML)


@pytest.fixture(scope="module")
def seer(reader: Tokenizer) -> llava.Llava:
    """Return a toy whose answers depend on the picture."""
    torch.manual_seed(4)
    text = llama.Config(reader.vocab_size, 400, 24, 40, 2, 4, 2)
    image = clip_image.Config(16, 4, 3, 16, 32, 2, 2, projected=False)
    model = llava.build(
        llava.Config(text, image, Pixels(16, 16), reader.token_id("<image>"), feature_layers=(-1,), full=True)
    )
    return sharp(model)


def sharp(model: llava.Llava) -> llava.Llava:
    for parameter in model.parameters():
        parameter.data.mul_(8 if parameter.ndim > 1 else 1)
    return model.eval()


@pytest.fixture(scope="module")
def tiler(reader: Tokenizer) -> smolvlm.SmolVLM:
    """Return a toy that reads a picture as several tiles."""
    torch.manual_seed(5)
    text = llama.Config(reader.vocab_size, 800, 24, 40, 2, 4, 2)
    config = smolvlm.Config(text, siglip.Config(16, 4, 3, 16, 32, 2, 2), Tiles(32, 16), reader.token_id("<image>"), 2)
    sharp(model := smolvlm.build(config))
    return model


def picture(seed: int, width: int = 23, height: int = 16) -> Image.Image:
    numbers = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(numbers)


def asked(reader: Tokenizer, model: Any, text: str, *seeds: int) -> ImagePrompt:
    messages = [{"role": "user", "content": text, "images": [picture(seed) for seed in seeds]}]
    found = render(reader, messages, model.config)
    assert isinstance(found, ImagePrompt)
    return found


@torch.no_grad()
def whole(model: llava.Llava, prompt: ImagePrompt, count: int = 8) -> list[int]:
    """Return greedy tokens, each by a pass over the whole sequence."""
    made = InsertedImages(prompt, model.config)
    ready = preprocessing(model.config)
    pixels = ready.normalised(torch.cat([ready.tiles(image) for image in prompt.images])) if prompt.images else None
    tokens = torch.tensor([made.tokens])
    for _ in range(count):
        logits = model(tokens[:, : len(made.tokens)], pixels=pixels) if tokens.shape[1] == len(made.tokens) else None
        if logits is None:
            inserted = None
            if pixels is not None:
                inserted = model.insertion(tokens[:, : len(made.tokens)], model.encode_images(pixels))
            logits = model.logits(model.hidden(tokens, inserted=inserted))
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(made.tokens) :].tolist()


def tokens_of(model: llava.Llava, prompts: Sequence[Any], **settings: Any) -> list[list[int]]:
    engine = Engine(model, None, **settings)
    for prompt in prompts:
        engine.add(engine.request(prompt, GREEDY))
    found: list[list[int]] = [[] for _ in prompts]
    while engine.work:
        for piece in engine.step():
            found[piece.index].append(piece.token)
    return found


def test_the_engine_writes_what_the_whole_sequence_gives(reader, seer) -> None:
    prompts = [asked(reader, seer, "What?", 1), asked(reader, seer, "What is it?", 2, 3), asked(reader, seer, "Who?")]
    expected = [whole(seer, prompt) for prompt in prompts]
    assert expected[0] != expected[1]
    assert [tokens_of(seer, [prompt])[0] for prompt in prompts] == expected
    assert tokens_of(seer, prompts) == expected
    assert tokens_of(seer, prompts, step_tokens=7, max_running=3) == expected  # chunks end within a picture
    small = TorchRunner(seer, 11, 8)  # preemption: the blocks of all do not fit
    assert tokens_of(seer, prompts, runner=small, max_running=3) == expected


def test_tiles_are_written_into_the_prompt(reader, tiler) -> None:
    prompts = [asked(reader, tiler, "What?", seed) for seed in (1, 2)]
    marks = [reader.decode([token], skip_special=False) for token in prompts[0].tokens]
    assert marks.count("<image>") == 5
    text = "".join(marks)
    assert all(name in text for name in ("<row_1_col_1><image>", "<row_2_col_2><image>\n\n", "<global-img><image>"))
    expected = [whole(tiler, prompt) for prompt in prompts]
    assert expected[0] != expected[1]
    assert tokens_of(tiler, prompts, step_tokens=50, max_running=2) == expected
    with pytest.raises(UserError, match=r"The prompt has .* tokens, but the context is 800: shorten it"):
        asked_for = asked(reader, tiler, "What?", *range(9))
        InsertedImages(asked_for, tiler.config)


def test_pictures_share_blocks_by_their_content(reader, seer) -> None:
    """Two pictures have the same token ids: without their content in the hash the second one would get the first's."""
    same, other = asked(reader, seer, "What is it?", 1), asked(reader, seer, "What is it?", 2)
    assert same.tokens == other.tokens
    engine = Engine(seer, reader)
    found, cached = [], []
    for prompt in (same, other, same):
        request = engine.request(prompt, GREEDY)
        engine.add(request)
        tokens = []
        while engine.work:
            tokens += [piece.token for piece in engine.step()]
        found.append(tokens)
        cached.append(request.cached)
    assert found == [whole(seer, same), whole(seer, other), whole(seer, same)]
    assert found[0] != found[1]
    size = engine.runner.block_size
    mark = next(place for place, token in enumerate(same.tokens) if token == seer.config.image_token)
    assert cached[1] <= mark < size * (len(engine.request(same, GREEDY).prompt) // size) <= cached[2] + size


def test_a_conversation_keeps_its_pictures(reader, seer) -> None:
    talk = Conversation(seer, reader)
    first = "".join(talk.reply("What?", images=[picture(1)], temperature=0, max_tokens=5))
    "".join(talk.reply("And now?", temperature=0, max_tokens=5))
    assert len(talk.messages) == 4 and len(talk.messages[0]["images"]) == 1
    assert talk.take_back()["content"] == "And now?"
    message = talk.take_back()
    again = Conversation(seer, reader)
    assert "".join(again.reply("What?", images=message["images"], temperature=0, max_tokens=5)) == first


@pytest.mark.parametrize("images", [["a.png"], "a.png", 5, None])
def test_a_saved_message_with_images_that_are_no_pictures_is_refused(reader, seer, images) -> None:
    talk = Conversation(seer, reader)
    with pytest.raises(UserError, match="The images of a message are .* no pictures: remove that field"):
        talk.restore([{"role": "user", "content": "What?", "images": images}, {"role": "assistant", "content": "A"}])
    assert talk.messages == []
    talk.restore([{"role": "user", "content": "What?", "images": [picture(1)]}, {"role": "assistant", "content": "A"}])
    assert len(talk.messages) == 2


def test_the_identity_of_a_prompt_is_made_once(reader, seer) -> None:
    made = InsertedImages(asked(reader, seer, "What?", 1), seer.config)
    prompt = made.identity(made.tokens)
    assert made.identity(made.tokens) is prompt and min(prompt) < 0
    assert made.identity([*made.tokens, 7, 8], len(prompt) - 1) == [*prompt, 7, 8]
    longer = [*made.tokens, 7, 8]
    assert made.identity(longer, len(prompt)) is longer


def test_python_takes_files(reader, seer, tmp_path: Path) -> None:
    for seed in (1, 2):
        picture(seed).save(tmp_path / f"{seed}.png")
    found = [
        keifu.generate(seer, reader, "What is it?", images=[tmp_path / f"{seed}.png"], temperature=0, max_tokens=8)
        for seed in (1, 2)
    ]
    alone = [
        generate_batch(seer, reader, [asked(reader, seer, "What is it?", seed)], GREEDY)[0].text for seed in (1, 2)
    ]
    assert found == alone


def test_text_cannot_spell_a_picture(reader, seer) -> None:
    prompt = asked(reader, seer, "What is <image>?", 1)
    assert sum(token == seer.config.image_token for token in prompt.tokens) == 1


def test_what_does_not_fit_is_refused(reader, seer) -> None:
    engine = Engine(seer, reader)
    wrong = asked(reader, seer, "What?", 1)._replace(images=[])
    with pytest.raises(UserError, match="places for 1 pictures, and 0 were given"):
        engine.request(wrong, GREEDY)
    with pytest.raises(UserError, match="17 pictures were given, but a prompt takes at most 16"):
        engine.request(asked(reader, seer, "What?", *range(17)), GREEDY)
    with pytest.raises(UserError, match="The prompt has .* tokens, but the context is 400"):
        engine.request(asked(reader, seer, "x" * 400, 1), GREEDY)
    blind = llama.build(replace(seer.config.text)).eval()
    with pytest.raises(UserError, match="sees no pictures"):
        Engine(blind, reader).request(asked(reader, seer, "What?", 1), GREEDY)
    with pytest.raises(UserError, match="reads text alone"):
        Conversation(blind, reader).reply("What?", images=[picture(1)])
    with pytest.raises(UserError, match="reads text alone"):  # before the file is opened
        generate(blind, reader, "What?", images=["nothing.png"])


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_a_template_of_text_takes_parts(template: str, reader: Tokenizer) -> None:
    plain, seeing = reader.with_chat_template(template), reader.with_chat_template(PICTURES + template)
    talk: list[dict[str, Any]] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert seeing.chat_text(talk) == plain.chat_text(talk)
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}, talk[1]]
    assert seeing.chat_text(parts) == plain.chat_text([{"role": "user", "content": "<image>\nHi"}, talk[1]])
    ids, mask = seeing.render_turns(parts)
    assert ids.count(reader.token_id("<image>")) == 1 and any(mask) and not all(mask)
