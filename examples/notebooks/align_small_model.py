# %% [markdown]
# # Align a small model
#
# A model that counts upwards from a digit learns by a reward, not by examples, to count in twos: GRPO (Shao et al.,
# 2024), the way reasoning models are trained, written out with keifu's pieces. For real models: `keifu train grpo`.

# %%
import copy

import matplotlib.pyplot as plt
import torch

from keifu.alignment import grpo
from keifu.models import llama
from keifu.training.objectives.language_modeling import causal_language_modeling

torch.manual_seed(0)
LENGTH, GROUP = 6, 8
model = llama.build(llama.Config(vocab_size=10, context_length=8, dim=32, hidden_dim=64, n_layers=2, n_heads=2))

# %% [markdown]
# First imitation (supervised fine-tuning): rows such as 3 4 5 6 7 8, in which one step in five is two instead.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _step in range(150):
    steps = 1 + (torch.rand(64, LENGTH) < 0.2).long()
    rows = (torch.randint(10, (64, 1)) + torch.cat([torch.zeros(64, 1), steps[:, 1:].cumsum(1)], 1).long()) % 10
    found = causal_language_modeling(model, {"tokens": rows})
    optimizer.zero_grad()
    (found.total / found.weight).backward()
    optimizer.step()

# %% [markdown]
# Then the reward: the share of steps that are two. A rollout writes several answers to each prompt.


# %%
def answers(prompts: torch.Tensor) -> torch.Tensor:
    """Continue the prompts with samples of the model."""
    rows = prompts
    with torch.no_grad():
        while rows.shape[1] < LENGTH:
            rows = torch.cat([rows, torch.multinomial(model(rows)[:, -1].softmax(-1), 1)], 1)
    return rows


def reward(rows: torch.Tensor) -> torch.Tensor:
    """Return the share of steps that are two."""
    return ((rows[:, 1:] - rows[:, :-1]) % 10 == 2).float().mean(1)


def logs(policy: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Return ln p of each token that was written."""
    return policy(rows[:, :-1]).log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]


reference = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
rewards, distances = [], []
for _rollout in range(60):
    rows = answers(torch.randint(10, (16, 1)).repeat_interleave(GROUP, 0))
    scores = reward(rows)
    advantage = grpo.advantages(scores.view(-1, GROUP)).flatten()  # compared with the other answers to a prompt
    with torch.no_grad():
        old, far = logs(model, rows), logs(reference, rows)
    now = logs(model, rows)
    of_token = advantage.repeat_interleave(LENGTH - 1)
    terms = grpo.terms(now.flatten(), (now - old).flatten(), far.flatten(), of_token, clip=(0.2, 0.2), beta=0.02)
    optimizer.zero_grad()
    terms.loss.mean().backward()
    optimizer.step()
    rewards.append(float(scores.mean()))
    distances.append(float(terms.kl.mean()))

# %% [markdown]
# The reward rises, and so does the distance from the model it began as: what is learned is what the reward says, and no
# more.

# %%
plt.plot(rewards, label="reward")
plt.plot(distances, label="KL from the reference, nats per token")
plt.xlabel("rollout")
plt.legend()
print(f"steps of two: {rewards[0]:.0%} before, {rewards[-1]:.0%} after")
print("one answer:", answers(torch.tensor([[1]])).tolist()[0])
assert rewards[-1] > 0.7 > rewards[0]
