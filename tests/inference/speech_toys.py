"""A Whisper with random weights and windows of one second, and its tokenizer."""

from typing import Any

import torch

from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.recipes.speech.whisper import learn_tokenizer

SPECIAL = (
    "<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|ja|>", "<|translate|>", "<|transcribe|>", "<|startofprev|>",
    "<|nospeech|>", "<|notimestamps|>",
)  # fmt: skip
TIMES = 51


def tokenizer(several: bool = True) -> Tokenizer:
    """Train a byte-level BPE with Whisper's special tokens after its text tokens."""
    learned = learn_tokenizer(["one two three four five six"] * 3, 265, SPECIAL)
    ids = {token: learned.token_id(token) for token in SPECIAL}
    settings: dict[str, Any] = {
        "no_timestamps_token_id": ids["<|notimestamps|>"], "suppress_tokens": [3, 4, ids["<|startofprev|>"]],
        "begin_suppress_tokens": [5, ids["<|endoftext|>"]], "max_initial_timestamp_index": 20,
        "is_multilingual": several,
    }  # fmt: skip
    if several:
        settings |= {"lang_to_id": {name: ids[name] for name in ("<|en|>", "<|ja|>")}}
        settings |= {"task_to_id": {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")}}
    return learned.replace(generation_config=settings)


def published(words: Tokenizer, seed: int) -> Any:
    """Return transformers' model for this tokenizer, with random weights."""
    import transformers

    torch.manual_seed(seed)
    end, start = (words.token_id(token) for token in SPECIAL[:2])
    config = transformers.WhisperConfig(
        vocab_size=words.token_id(SPECIAL[-1]) + 1 + TIMES, num_mel_bins=8, max_source_positions=50,
        max_target_positions=40, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, pad_token_id=end, bos_token_id=end,
        eos_token_id=end, decoder_start_token_id=start, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model: Any = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.2)
    model.generation_config.max_length = 40
    for name, value in words.generation_config.items():
        setattr(model.generation_config, name, value)
    return model
