"""InstructGPT's three steps (Ouyang et al., 2022) in one file: demonstrations, a reward model, and PPO.

Run `python instructgpt.py`. A small GPT reads five digits and answers with five. Its demonstrations are careless:
30% are sorted. A program stands for the people who compare two answers: it prefers the better sorted one. A reward
model learns these preferences, and PPO raises its reward. It needs torch alone and takes under two minutes.
"""

import copy
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

DIGITS, ASK, ANSWER = 5, 10, 11  # tokens 0 to 9 are digits; ASK begins a prompt, ANSWER ends it
PROMPT = DIGITS + 2  # ASK, five digits, ANSWER


class Block(nn.Module):
    """GPT-2's block: attention and feed-forward, each with its norm before it."""

    def __init__(self, dim, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "out": nn.Linear(dim, dim)})
        self.feedforward = nn.ModuleDict({"up": nn.Linear(dim, 4 * dim), "down": nn.Linear(4 * dim, dim)})

    def forward(self, x):
        qkv = self.attention["qkv"](self.attention_norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in qkv)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attention["out"](seen)
        hidden = F.gelu(self.feedforward["up"](self.feedforward_norm(x)), approximate="tanh")
        return x + self.feedforward["down"](hidden)


class GPT(nn.Module):
    """GPT-2 without dropout."""

    def __init__(self, vocab_size=12, context_length=PROMPT + DIGITS, dim=64, n_layers=2, n_heads=4):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(context_length, dim)
        self.blocks = nn.ModuleList(Block(dim, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim)
        for parameter in (self.embedding.weight, self.positions.weight):
            nn.init.normal_(parameter, std=0.02)

    def hidden(self, tokens):
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, tokens):
        """Return logits of the next token: [batch, length, vocab]."""
        return F.linear(self.hidden(tokens), self.embedding.weight)


class Scorer(nn.Module):
    """A GPT with one number at each token instead of logits: a reward model, or the values of PPO."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt, self.score = copy.deepcopy(gpt), nn.Linear(gpt.norm.weight.numel(), 1)
        nn.init.zeros_(self.score.weight)

    def forward(self, tokens):
        return self.score(self.gpt.hidden(tokens))[..., 0]


def prompts(count):
    """Return prompts: ASK, five random digits, ANSWER."""
    digits = torch.randint(10, (count, DIGITS))
    return torch.cat([torch.full((count, 1), ASK), digits, torch.full((count, 1), ANSWER)], 1)


@torch.no_grad()
def sample(policy, prompt):
    """Append five sampled digits to each prompt."""
    tokens = prompt
    for _ in range(DIGITS):
        tokens = torch.cat([tokens, torch.multinomial(policy(tokens)[:, -1].softmax(-1), 1)], 1)
    return tokens


def quality(tokens):
    """Return the judge's opinion of answers: the share of places with the digit of the sorted prompt."""
    wanted = tokens[:, 1 : 1 + DIGITS].sort(-1).values
    return (tokens[:, PROMPT:] == wanted).float().mean(-1)


def log_probabilities(policy, tokens):
    """Return the log-probability of each answer token: [batch, 5]."""
    logits = policy(tokens[:, :-1])[:, PROMPT - 1 :]
    return logits.log_softmax(-1).gather(-1, tokens[:, PROMPT:, None])[..., 0]


def optimise(parameters, loss_of, steps, learning_rate):
    """Take `steps` steps of AdamW on `loss_of()` and return the last loss."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / 20, 1)
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def fine_tune(policy, steps=700):
    """Step 1: imitate demonstrations. 30% of them are sorted; the others have the digits in random order."""

    def loss_of():
        prompt = prompts(128)
        digits = prompt[:, 1:-1]
        shuffled = digits.gather(1, torch.rand(digits.shape).argsort(-1))
        answer = torch.where(torch.rand(len(digits), 1) < 0.3, digits.sort(-1).values, shuffled)
        return -log_probabilities(policy, torch.cat([prompt, answer], 1)).mean()

    return optimise(policy.parameters(), loss_of, steps, 3e-3)


def learn_reward(policy, steps=400):
    """Step 2: learn a reward from comparisons, by -log sigmoid(reward(better) - reward(worse))."""
    reward = Scorer(policy)

    def loss_of():
        prompt = prompts(128)
        first, second = sample(policy, prompt), sample(policy, prompt)
        gap = quality(first) - quality(second)
        margin = (reward(first)[:, -1] - reward(second)[:, -1]) * gap.sign()
        return -F.logsigmoid(margin)[gap != 0].mean()

    return reward, optimise(reward.parameters(), loss_of, steps, 1e-3)


def advantages(rewards, values, gamma=1.0, gae_lambda=0.95):
    """Return generalised advantage estimates and returns (Schulman et al., 2015): both [batch, length]."""
    estimate, estimates = torch.zeros(len(rewards)), []
    following = torch.cat([values[:, 1:], torch.zeros(len(values), 1)], 1)  # nothing follows the last token
    errors = rewards + gamma * following - values
    for step in reversed(range(rewards.shape[1])):
        estimate = errors[:, step] + gamma * gae_lambda * estimate
        estimates.insert(0, estimate)
    estimates = torch.stack(estimates, 1)
    return estimates, estimates + values


def ppo(policy, reward, rounds=60, kl_coef=0.05, clip=0.2):
    """Step 3: raise the reward of the answers, and stay near the fine-tuned model (Schulman et al., 2017)."""
    reference, critic = copy.deepcopy(policy), Scorer(reward.gpt)
    optimizer = torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=5e-4)
    for step in range(1, rounds + 1):
        tokens = sample(policy, prompts(256))
        with torch.no_grad():
            old, anchor = log_probabilities(policy, tokens), log_probabilities(reference, tokens)
            rewards = -kl_coef * (old - anchor)  # each token pays for its distance from the fine-tuned model
            rewards[:, -1] += reward(tokens)[:, -1]  # the whole answer earns the reward model's number
            advantage, returns = advantages(rewards, critic(tokens[:, :-1])[:, PROMPT - 1 :])
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        for _ in range(4):
            ratio = (log_probabilities(policy, tokens) - old).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            values = critic(tokens[:, :-1])[:, PROMPT - 1 :]
            loss = -surrogate.mean() + 0.5 * F.mse_loss(values, returns)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
        if step % 10 == 0:
            kl = (old - anchor).sum(-1).mean().item()
            print(f"round {step}  reward {rewards.sum(-1).mean().item():+.2f}  KL {kl:.2f}")


def report(name, policy):
    """Print what share of 2,000 sampled answers is sorted and complete."""
    tokens = sample(policy, prompts(2000))
    print(f"{name}: {(quality(tokens) == 1).float().mean().item():.1%} of answers are the sorted digits")
    print(f"  {tokens[0, 1 : PROMPT - 1].tolist()} -> {tokens[0, PROMPT:].tolist()}")


def main(fine_tuning=700, comparisons=400, rounds=60):
    """Run the three steps and print the share of good answers after the first and the last."""
    torch.manual_seed(0)
    policy = GPT()
    print(f"fine-tuning: loss {fine_tune(policy, fine_tuning):.3f}")
    report("after fine-tuning", policy)
    reward, loss = learn_reward(policy, comparisons)
    print(f"reward model: loss {loss:.3f} (a coin has {math.log(2):.3f})")
    ppo(policy, reward, rounds)
    report("after PPO", policy)


if __name__ == "__main__":
    print(__doc__.strip()) if "--help" in sys.argv else main()
