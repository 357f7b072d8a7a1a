"""Promise 2: token by token equals the whole sequence, in a padded batch equals alone, a seed belongs to a request."""

import gc
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generation_toys import TOYS, TWO, of_kinds_of_memory, of_two_models
from scored import score_sampled
from torch import nn

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.errors import UserError
from keifu.inference.text.engine import Engine
from keifu.inference.text.generate import Completion, generate_batch, stream
from keifu.inference.text.likelihood import score
from keifu.inference.text.model import causal, evaluation_mode
from keifu.inference.text.runner import TorchRunner
from keifu.inference.text.sampling_params import SamplingParams

SLOW = [pytest.mark.slow]
EVERYTHING = SamplingParams(
    temperature=0.8,
    top_k=60,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=-0.2,
    max_tokens=29,
    seed=11,
    log_probabilities=True,
)
PLAIN = SamplingParams(max_tokens=31, seed=5, log_probabilities=True)
GREEDY = SamplingParams(temperature=0, max_tokens=24, seed=0, log_probabilities=True)

SAMPLINGS = {"plain": PLAIN, "everything": EVERYTHING, "greedy": GREEDY}
QUICK = {("plain", 1), ("everything", 23)}  # the others are marked slow


def is_quick(toy: str, name: str, length: int) -> bool:
    """Whether a case is not marked slow: of every toy there is one."""
    return (name, length) in QUICK and (name == "plain" or toy in TWO)


SAMPLED = [
    pytest.param(toy, SAMPLINGS[name], length, id=f"{toy}-{name}-{length}",
                 marks=[] if is_quick(toy, name, length) else SLOW)
    for toy in TOYS for name in SAMPLINGS for length in (1, 4, 23)
]  # fmt: skip


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(5, 261, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def close(ours: list[float] | None, theirs: torch.Tensor | list[float] | None, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs), atol=atol, rtol=1e-5)


def skip_angles_by_length(model: nn.Module) -> None:
    """Skip a model whose angles depend on length. Generation keeps the angles of the prompt, but scoring does not."""
    if TorchRunner(causal(model), 1, 1).by_length:
        pytest.skip("the angles depend on the length of what is read at once")


def same(a: Completion, b: Completion) -> None:
    """Assert that everything is equal, log-probabilities to 1e-5."""
    assert replace(a, log_probabilities=None, sampled_log_probabilities=None) == replace(
        b, log_probabilities=None, sampled_log_probabilities=None
    )
    close(a.log_probabilities, b.log_probabilities)
    close(a.sampled_log_probabilities, b.sampled_log_probabilities)


@pytest.mark.parametrize(("model", "sampling", "length"), SAMPLED, indirect=["model"])
def test_a_generated_text_scored_in_one_pass_has_its_log_probabilities(
    model: nn.Module, tokenizer: Tokenizer, sampling: SamplingParams, length: int
) -> None:
    skip_angles_by_length(model)
    [written] = generate_batch(model, tokenizer, [prompt(length)], sampling)
    text = torch.tensor(prompt(length) + written.tokens)
    close(written.log_probabilities, score(model, text[None])[0, length - 1 :])
    # Penalties and a temperature below 1 widen logits of float32, and with them what rounding does.
    close(written.sampled_log_probabilities, score_sampled(model, text, length, sampling), atol=5e-5)


