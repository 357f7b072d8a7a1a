"""The ranges of numbers that can be set, by name: options of the command line and of recipes, and settings from Python.

A name means the same kind of number wherever it stands. What depends on other settings is checked beside them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from keifu.errors import UserError

LARGEST = 2**31 - 1  # of whole numbers that count something
LIMIT = 10**6  # of numbers that scale logits, guidance or penalties: float32 has to hold their products


@dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, without `least` itself where `above`, without `most` where `below`, only whole
    ones where `whole`, and 0 too where `or_zero`."""

    least: float | int
    most: float | int
    above: bool = False
    below: bool = False
    whole: bool = False
    or_zero: bool = False
    note: str = ""

    def holds(self, value: Any) -> bool:
        """Whether a value is such a number."""
        kind: Any = Integral if self.whole else Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        inside = self.least <= value <= self.most
        excluded = (self.above and value == self.least) or (self.below and value == self.most)
        return inside and not excluded or (self.or_zero and value == 0)

    def __str__(self) -> str:
        kind = "0 or " * self.or_zero + ("a whole number" if self.whole else "a number")
        low = f"above {self.least:,}" if self.above else f"from {self.least:,}"
        high = f"below {self.most:,}" if self.below else f"{'and at most' if self.above else 'to'} {self.most:,}"
        return f"{kind} {low} {'and ' if self.below else ''}{high}{self.note}"


COUNT = Range(1, LARGEST, whole=True)
FROM_ZERO = Range(0, LARGEST, whole=True)
SEED = Range(0, 2**63 - 1, whole=True)
FINITE = Range(-LIMIT, LIMIT)
AT_LEAST_ZERO = Range(0, 10**12)
POSITIVE = Range(0, 10**12, above=True)
SHARE = Range(0, 1)
POSITIVE_SHARE = Range(0, 1, above=True)
BELOW_ONE = Range(0, 1, below=True)

_NAMES = {
    COUNT: """
        attention_dim autoencoder_batch autoencoder_steps autoencoder_widths average band batch_ramp batch_size
        batch_stages beam best_of candidates channels clip_batch clip_steps code_dim codebook_size context_dim
        context_length cut decay_steps decoder_hidden_dim digits dim each embedding_dim group head_dim heads hidden
        hidden_dim image_size keep kernel latent_channels layers length limit log_every max_tokens max_updates
        maxout_dim micro_batch minibatches most multipliers n_decoder_heads n_decoder_layers n_heads n_kv_heads n_layers
        nearest noise_steps of original_context_length patch_size pods prior_heads prior_layers prior_steps
        processes prompt prompts queue residual_blocks rewind rollouts sentinels shard size sliding_window slots small
        steps streams target_vocab_size tensor terms threads time_limit tokens tokens_per_batch type_vocab_size
        upsampler_widths upsampling_steps vae_batch vae_steps vae_widths vocab_size width widths
        """,
    FROM_ZERO: """
        attention by_shots end_id evaluate_every first_window_layer guesses hold pad_id rank restarts sample_every
        save_every shift shots skip start_id text_rank tile
        """,
    SEED: "seed",
    FINITE: "alpha guidance prior_guidance",
    AT_LEAST_ZERO: """
        autoencoder_rate beta brightness clip contrast crop edges epsilon kl_coef kl_weight learning_rate lm_weight
        matrix_rate missing_eos_penalty norm_eps rate_shares rise rotation saturation text_weight vae_rate value_clip
        value_rate warmup weight weight_decay z_loss
        """,
    POSITIVE: """
        attention_factor autoencoder_minutes beta_fast beta_slow clip_minutes epochs factor gamma high_freq_factor
        keep_alive logit_scale low_freq_factor minutes mscale mscale_all_dim rate rope_theta timeout vae_minutes
        """,
    SHARE: """
        anneal discount eta final_ratio gae_lambda guidance_rescale prefix share shares short
        """,
    POSITIVE_SHARE: "evaluate_share strength",
    BELOW_ONE: """
        activation_dropout attention_dropout betas caption_dropout classifier_dropout dropout ema held_out image_dropout
        label_dropout label_smoothing momentum prior_dropout text_dropout
        """,
}
RANGES = {name: kind for kind, names in _NAMES.items() for name in names.split()} | {
    "count": Range(1, 1_000_000, whole=True),
    "depth": Range(1, 1000, whole=True),
    "logit_bias": Range(-LIMIT, LARGEST),
    "top_log_probabilities": Range(0, 20, whole=True),
    "temperature": Range(1e-6, LIMIT, or_zero=True, note=" (0: always the likeliest token)"),
    "top_k": Range(0, LARGEST, whole=True, note=" (0: all tokens)"),
    "top_p": Range(0, 1, above=True, note=" (1: all tokens)"),
    "min_p": Range(0, 1, note=" (0: all tokens)"),
    "repetition_penalty": Range(1e-6, LIMIT, note=" (1 changes nothing)"),
    "port": Range(0, 65_535, whole=True),
    "presence_penalty": Range(-LIMIT, LIMIT, note=" (0 changes nothing)"),
    "frequency_penalty": Range(-LIMIT, LIMIT, note=" (0 changes nothing)"),
}


def check(values: Mapping[str, Any], label: Callable[[str], str] = str) -> None:
    """A `UserError` for the first value outside the range of its name, which `label` writes as the user knows it.

    Names without a range, and values of None, are not looked at; of a tuple, each number in it is.
    """
    for name, value in values.items():
        allowed = RANGES.get(name)
        if allowed and value is not None and not all(allowed.holds(each) for each in _numbers(value)):
            raise UserError(f"{label(name)} must be {allowed}, and it is {value!r}.")


def _numbers(value: Any) -> Iterator[Any]:
    """Return the value itself; of a tuple or list everything in it but texts, which stand beside numbers there."""
    if not isinstance(value, (tuple, list)):
        yield value
        return
    for each in value:
        if not isinstance(each, str):
            yield from _numbers(each)
