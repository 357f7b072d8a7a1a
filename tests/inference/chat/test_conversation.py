"""Conversations: history, the template, keys and values that are kept, and what happens when something goes wrong."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quick import quick
from torch import nn

from keifu.data.tokenizers.chat_template import CHATML
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.inference.chat import conversation
from keifu.inference.chat.conversation import Conversation
from keifu.layers.attention.attention import Attention
from keifu.layers.attention.kv_cache import KVState
from keifu.models import llama


@pytest.fixture
def chatter(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer whose turns end with <|im_end|>."""
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return Tokenizer(tokenizer.backend, special, chat_template=CHATML)


class Counting(nn.Module):
    """A model that counts the tokens it is given."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner, self.config, self.read = inner, inner.config, 0

    def hidden(self, tokens: torch.Tensor, state: Any, padding: None = None) -> torch.Tensor:
        self.read += tokens.shape[1]
        return self.inner.hidden(tokens, state, padding)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner.logits(hidden)

    def new_state(self, rows: int, capacity: int) -> KVState:
        return self.inner.new_state(rows, capacity)


def toy(window: int | None = None) -> Counting:
    torch.manual_seed(5)
    config = llama.Config(
        vocab_size=261,
        context_length=400,
        dim=24,
        hidden_dim=40,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        sliding_window=window,
    )
    model = llama.build(config)
    for parameter in model.parameters():
        parameter.data.mul_(12 if parameter.ndim > 1 else 1)
    return Counting(model.eval())


def test_history_follows_the_template(script: Any, chatter: Tokenizer) -> None:
    answer = [*chatter.encode("はい。"), chatter.eos_id]
    asked = chatter.render_chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    talk = Conversation(script(answer, asked=len(asked)), chatter, system="Be brief.")
    assert list(talk.reply("Hi", temperature=0)) == list("はい。")
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    assert talk.messages[-1]["content"] == "はい。"
    assert talk.finish_reason == "stop"
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be brief."}]
    assert Conversation(talk.model, chatter).messages == []


def test_thoughts_are_apart_and_old_ones_are_the_templates_matter(script: Any, chatter: Tokenizer) -> None:
    opens = "{% if add_generation_prompt and enable_thinking %}<think>\n{% endif %}"
    thinker = chatter.with_chat_template(CHATML + opens)
    asked = thinker.render_chat([{"role": "user", "content": "Hi"}], enable_thinking=True)
    answer = [*thinker.encode("So.</think>\nYes."), thinker.eos_id]
    talk = Conversation(script(answer, asked=len(asked)), thinker, options={"enable_thinking": True})
    assert "".join(talk.reply("Hi", temperature=0)) == "So.</think>\nYes." and talk.thinking
    assert talk.messages[-1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "So."}
    assert "So." not in thinker.chat_text(talk.messages)
    with pytest.raises(UserError, match="has no option enable_thinking"):
        Conversation(toy(), chatter, options={"enable_thinking": True})


def test_thoughts_between_special_tokens_are_apart_too(script: Any) -> None:
    """Gemma 4's marks of thoughts are tokens that a decoder leaves out."""
    control = ["<|im_start|>", "<|im_end|>", "<|channel>", "<channel|>"]
    backend = train_tokenizer("bpe", ["ab"], 261, special_tokens=control).backend
    template = CHATML + "{# <|channel>thought\n<channel|> #}"
    thinker = Tokenizer(backend, {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, chat_template=template)
    asked = thinker.render_chat([{"role": "user", "content": "Hi"}])
    answer = [*thinker.encode("<|channel>thought\nSo.\n<channel|>Yes.", allow_special=True), thinker.eos_id]
    talk = Conversation(script(answer, asked=len(asked)), thinker)
    assert "".join(talk.reply("Hi", temperature=0)) == "<|channel>thought\nSo.\n<channel|>Yes."
    assert talk.messages[-1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "So."}


def test_what_it_is_told_changes_and_what_was_said_stays(chatter: Tokenizer) -> None:
    talk = Conversation(toy(), chatter)
    list(talk.reply("Hi", max_tokens=3))
    said = talk.messages
    talk.instruct("Be brief.")
    assert talk.messages == [{"role": "system", "content": "Be brief."}, *said]
    talk.instruct("Be long.")
    assert talk.messages == [{"role": "system", "content": "Be long."}, *said]
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "Be long."}]
    talk.instruct(None)
    assert talk.messages == []


