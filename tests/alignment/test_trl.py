"""Beside TRL, where it is installed: the losses of its DPOTrainer and RewardTrainer, and what its templates mark."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import tokenizers
import torch
import transformers

from keifu.alignment.dpo import Loss, kto_losses, losses
from keifu.alignment.grpo import Variant, sequence_ratios, terms, token_shares
from keifu.alignment.reward_model import ranking_losses
from keifu.data.tokenizers.tokenizer import Tokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.layers.losses.divergence import linear_divergence

trl = pytest.importorskip("trl")


def trainer(**attributes: Any) -> Any:
    """Return a stand-in with the attributes that TRL's methods read of a trainer. It discards what they report."""
    model = SimpleNamespace(training=False)
    same = {name: lambda tensor: tensor for name in ("gather", "gather_for_metrics")}
    accelerator = SimpleNamespace(device=torch.device("cpu"), **same)
    return MagicMock(model=model, accelerator=accelerator, _total_train_tokens=0, _tp_size=1, **attributes)


THEIRS: dict[tuple[Loss, float], str] = {
    ("dpo", 0.0): "sigmoid", ("ipo", 0.0): "ipo", ("normalised", 0.0): "sigmoid_norm", ("robust", 0.1): "robust",
}  # fmt: skip


@pytest.mark.parametrize(("ours", "smoothing"), THEIRS)
def test_dpo_losses(ours: Loss, smoothing: float) -> None:
    torch.manual_seed(2)
    pairs, length, beta = 5, 11, 0.3
    places = torch.arange(length)
    mask = ((places >= 3) & (places < torch.randint(5, length, (2 * pairs, 1)))).long()
    logs = torch.randn(2 * pairs, length - 1) * mask[:, 1:]
    reference = torch.randn(2 * pairs) * 3
    inputs = {
        "input_ids": torch.randint(0, 9, (2 * pairs, length)), "attention_mask": torch.ones_like(mask),
        "completion_mask": mask, "ref_chosen_logps": reference[:pairs], "ref_rejected_logps": reference[pairs:],
    }  # fmt: skip
    figures = {name: torch.zeros(2 * pairs, length - 1) for name in ("entropy", "mean_logits")}
    outputs = SimpleNamespace(log_probs=logs, is_top1=mask[:, 1:] > 0, **figures)
    self = trainer(
        aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", beta=beta,
        label_smoothing=smoothing, loss_types=[THEIRS[ours, smoothing]], loss_weights=[1.0], use_weighting=False,
    )  # fmt: skip
    theirs = trl.DPOTrainer._compute_loss(self, lambda **given: outputs, inputs, False)
    ratios = (logs.sum(1) - reference).view(2, pairs).T
    lengths = mask[:, 1:].sum(1).view(2, pairs).T.float()
    found = losses(ratios, lengths, ours, beta, smoothing)
    torch.testing.assert_close(found.mean(), theirs, rtol=0, atol=1e-6)


def test_losses_without_a_reference() -> None:
    cpo, orpo = pytest.importorskip("trl.experimental.cpo"), pytest.importorskip("trl.experimental.orpo")
    logs, lengths = -torch.rand(5, 2) * 40 - 0.1, torch.randint(1, 20, (5, 2)).float()
    means = (logs / lengths).unbind(1)
    self = trainer(alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=1.5, label_smoothing=0.1)
    theirs = cpo.CPOTrainer.cpo_loss(self, *means)[0]
    torch.testing.assert_close(losses(logs, lengths, "simpo", 1.5, 0.1, 0.7), theirs, rtol=0, atol=1e-6)
    theirs = -means[0] - orpo.ORPOTrainer.odds_ratio_loss(self, *means)[0]
    torch.testing.assert_close(losses(logs, lengths, "orpo", 1.5), theirs, rtol=0, atol=1e-6)


def test_kto_loss() -> None:
    torch.manual_seed(5)
    answers, length, beta = 6, 9, 0.3
    mask, logs = torch.ones(answers, length).long(), torch.randn(answers, length - 1)
    reference, shifted, good = torch.randn(answers), torch.randn(2, answers), torch.tensor([1, 0, 1, 1, 0, 0])
    outputs = SimpleNamespace(log_probs=logs, **{name: torch.zeros_like(logs) for name in ("entropy", "mean_logits")})
    inputs = {
        "input_ids": torch.zeros(answers, length).long(), "attention_mask": mask, "completion_mask": mask,
        "label": good, "ref_logps": reference, "ref_KL_logps": shifted[1],
    }  # fmt: skip
    self = trainer(
        aux_loss_enabled=False, precompute_ref_logps=True, calculate_KL=True, loss_type="kto", beta=beta,
        desirable_weight=1.0, undesirable_weight=1.0, _compute_kl_logps=lambda *given: shifted[0],
    )  # fmt: skip
    theirs = trl.KTOTrainer._compute_loss(self, lambda **given: outputs, inputs, False)
    kl = (shifted[0] - shifted[1]).mean().clamp(min=0).expand(answers)
    found = kto_losses(logs.sum(1) - reference, good.float(), kl, beta)
    torch.testing.assert_close(found.mean(), theirs, rtol=0, atol=1e-6)


