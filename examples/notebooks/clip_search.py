# %% [markdown]
# # CLIP: search pictures by words
#
# A CLIP of two small towers learns from drawn shapes and their names, then searches pictures, also by captions it never
# saw: colours and shapes it knows, in combinations that were held out. For real pictures: `keifu train clip`.

# %%
import matplotlib.pyplot as plt
import torch
from PIL import Image, ImageDraw

from keifu.data.tokenizers.train import train_tokenizer
from keifu.models.clip import clip, image, text
from keifu.training.objectives.contrastive import contrastive_loss

torch.manual_seed(0)
COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (235, 200, 30)}
SHAPES = ("circle", "square", "triangle", "bar")
HELD_OUT = {("red", "square"), ("green", "bar"), ("blue", "circle"), ("yellow", "triangle")}


def drawing(colour: str, shape: str) -> torch.Tensor:
    """Draw a shape of this colour somewhere on white, [3, 24, 24] from -1 to 1."""
    picture = Image.new("RGB", (24, 24), "white")
    x, y, size = (int(n) for n in (*torch.randint(0, 10, (2,)), torch.randint(9, 14, ())))
    pen, box = ImageDraw.Draw(picture), (x, y, x + size, y + size)
    if shape == "circle":
        pen.ellipse(box, COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, COLOURS[colour])
    elif shape == "bar":
        pen.rectangle((x, y, x + size, y + 3), COLOURS[colour])
    else:
        pen.polygon([(x, y + size), (x + size, y + size), (x + size / 2, y)], COLOURS[colour])
    return torch.tensor(list(picture.tobytes())).view(24, 24, 3).permute(2, 0, 1) / 127.5 - 1


names = [(colour, shape) for colour in COLOURS for shape in SHAPES]
seen = [name for name in names if name not in HELD_OUT]

# %% [markdown]
# Captions as tokens; the last one ends a caption, and there it is read.

# %%
tokenizer = train_tokenizer(
    "characters", [" ".join(f"{colour} {shape}" for colour, shape in names)], 64, ["<pad>", "<end>"]
)
END = tokenizer.token_id("<end>")


def caption(colour: str, shape: str) -> list[int]:
    """Return the caption's ids. The padding after the end is read by nothing."""
    ids = [*tokenizer.encode(f"{colour} {shape}"), END]
    return ids + [tokenizer.token_id("<pad>")] * (20 - len(ids))


sizes = {"dim": 48, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "embedding_dim": 32}
model = clip.build(
    clip.Config(
        text.Config(vocab_size=tokenizer.vocab_size, context_length=20, end_id=END, **sizes),
        image.Config(image_size=24, patch_size=6, **sizes),
    )
)

# %% [markdown]
# Training: a batch holds each seen name once, so that all other captions of the batch are wrong ones.

# %%
objective = contrastive_loss(lambda pictures: pictures)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for _step in range(350):
    batch = {
        "pictures": torch.stack([drawing(*name) for name in seen]),
        "tokens": torch.tensor([caption(*n) for n in seen]),
    }
    found = objective(model, batch)
    loss = found.total / found.weight
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {float(loss.detach()):.3f}; chance is {torch.tensor(float(len(seen))).log():.3f}")

# %% [markdown]
# Search: 32 drawings, the held-out names among them, and the nearest to each caption.

# %%
model.eval()
shown = names * 2
with torch.no_grad():
    pictures = torch.nn.functional.normalize(
        model.encode_image(torch.stack([drawing(*name) for name in shown])), dim=-1
    )
    words = torch.nn.functional.normalize(model.encode_text(torch.tensor([caption(*name) for name in names])), dim=-1)
similarity = words @ pictures.T
first = [shown[int(place)] for place in similarity.argmax(1)]
known = sum(found == name for found, name in zip(first, names, strict=True) if name in seen)
unseen = sum(found == name for found, name in zip(first, names, strict=True) if name in HELD_OUT)
print(f"found first: {known} of {len(seen)} seen names, {unseen} of {len(HELD_OUT)} combinations that were held out")
plt.imshow(similarity)
plt.yticks(range(len(names)), [" ".join(name) for name in names], fontsize=7)
assert known >= 9
