# %% [markdown]
# # Train a tiny GPT
#
# A LLaMA-type model of some 100,000 parameters learns to spell from a short text, in well under a minute on one core.
# The same by the command line, with everything around it: `keifu train gpt --depth 2 --data FILE`.

# %%
import matplotlib.pyplot as plt
import torch

import keifu
from keifu.data.tokenizers.train import train_tokenizer
from keifu.models import llama
from keifu.training.objectives.language_modeling import causal_language_modeling

torch.manual_seed(0)
rhyme = """The house that Jack built. This is the malt that lay in the house that Jack built. This is the rat that ate
the malt that lay in the house that Jack built. This is the cat that killed the rat that ate the malt that lay in the
house that Jack built. This is the dog that worried the cat that killed the rat that ate the malt that lay in the house
that Jack built. """
text = rhyme.replace("\n", " ") * 4

# %% [markdown]
# A tokenizer of single characters, and windows of 64: the model predicts the next character at every place of each.

# %%
tokenizer = train_tokenizer("characters", [text], 64)
ids = torch.tensor(tokenizer.encode(text))
config = llama.Config(
    vocab_size=tokenizer.vocab_size, context_length=64, dim=64, hidden_dim=160, n_layers=2, n_heads=4, tied=True
)
model = llama.build(config)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(ids):,} characters")


def batch(rows: int = 16) -> dict[str, torch.Tensor]:
    """Return random windows of the text, one token longer than the context."""
    starts = torch.randint(len(ids) - 65, (rows,))
    return {"tokens": torch.stack([ids[start : start + 65] for start in starts])}


# %% [markdown]
# The loop: loss, gradient, step. The objective gives the sum over tokens and their number.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for _step in range(150):
    found = causal_language_modeling(model, batch())
    loss = found.total / found.weight
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
plt.plot(losses)
plt.xlabel("step")
plt.ylabel("nats per character")
print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} at the end")

# %% [markdown]
# It writes, greedily and at temperature 1: so small a text is soon known by heart, and both recite it.

# %%
model.eval()
for temperature in (0.0, 1.0):
    said = keifu.generate(model, tokenizer, "This is the ", raw=True, max_tokens=48, temperature=temperature, seed=1)
    print(f"{temperature}: This is the {said}")
assert losses[-1] < 0.6 < losses[0]