def test_a_conversation_that_is_restored_goes_on_as_if_never_left(chatter: Tokenizer) -> None:
    model = toy()
    talk = Conversation(model, chatter, "Be brief.")
    list(talk.reply("Hi", max_tokens=5))
    again = Conversation(model, chatter)
    list(again.reply("Something else", max_tokens=5))
    again.restore(talk.messages)
    assert again.system == "Be brief."
    assert list(again.reply("More", max_tokens=5)) == list(talk.reply("More", max_tokens=5))
    assert again.messages == talk.messages
    before = again.messages
    with pytest.raises(UserError, match="There is no message to render"):
        again.restore([])
    assert again.messages == before


def test_a_conversation_is_restored_with_the_variables_of_its_template(chatter: Tokenizer) -> None:
    needs = "{% if enable_thinking is not defined %}{{ raise_exception('unset') }}{% endif %}" + str(
        chatter.chat_template
    )
    talk = Conversation(toy(), chatter.with_chat_template(needs), options={"enable_thinking": False})
    talk.restore([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}])
    assert len(talk.messages) == 2


@pytest.mark.parametrize(("window", "temperature"), quick(product([None, 6], [0.0, 1.0])))
def test_turns_equal_those_of_a_model_that_reads_all_again(
    chatter: Tokenizer, window: int | None, temperature: float
) -> None:
    model = toy(window)
    kept, fresh = Conversation(model, chatter), Conversation(model, chatter)
    for turn, text in enumerate(["Hello", "Tell me more", "一つだけ", "", "Hello"]):
        options = {"max_tokens": 20 + 15 * (turn % 2), "temperature": temperature, "seed": turn}
        answer = "".join(kept.reply(text, **options))
        other = Conversation(model, chatter)
        other.messages = list(fresh.messages)
        assert "".join(other.reply(text, **options)) == answer
        fresh = other
    assert kept.messages == fresh.messages


def test_a_turn_reads_only_what_is_new(script: Any, chatter: Tokenizer) -> None:
    """What earlier turns left is not read again, as long as the new layout begins with the same tokens."""
    said = [*chatter.encode("ok"), chatter.eos_id]
    model = Counting(script(said))
    talk, read = Conversation(model, chatter), []
    for text in ("Hello there", "And you?"):
        layout = chatter.render_chat([*talk.messages, {"role": "user", "content": text}])
        model.inner.asked = len(layout)
        assert "".join(talk.reply(text, temperature=0)) == "ok"
        read.append(len(layout) + len(said) - 1)  # the layout and the answer, whose last token is never fed back
        assert model.read == read[-1]  # in all turns together


def test_a_changed_history_is_read_from_where_it_changed(chatter: Tokenizer) -> None:
    model = toy()
    talk = Conversation(model, chatter)
    list(talk.reply("Hello there", max_tokens=12, seed=1))
    talk.messages[1] = {"role": "assistant", "content": "Something else"}
    answer = "".join(talk.reply("Go on", max_tokens=12, seed=2))
    other = Conversation(model, chatter)
    other.messages = talk.messages[:2]
    assert "".join(other.reply("Go on", max_tokens=12, seed=2)) == answer


def test_a_conversation_that_is_full_says_so_and_loses_nothing(chatter: Tokenizer) -> None:
    talk = Conversation(toy(), chatter)
    list(talk.reply("Hello", max_tokens=5, seed=1))
    before = list(talk.messages)
    length = len(chatter.render_chat([*before, {"role": "user", "content": "x" * 380}]))
    with pytest.raises(UserError, match=rf"has {length} tokens .* context is 400 .*/reset"):
        talk.reply("x" * 380)
    assert talk.messages == before
    assert "".join(talk.reply("Still there?", max_tokens=5, seed=1)) is not None
    assert len(talk.messages) == len(before) + 2


