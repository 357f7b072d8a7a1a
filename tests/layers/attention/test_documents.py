"""Several documents in a row give what each gives alone."""

import pytest
import torch

from keifu.layers.attention.masks import positions_in
from keifu.models import gemma3, gpt2, gpt3, llama, palm

SIZES = {"vocab_size": 31, "context_length": 24, "dim": 24, "hidden_dim": 40, "n_layers": 2, "n_heads": 4}
MODELS = {
    "learned positions": gpt2.build(gpt2.Config(**SIZES, dropout=0.0)),
    "rotary": llama.build(llama.Config(**SIZES, n_kv_heads=2)),
    "local and global rotary bases": gemma3.build(
        gemma3.Config(**SIZES, n_kv_heads=2, head_dim=8, sliding_window=4, global_layers=(1,))
    ),
    "a window shorter than a document": llama.build(llama.Config(**SIZES, sliding_window=4)),
    "parallel layers": palm.build(palm.Config(**SIZES)),
    "bands": gpt3.build(gpt3.Config(**SIZES, band=3)),
}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_documents_do_not_see_each_other(name: str) -> None:
    model, lengths = MODELS[name].eval(), [[7, 1, 9], [3, 11, 3]]
    tokens = torch.randint(0, 31, (2, 17), generator=torch.Generator().manual_seed(4))
    documents = torch.tensor([[number for number, n in enumerate(row) for _ in range(n)] for row in lengths])
    together = model.hidden(tokens, documents=documents)
    for row, counts in enumerate(lengths):
        for piece, alone in zip(tokens[row].split(counts), together[row].split(counts), strict=True):
            torch.testing.assert_close(model.hidden(piece[None])[0], alone, rtol=1e-5, atol=1e-5)


def test_positions_begin_anew_wherever_the_number_changes() -> None:
    documents = torch.tensor([[5, 5, 5, 2, 2, 5], [0, 1, 2, 2, 2, 2]])
    assert positions_in(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 1, 2, 3]]
