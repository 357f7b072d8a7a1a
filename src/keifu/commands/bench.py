"""`keifu bench`: speed of reading prompts and writing text on this machine."""

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from keifu.commands.shared import flags
from keifu.commands.shared.inputs import notice
from keifu.errors import UserError
from keifu.ranges import Count

if TYPE_CHECKING:
    from keifu.inference.text.engine import Engine


@dataclass(frozen=True)
class Options(flags.OnDevice):
    """Measure a language model's tokens per second: in prefill (prompts are read) and in decoding (text is written).

    Prompts are random tokens, and every text is written greedily to its full length, so no tokenizer is needed. Figures
    are totals over all streams. The bandwidth is the rate at which decoding reads the weights and the keys and values.
    The peak is the rate at which the machine reads more numbers than any cache holds.
    """

    model: flags.Model
    weights: str | None = None
    """f32, bf16, int8, int4 or int4_pure weights for the native step; unset: those of the model."""
    streams: Count = 1
    """Texts that are written at the same time."""
    prompt: Count = 512
    """Tokens of a prompt."""
    tokens: Count = 128
    """Tokens that are written after each prompt."""
    guesses: flags.Guesses = 0
    draft: flags.Drafting = None
    threads: Count | None = None
    """Threads of the CPU; unset: as many as there are cores."""
    json: bool = False
    """Print the figures as JSON: prefill and decode in tokens per second, bandwidth and peak in GB/s, memory in bytes,
    and the instruction set of the native step."""


def run(options: Options) -> None:
    """Measure the speeds and print the figures."""
    import torch

    notice(f"Loading {options.model} ...")
    from keifu.checkpoints import load_model
    from keifu.commands.shared.inputs import load_writer, proposer
    from keifu.inference.text.engine import Engine
    from keifu.inference.text.model import device_of, text_model
    from keifu.native.library import instructions_in_use, use_threads
    from keifu.native.model import NativeRunner

    if options.threads is not None:
        torch.set_num_threads(options.threads)
        use_threads(options.threads)
    tokenizer = None
    if options.draft is None:
        model = load_model(options.model, weights=options.weights or "own")
    else:
        model, tokenizer = load_writer(options.model, options.weights)
    context, longest = text_model(model).config.context_length, options.prompt + options.tokens + 1
    if longest > context:
        raise UserError(f"{options.prompt} + {options.tokens + 1} tokens exceed the context of {context}: use fewer.")
    step_tokens = max(512, 33 * options.streams)
    guesses = proposer(options.draft, options.guesses or (0 if options.draft is None else None), options.weights)
    engine = Engine(model, tokenizer, max_running=options.streams, step_tokens=step_tokens, guesses=guesses)
    engine.tokenizer = None  # so that no end token stops a text early
    _check_room(engine, options.streams, longest)
    figures = asdict(options) | {"device": str(device_of(model)), "threads": torch.get_num_threads()}
    figures["instructions"] = instructions_in_use() if isinstance(engine.runner, NativeRunner) else None
    figures |= _speeds(engine, options)
    figures |= _memory(engine, model, options, figures["decode"])
    print(json.dumps(figures) if options.json else _report(figures))