def test_reward_loss() -> None:
    scores = torch.randn(7, 2)
    outputs = SimpleNamespace(logits=scores.T.reshape(14, 1))
    self = trainer(args=SimpleNamespace(center_rewards_coefficient=None))
    theirs = trl.RewardTrainer.compute_loss(self, lambda **given: outputs, {"attention_mask": torch.ones(14, 3)})
    found = ranking_losses(scores, torch.tensor([[1.0, 0.0]]).expand(7, 2))
    torch.testing.assert_close(found.mean(), theirs, rtol=0, atol=1e-6)


TALK = [
    {"role": "user", "content": "one two?"}, {"role": "assistant", "content": "three\n\nfour"},
    {"role": "user", "content": "  five"}, {"role": "assistant", "content": "six."},
]  # fmt: skip
ENDS = {"qwen2_5": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
SPECIAL = ["<|im_start|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<bos>", "<start_of_turn>"]


@pytest.mark.parametrize("name", ENDS)
def test_what_is_learned_of_a_conversation(name: str) -> None:
    """Ours by the published template, theirs by the one that TRL has rewritten to mark the assistant's turns.

    Those of qwen and gemma also mark line breaks that no model has to write: the one that belongs to the question for
    an answer, and the one behind the token that ends a turn.
    """
    folder = Path(trl.__file__).parent / "chat_templates"
    published, rewritten = ((folder / f"{name}{end}.jinja").read_text() for end in ("", "_training"))
    learned = train_tokenizer("bpe", ["user assistant one two three four five six system model"] * 9, 300)
    backend = tokenizers.Tokenizer.from_str(learned.backend.to_str())
    backend.add_special_tokens([*SPECIAL, *ENDS.values()])
    roles = {"bos_token": "<bos>" if name == "gemma" else "<|begin_of_text|>", "eos_token": ENDS[name]}
    ours = Tokenizer(backend, roles, frozenset({backend.token_to_id(ENDS[name])}), published, None)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    told = theirs.apply_chat_template(
        TALK, chat_template=rewritten, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = ours.render_turns(TALK)
    assert ids == told["input_ids"]
    end, line = ours.token_id(ENDS[name]), ours.encode("\n")
    theirs_mask = [bool(each) for each in told["assistant_masks"]]
    edges = [
        not before or id_before == end for before, id_before in zip([False, *theirs_mask], [None, *ids], strict=False)
    ]
    marked = [m and not (edge and [id] == line) for m, edge, id in zip(theirs_mask, edges, ids, strict=False)]
    assert mask == marked and sum(mask) > 4


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation_loss(beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    torch.manual_seed(3)
    hidden, weight, labels = torch.randn(9, 6), torch.randn(23, 6), torch.randint(0, 23, (1, 9))
    teacher = torch.randn(9, 23) * 3
    labels[0, :4] = -100
    student = (hidden @ weight.T)[None]
    theirs = gkd.GKDTrainer.generalized_jsd_loss(student, teacher[None], labels, beta, 1.7)
    found = linear_divergence(hidden[4:], weight, teacher[4:], None, beta, 1.7)
    torch.testing.assert_close(found / 5, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("variant", ["grpo", "dr-grpo", "dapo", "gspo"])
def test_grpo_losses(variant: Variant) -> None:
    torch.manual_seed(6)
    rows, length, clip, beta = 5, 9, (0.2, 0.28), 0.04
    mask = torch.arange(length) < torch.randint(2, length + 1, (rows, 1))
    logs, old, reference = (torch.randn(rows, length) * 0.3 - 3 for _ in range(3))
    advantage, entropy = torch.randn(rows), torch.zeros(rows, length)
    inputs = {
        "prompt_ids": torch.zeros(rows, 2).long(), "prompt_mask": torch.ones(rows, 2).long(),
        "completion_ids": torch.zeros(rows, length).long(), "completion_mask": mask.long(), "advantages": advantage,
        "old_per_token_logps": old, "ref_per_token_logps": reference, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    self = trainer(
        args=args, beta=beta, epsilon_low=clip[0], epsilon_high=clip[1], top_entropy_quantile=1.0, use_vllm=False,
        loss_type={"dr-grpo": "dr_grpo", "dapo": "dapo"}.get(variant, "grpo"), max_completion_length=12,
        importance_sampling_level="sequence" if variant == "gspo" else "token", off_policy_mask_threshold=None,
        aux_loss_enabled=False, current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _get_per_token_logps_and_entropies=lambda *given, **more: (logs, entropy, None),
    )  # fmt: skip
    self.accelerator.num_processes, self.accelerator.reduce = 1, lambda tensor, **more: tensor
    theirs = trl.GRPOTrainer._compute_loss(self, None, inputs)
    of, lengths = mask.nonzero()[:, 0], mask.sum(-1).float()
    ratio = (logs - old)[mask]
    ratio = sequence_ratios(ratio, of, lengths) if variant == "gspo" else ratio
    found = terms(logs[mask], ratio, reference[mask], advantage[of], clip, beta).loss
    ours = (found * token_shares(mask, variant, 12)[of]).sum() / rows
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
