"""Word2vec equals the updates of the authors' program, and finds which words are used alike."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from keifu import checkpoints
from keifu.models.classic import word2vec
from keifu.training.objectives.word_vectors import negative_sampling


def small() -> word2vec.Word2Vec:
    torch.manual_seed(0)
    model = word2vec.build(word2vec.Config(11, 6))
    torch.nn.init.normal_(model.context.weight)
    torch.nn.init.normal_(model.embedding.weight)
    return model


def test_a_step_is_that_of_the_authors_program() -> None:
    """word2vec.c, for each word of a pair: g = (label - σ(f)) · rate. Both vectors move by g times the other one, as
    they were before the pair."""
    model, rate = small(), 0.05
    center, words = 3, [7, 1, 9, 4]
    table, contexts = (part.weight.detach().double().numpy().copy() for part in (model.embedding, model.context))
    moved = np.zeros(6)
    for label, word in zip((1, 0, 0, 0), words, strict=True):
        g = (label - 1 / (1 + np.exp(-table[center] @ contexts[word]))) * rate
        moved += g * contexts[word]
        contexts[word] += g * table[center]
    table[center] += moved
    batch = {"centers": torch.tensor([center]), "words": torch.tensor([words])}
    negative_sampling(model, batch).total.backward()
    torch.optim.SGD(model.parameters(), lr=rate).step()
    for part, expected in ((model.embedding, table), (model.context, contexts)):
        torch.testing.assert_close(part.weight.detach(), torch.from_numpy(expected).float())


def test_the_loss_is_the_papers_equation() -> None:
    model = small()
    centers, words = torch.tensor([3, 5]), torch.tensor([[7, 1, 9], [2, 2, 0]])
    scores = (model.context.weight[words] * model.embedding.weight[centers][:, None]).sum(-1)
    expected = -scores[:, 0].sigmoid().log().sum() - (-scores[:, 1:]).sigmoid().log().sum()
    found = negative_sampling(model, {"centers": centers, "words": words})
    torch.testing.assert_close(found.total, expected)
    assert found.weight == 2


def test_nearest_words_are_by_cosine_and_without_some() -> None:
    model = small()
    vectors = model.embedding.weight.detach()
    cosines = torch.cosine_similarity(vectors, vectors[4][None])
    cosines[4] = -1.0
    found, values = model.nearest(vectors[4], 3, (4,))
    assert found.tolist() == cosines.argsort(descending=True)[:3].tolist()
    torch.testing.assert_close(values, cosines.sort(descending=True).values[:3])


def test_a_saved_model_loads_with_the_same_bits(tmp_path: Path) -> None:
    model = small()
    checkpoints.save(model, None, tmp_path)
    loaded = checkpoints.load_model(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == {"embedding.weight", "context.weight"}
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in stored.items())