@pytest.mark.parametrize(("over", "refused"), [(-1, False), (0, True), (1, True)])
def test_a_message_leaves_room_for_a_token(over: int, refused: bool, chatter: Tokenizer) -> None:
    """A first message one token shorter than the context, as long, and longer: to start afresh would not help it."""
    room = 400 - len(chatter.render_chat([{"role": "user", "content": ""}]))
    talk, text = Conversation(toy(), chatter), "x" * (room + over)
    if not refused:
        assert [*talk.reply(text, temperature=0)] and len(talk.messages) == 2
        return
    with pytest.raises(UserError) as caught:
        talk.reply(text)
    assert str(caught.value) == (
        f"The conversation has {400 + over} tokens with this message, but this model's context is 400 "
        "and must hold the answer too: write a shorter message."
    )


def test_an_answer_ends_after_the_tokens_of_an_answer(
    script: Any, chatter: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "ANSWER_TOKENS", 7)
    talk = Conversation(script([98]), chatter)
    assert talk.finish_reason is None and not talk.thinking
    assert len("".join(talk.reply("Hi"))) == 7 and talk.finish_reason == "length"
    assert len("".join(talk.reply("Hi", max_tokens=9))) == 9
    talk.restore(talk.messages)
    assert talk.finish_reason is None
    list(talk.reply("Hi"))
    talk.reset()
    assert talk.finish_reason is None


def test_guesses_reach_the_engine_also_after_a_reset(script: Any, chatter: Tokenizer, monkeypatch: Any) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(conversation, "Engine", lambda *_, guesses, folder: seen.append(guesses))
    Conversation(script([98]), chatter, guesses=3).reset()
    assert seen == [3, 3]


def test_the_context_may_fill_up_in_an_answer(chatter: Tokenizer) -> None:
    talk = Conversation(toy(), Tokenizer(chatter.backend, {}, chat_template=CHATML))
    list(talk.reply("x" * 350, temperature=0))
    assert talk.finish_reason == "context"


def test_an_interrupted_answer_stays_as_far_as_it_came(chatter: Tokenizer) -> None:
    model = toy()
    talk = Conversation(model, chatter)
    answer = talk.reply("Hello", max_tokens=60, temperature=1.0, seed=3)
    begun = next(answer) + next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert talk.messages[-1] == {"role": "assistant", "content": begun}
    assert talk.finish_reason is None
    other = Conversation(model, chatter)
    other.messages = list(talk.messages)
    options = {"max_tokens": 10, "temperature": 0.0}
    assert "".join(talk.reply("Go on", **options)) == "".join(other.reply("Go on", **options))


def test_an_interruption_inside_the_model(chatter: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between two layers leaves the step undone: what some layers hold of it is written over."""
    model = toy()
    talk = Conversation(model, chatter)
    before = "".join(talk.reply("Hello", max_tokens=10, seed=1))
    plain = Attention.forward
    calls = iter(range(10**6))

    def interrupted(layer: Any, *given: Any, **options: Any) -> Any:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return plain(layer, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Attention, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(talk.reply("Go on", max_tokens=10, seed=1))
    assert [message["content"] for message in talk.messages] == ["Hello", before]
    other = Conversation(model, chatter)
    other.messages = list(talk.messages)
    options = {"max_tokens": 10, "temperature": 0.0}
    assert "".join(talk.reply("Go on", **options)) == "".join(other.reply("Go on", **options))


def test_a_message_cannot_spell_the_end_of_its_turn(script: Any, chatter: Tokenizer) -> None:
    talk, prompts = Conversation(script([98]), chatter), []
    plain = talk.engine.add
    talk.engine.add = lambda request: prompts.append(request.prompt) or plain(request)  # type: ignore[method-assign]
    list(talk.reply("a<|im_end|>b", max_tokens=1))
    assert prompts[0].count(chatter.eos_id or 0) == 1


def test_no_template(script: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="no chat template"):
        Conversation(script([98]), tokenizer).reply("Hello")


def test_the_last_message_is_taken_back_and_no_earlier_one() -> None:
    turns = [{"role": role, "content": f"{role} {turn}"} for turn in range(3) for role in ("user", "assistant")]
    talk: Any = SimpleNamespace(messages=[{"role": "system", "content": "s"}, *turns])
    assert Conversation.take_back(talk)["content"] == "user 2"
    assert talk.messages == [{"role": "system", "content": "s"}, *turns[:4]]
    talk.messages = talk.messages[:1]
    with pytest.raises(UserError, match="^There is no message to answer again: ask something first.$"):
        Conversation.take_back(talk)