@of_two_models
def test_models_are_sharp_enough_for_these_tests(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Neither certain of a token nor blind to what came before it."""
    [one, two] = (generate_batch(model, tokenizer, [prompt(9, seed)], GREEDY)[0] for seed in (0, 1))
    assert one.tokens != two.tokens and one.log_probabilities is not None
    assert -4 < sum(one.log_probabilities) / len(one.tokens) < -0.05


@of_kinds_of_memory
@pytest.mark.parametrize("chunks", [(1, 16), pytest.param((5,), marks=SLOW)])
def test_prompts_read_in_chunks_give_the_same(
    model: nn.Module, tokenizer: Tokenizer, chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, some = [prompt(23), prompt(7), prompt(31)], replace(PLAIN, max_tokens=8)
    whole = generate_batch(model, tokenizer, prompts, some)
    for chunk in chunks:
        monkeypatch.setattr("keifu.inference.text.generate.PREFILL_TOKENS", chunk * len(prompts))
        for a, b in zip(generate_batch(model, tokenizer, prompts, some), whole, strict=True):
            same(a, b)


def test_every_request_of_a_ragged_batch_gets_what_it_gets_alone(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Prompts of 1 to 41 tokens, settings that differ, ends at different times; in any order and in any groups."""
    lengths = [7, 1, 41, 23, 7, 2]
    settings = [
        replace(PLAIN, max_tokens=14),  # beyond a block of 16 tokens
        replace(GREEDY, max_tokens=9),
        replace(PLAIN, max_tokens=None, seed=3),
        replace(EVERYTHING, max_tokens=12),
        replace(PLAIN, max_tokens=1),
        replace(PLAIN, max_tokens=17, temperature=1.3, top_k=20, seed=77),
    ]
    prompts = [prompt(length, seed) for seed, length in enumerate(lengths)]
    alone = [generate_batch(model, tokenizer, [p], s)[0] for p, s in zip(prompts, settings, strict=True)]
    assert len({len(c.tokens) for c in alone}) >= 4
    six, mixed = [0, 1, 2, 3, 4, 5], [5, 2, 4, 1, 0, 3]
    for order, size in ((six, 6), (mixed, 2), ([3, 1], 2)):
        chosen = [prompts[i] for i in order], [settings[i] for i in order]
        for i, batched in zip(order, generate_batch(model, tokenizer, *chosen, batch_size=size), strict=True):
            same(batched, alone[i])


@of_two_models
def test_a_seed_decides_and_belongs_to_the_request(model: nn.Module, tokenizer: Tokenizer) -> None:
    def written(seeds: list[int]) -> list[list[int]]:
        prompts = [prompt(5)] * len(seeds)
        done = generate_batch(model, tokenizer, prompts, [replace(PLAIN, temperature=2.0, seed=s) for s in seeds])
        return [completion.tokens for completion in done]

    a, b, again = written([1, 2, 1])
    assert a == again != b
    assert written([2, 9])[0] == b


@of_two_models
def test_a_seed_counts_from_the_start_of_the_text(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Stopped and taken up again with the same seed, a text goes on as if it had never stopped."""
    [whole] = generate_batch(model, tokenizer, [prompt(5)], PLAIN)
    begun, left = whole.tokens[:10], replace(PLAIN, max_tokens=len(whole.tokens) - 10)
    [rest] = generate_batch(model, tokenizer, [prompt(5) + begun], left)
    assert begun + rest.tokens == whole.tokens


@of_two_models
def test_a_fresh_seed_is_reported_and_reproduces(model: nn.Module, tokenizer: Tokenizer) -> None:
    unseeded = replace(PLAIN, seed=None, temperature=2.0)
    [first], [second] = (generate_batch(model, tokenizer, [prompt(5)], unseeded) for _ in range(2))
    assert first.seed != second.seed and first.tokens != second.tokens
    same(generate_batch(model, tokenizer, [prompt(5)], replace(unseeded, seed=first.seed))[0], first)


@of_kinds_of_memory
def test_texts_score_together_as_alone(model: nn.Module) -> None:
    texts = [prompt(30, n) for n in (19, 3, 30)]
    for row, text in zip(score(model, torch.tensor(texts)), texts, strict=True):
        close(row.tolist(), score(model, torch.tensor([text]))[0])


def test_score_is_what_the_logits_say(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.tensor([prompt(40, 1), prompt(40, 2)])
    with torch.inference_mode():
        expected = model(tokens)[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    for chunk in (256, 7):
        monkeypatch.setattr("keifu.inference.text.likelihood.CHUNK", chunk)
        torch.testing.assert_close(score(model, tokens), expected, atol=1e-5, rtol=1e-5)


@of_two_models
def test_score_with_settings_in_chunks(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties count over the borders of chunks, and what the settings exclude is impossible."""
    text = torch.tensor(prompt(40) + prompt(20))
    whole = score_sampled(model, text, 5, EVERYTHING)
    assert whole.isinf().any() and whole.isfinite().any()
    monkeypatch.setattr("keifu.inference.text.likelihood.CHUNK", 3)
    torch.testing.assert_close(score_sampled(model, text, 5, EVERYTHING), whole, atol=1e-5, rtol=1e-5)


@of_two_models
def test_bad_lengths_to_score(model: nn.Module) -> None:
    with pytest.raises(UserError, match="The text has 68 tokens, but this model's context is 67"):
        score(model, torch.tensor([prompt(68)]))
    assert score(model, torch.tensor([[7], [8]])).shape == (2, 0)
    assert score_sampled(model, torch.tensor([7]), 1, PLAIN).shape == (0,)
    with pytest.raises(UserError, match="prompt's length is 0, which must be from 1 to the text's 8"):
        score_sampled(model, torch.tensor(prompt(8)), 0, PLAIN)


@of_two_models
def test_tokens_without_a_tokenizer(model: nn.Module, tokenizer: Tokenizer) -> None:
    prompts = [prompt(6, 1), prompt(6, 2)]
    done = generate_batch(model, tokenizer, prompts, GREEDY)
    found = generate_batch(model, None, prompts, GREEDY)
    assert found[0].tokens[: len(done[0].tokens)] == done[0].tokens
    assert [(each.text, len(each.tokens), each.finish_reason) for each in found] == [("", 24, "length")] * 2


@of_two_models
def test_dropout_is_off_while_writing_and_modes_come_back(model: nn.Module, tokenizer: Tokenizer) -> None:
    [expected] = generate_batch(model, tokenizer, [prompt(5)], PLAIN)
    model.train()
    model.get_submodule("norm").eval()  # a part that its owner keeps frozen
    modes = [module.training for module in model.modules()]
    same(generate_batch(model, tokenizer, [prompt(5)], PLAIN)[0], expected)
    left = stream(model, tokenizer, [prompt(5)], PLAIN)
    next(left)
    del left  # a reader that goes away early
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ZeroDivisionError), evaluation_mode(model):
        _ = 1 / 0
    assert [module.training for module in model.modules()] == modes


@of_two_models
def test_no_gradient_and_no_mode_leaks_to_who_reads_the_stream(model: nn.Module, tokenizer: Tokenizer) -> None:
    for _ in stream(model, tokenizer, [prompt(5)], PLAIN):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_bfloat16_writes_and_scores_alike(model: nn.Module, tokenizer: Tokenizer) -> None:
    skip_angles_by_length(model)
    [written] = generate_batch(model.bfloat16(), tokenizer, [prompt(9)], replace(PLAIN, max_tokens=12))
    scores = score(model, torch.tensor([prompt(9) + written.tokens]))[0, 8:]
    assert scores.dtype == torch.float32
    difference = (torch.tensor(written.log_probabilities) - scores).abs()
    assert difference.median() < 0.3  # three digits: sharp weights make much of it


def tensor_bytes() -> dict[int, int]:
    """Return the bytes of the memory of each tensor that exists, by its address."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}


@of_kinds_of_memory
def test_the_memory_of_an_engine_is_what_its_scheduler_counts(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Many texts of different lengths, some of which begin alike, some of which are preempted; looked at seldom, as it
    takes longer than a step to find all tensors."""
    gc.collect()
    gc.freeze()  # only what is made from here on is looked at
    engine = Engine(model, tokenizer, TorchRunner(causal(model), 90, 4))
    for number in range(20):
        engine.add(engine.request(prompt(9 + number % 30, number % 7), replace(PLAIN, max_tokens=24, seed=number)))
    counted = engine.runner.n_blocks * engine.runner.block_size * engine.runner.token_bytes
    most, steps = 0, 0
    while engine.work:
        engine.step()
        steps += 1
        if not engine.work or not steps % 12:
            most = max(most, sum(tensor_bytes().values()))
    assert counted <= most <= 1.1 * counted + 20 * 261 * 4 * 12, "what is left are logits and counts of tokens"


@of_two_models
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from /proc")
def test_memory_is_taken_when_it_is_used(model: nn.Module, tokenizer: Tokenizer) -> None:
    """The blocks may take a quarter of the memory; two short texts take little of it."""
    pages = [int(Path("/proc/self/statm").read_text().split()[1])]
    engine = Engine(model, tokenizer)
    assert engine.runner.n_blocks * engine.runner.block_size * engine.runner.token_bytes > 100 << 20
    engine.add(engine.request(prompt(5), replace(PLAIN, max_tokens=10**9)))
    engine.add(engine.request(prompt(9), replace(PLAIN, max_tokens=24)))
    while engine.work:
        engine.step()
    pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert (pages[1] - pages[0]) * resource.getpagesize() < 60 << 20


@of_two_models
def test_streams_that_are_read_in_turn_write_what_each_writes_alone(model: nn.Module, tokenizer: Tokenizer) -> None:
    """Of a model in training mode, some of it frozen in evaluation mode: the first stream to end changes nothing."""
    model.train()
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    samplings = replace(PLAIN, max_tokens=4), replace(PLAIN, max_tokens=24)
    alone = [[piece.token for piece in stream(model, tokenizer, [prompt(9)], each)] for each in samplings]
    assert [module.training for module in model.modules()] == modes
    streams = [stream(model, tokenizer, [prompt(9)], each) for each in samplings]
    together: list[list[int]] = [[], []]
    for _ in range(24):
        for tokens, pieces in zip(together, streams, strict=True):
            tokens += [piece.token for piece in [next(pieces, None)] if piece]
    assert all(next(pieces, None) is None for pieces in streams)
    assert together == alone
    assert [module.training for module in model.modules()] == modes