def _check_room(engine: "Engine", streams: int, longest: int) -> None:
    """Raise `UserError` if the keys and values of all streams exceed the memory."""
    runner = engine.runner
    blocks = -(-longest // runner.block_size)
    if streams * blocks > runner.n_blocks:
        raise UserError(
            f"{streams} streams of {longest} tokens need {streams * blocks * runner.block_size * runner.token_bytes:,} "
            f"bytes for keys and values; {runner.n_blocks // blocks} streams fit the memory that is free."
        )


def _speeds(engine: "Engine", options: Options) -> dict[str, Any]:
    """Return tokens per second of prefill and of decoding, after a short run that is not counted."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = options.streams + 1, options.prompt
    warm, *prompts = torch.randint(0, engine.runner.vocab_size, shape, generator=generator).tolist()
    _write(engine, [warm[:32]] * options.streams, 4)
    start = time.perf_counter()
    _write(engine, prompts, 1)
    prefill = options.streams * options.prompt / (time.perf_counter() - start)
    _add(engine, prompts, options.tokens + 1)  # the cache keeps the prompts' keys and values, except the last block
    begun: set[int] = set()
    while len(begun) < options.streams:
        begun |= {piece.index for piece in engine.step()}
    start = time.perf_counter()
    count = 0
    while engine.work:
        count += len(engine.step())
    decode = count / (time.perf_counter() - start)
    return {"prefill": prefill, "decode": decode, "guessed": engine.guessed, "accepted": engine.accepted}


def _add(engine: "Engine", prompts: list[list[int]], tokens: int) -> None:
    from keifu.inference.text.sampling_params import SamplingParams

    for prompt in prompts:
        engine.add(engine.request(prompt, SamplingParams(temperature=0, max_tokens=tokens, seed=0)))


def _write(engine: "Engine", prompts: list[list[int]], tokens: int) -> None:
    _add(engine, prompts, tokens)
    while engine.work:
        engine.step()


def _memory(engine: "Engine", model: Any, options: Options, decode: float) -> dict[str, Any]:
    """Return the bytes of weights and of keys and values, and the bandwidth of decoding next to the machine's peak."""
    from keifu.inference.text.model import device_of
    from keifu.memory import read_bandwidth

    cached = options.streams * (options.prompt + options.tokens) * engine.runner.token_bytes
    weights, idle = _weight_bytes(model, options.streams)
    weight_bytes = weights - idle
    step = (
        weight_bytes + cached - options.streams * options.tokens // 2 * engine.runner.token_bytes
    )  # half of them, on average
    bandwidth, peak = step * decode / options.streams / 1e9, read_bandwidth(device_of(model)) / 1e9
    return {"bandwidth": bandwidth, "peak": peak, "share": bandwidth / peak, "memory": weights + cached}


def _weight_bytes(model: Any, streams: int) -> tuple[int, float]:
    """Return the bytes of weights that a step reads, and the bytes of experts that it skips if all are chosen equally
    often.

    An embedding that is not the head too is not counted, because a step reads only some of its rows.
    """
    from torch import nn

    from keifu.layers.mixture import mixtures
    from keifu.native.model import NativeLM

    if isinstance(model, NativeLM):
        return model.nbytes, model.idle_bytes(streams)
    idle = sum(
        (1 - mixture.router.k / mixture.router.n_experts) ** streams
        * sum(weight.nbytes for weight in mixture.experts.parameters())
        for mixture in mixtures(model).values()
    )
    embeddings = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    rows = sum(embedding.nbytes for embedding in embeddings if embedding is not model.head_weight)
    return sum(x.nbytes for x in (*model.parameters(), *model.buffers())) - rows, float(idle)


def _report(figures: dict[str, Any]) -> str:
    """Return the figures as text for people."""
    streams = "1 stream" if figures["streams"] == 1 else f"{figures['streams']} streams together"
    guessed, accepted = figures["guessed"], figures["accepted"]
    guesses = f"\nguesses    {accepted:,} of {guessed:,} tokens came ({accepted / guessed:.0%})" if guessed else ""
    return (
        f"{figures['model']}, {figures['weights'] or 'its own'} weights, {figures['device']}, {figures['threads']} "
        f"threads, {streams}\n"
        f"prefill    {figures['prefill']:,.1f} tokens/s, prompts of {figures['prompt']}\n"
        f"decode     {figures['decode']:,.1f} tokens/s, {figures['tokens']} after each prompt\n"
        f"bandwidth  {figures['bandwidth']:.1f} GB/s, {figures['share']:.0%} of {figures['peak']:.1f} GB/s\n"
        f"memory     {figures['memory'] / 1e6:,.0f} MB of weights, keys and values{guesses}"
    )
