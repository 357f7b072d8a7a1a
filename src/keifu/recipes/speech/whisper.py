"""Whisper (Radford et al., 2022) from scratch: speech recognition, trained on sounds with transcripts.

Paper: "Robust Speech Recognition via Large-Scale Weak Supervision": 680,000 hours, windows of 30 seconds, AdamW, 2^20
updates of 256 windows, a rate that increases for 2,048 updates and decreases to zero. Here: windows of 3 seconds, a
model of about a million parameters, and digits that espeak-ng speaks (synthetic speech; Debian's package espeak-ng).
Transcripts have no time tokens.
Command: keifu train whisper --data spoken-digits
Cost: printed before it starts, measured on the machine.
Expected: see docs/results.md, "Learning to hear".
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn

from keifu.data.audio.recordings import hear, read_recordings
from keifu.data.epochs import OwnBatches
from keifu.data.padding import stack_rows
from keifu.data.tokenizers.bpe import byte_level_backend
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.devices import choose
from keifu.errors import UserError, shell
from keifu.evaluation.text.transcription import word_errors, words
from keifu.inference.speech.rules import NO_TIMESTAMPS, SPECIAL, speech_tokens
from keifu.models.speech import whisper
from keifu.ranges import BelowOne, Count
from keifu.recipes.assistant.finetuning import held_out
from keifu.recipes.training_options import TrainingOptions
from keifu.training.job import Job, Jobs, RunFacts, parameters
from keifu.training.objectives.language_modeling import transcription
from keifu.training.protocols import Batch, LossOutput, Objective
from keifu.training.settings import Settings

LEARNING = Settings(
    steps=1000, batch_size=32, learning_rate=1e-3, warmup=100, schedule="linear", final_ratio=0.0, weight_decay=0.1,
    betas=(0.9, 0.98), epsilon=1e-6, evaluate_every=100, save_every=100,
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Options of the run."""

    data: str = "spoken-digits"
    """spoken-digits (made by espeak-ng), or a folder with sound files and metadata.jsonl (file_name, text; and speaker,
    "part": "test")."""
    held_out: BelowOne = 0.1
    """Share of the speakers, or of the recordings, that is kept for validation, chosen by a hash of the name."""
    vocab_size: Count = 512
    """Tokens of the tokenizer that is learned from the transcripts, at least 261; few words need fewer."""
    model: whisper.Config = whisper.Config(
        context_length=32, audio_length=150, dim=128, hidden_dim=512, n_layers=2, n_heads=4
    )
    """The model; vocabulary and special tokens are the tokenizer's. A window has audio-length / 50 seconds."""
    training: TrainingOptions = LEARNING
    """Settings of the training loop."""


def learn_tokenizer(texts: Iterable[str], vocab_size: int, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """Train a byte-level BPE on transcripts. The ids of its special tokens, the last being `<|notimestamps|>`, follow
    those of text.

    vocab_size: number of text and special tokens; at least 256 bytes and the special tokens. Its models write no
    times.
    """
    learned = train_tokenizer("bpe", texts, max(vocab_size - len(special), 256) + 1)
    parts = learned.description()["model"]
    vocabulary = {token: number - 1 for token, number in parts["vocab"].items() if number}
    backend = byte_level_backend(vocabulary, map(tuple, parts["merges"]))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    ends = {f"{role}_token": special[0] for role in ("bos", "eos", "pad")}
    settings = {"no_timestamps_token_id": backend.token_to_id(NO_TIMESTAMPS), "return_timestamps": False}
    return Tokenizer(backend, ends, generation_config=settings | {"is_multilingual": False})


def counting_errors(tokenizer: Tokenizer, begin: int, tokens_per_word: float) -> Objective:
    """Return the loss of transcripts. In validation it also counts word errors of generated transcripts.

    begin: number of tokens that begin each transcript. tokens_per_word: of the validation data, since figures are means
    over tokens.
    """

    def loss(model: Any, batch: Batch) -> LossOutput:
        output = transcription(model, batch)
        if model.training:
            return output
        longest = batch["target"].shape[1]
        state = model.listen(batch["features"], longest)
        tokens = said_so_far = batch["target"][:, :begin]
        while state.length < longest:
            tokens = model.logits(model.hidden(tokens, state)[:, -1:]).argmax(-1)
            said_so_far = torch.cat([said_so_far, tokens], 1)
        pairs = zip(*(map(said, rows.tolist()) for rows in (said_so_far, batch["target"])), strict=True)
        wrong = sum(word_errors(*pair) for pair in pairs) * tokens_per_word
        return output._replace(figures={"word_error_rate": output.total.new_tensor(wrong)})

    def said(row: list[int]) -> list[str]:
        """Return the words up to the end of a transcript."""
        return words(tokenizer.decode(row[: [*row, tokenizer.eos_id].index(tokenizer.eos_id)]))

    return loss


def prepare(recipe: Recipe) -> tuple[nn.Module, Objective, OwnBatches, Tokenizer]:
    """Read the recordings, learn the tokenizer and build the model."""
    recordings, _ = read_recordings(recipe.data)
    learned, validation = held_out(range(len(recordings)), [clip.speaker for clip in recordings], recipe.held_out)
    tokenizer = learn_tokenizer([" " + recordings[number].text for number in learned], recipe.vocab_size)
    end, start = (tokenizer.token_id(token) for token in SPECIAL[:2])
    config = replace(recipe.model, vocab_size=tokenizer.vocab_size, start_id=start, end_id=end, pad_id=end)
    prompt = speech_tokens(config, tokenizer).prompt(None, "transcribe")
    ids = [[*prompt, *tokenizer.encode(" " + clip.text), end] for clip in recordings]
    if (most := max(map(len, ids)) - 1) > config.context_length:
        raise UserError(f"A transcript has {most} tokens: set --model.context-length to at least that.")
    features = torch.stack([hear(clip, config.n_mels, 2 * config.audio_length) for clip in recordings])
    target, mask = stack_rows(ids, end)
    source = {"features": features, "target": target, "target_mask": mask}
    data = OwnBatches(source, recipe.training.batch_size, recipe.training.seed, validation)
    said = sum(len(words(recordings[number].text)) for number in validation)
    per_word = sum(len(ids[number]) - 1 for number in validation) / max(1, said)
    torch.manual_seed(recipe.training.seed)
    return whisper.build(config).to(choose()), counting_errors(tokenizer, len(prompt), per_word), data, tokenizer


def jobs(recipe: Recipe) -> Jobs:
    """Yield the training, whose result keifu transcribe, keifu evaluate and transformers read."""
    model, objective, data, tokenizer = prepare(recipe)
    counts = {"recordings to learn from": len(data.training), "held out": len(data.held_out)}
    facts = RunFacts(
        title="Whisper",
        about={"parameters": parameters(model), "paper": "Radford et al., Robust Speech Recognition (2022)"},
        data={"source": recipe.data, **counts},
        options={"model": vars(model.config), "data": recipe.data, "held_out": recipe.held_out},
    )
    summary = yield Job(
        model=model, objective=objective, data=data, settings=recipe.training, tokenizer=tokenizer, facts=facts
    )
    print(f"The model is in {summary.directory}: keifu transcribe {shell(summary.directory)} FILE")
