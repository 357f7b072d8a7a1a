"""The recurrent encoder-decoder, with attention and without: its formulas, its two ways of writing, g2p-en's words."""

import itertools
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from keifu import checkpoints
from keifu.data.tokenizers.seq2seq import TwoSidedTokenizer
from keifu.data.tokenizers.train import train_tokenizer
from keifu.errors import UserError
from keifu.models import seq2seq

SMALL = seq2seq.Config(
    vocab_size=37, target_vocab_size=31, context_length=16, dim=10, embedding_dim=7, attention_dim=9, maxout_dim=6
)
SOURCE, TARGET = torch.arange(4, 31).reshape(3, 9), torch.arange(30).reshape(3, 10)
LENGTHS = torch.tensor([9, 5, 7])
MASK = torch.arange(9) < LENGTHS[:, None]
KINDS = list(itertools.product(seq2seq.ENCODERS, seq2seq.CONTEXTS, seq2seq.OUTPUTS))


def built(*kind: str, **changes) -> seq2seq.Seq2Seq:
    """Return a model with weights large enough to affect its logits, in float64."""
    names = dict(zip(("encoder", "context", "output"), kind, strict=False))
    torch.manual_seed(3)
    model = seq2seq.build(replace(SMALL, **names, **changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def written_plainly(model) -> torch.Tensor:
    """Return the same logits from torch's GRU, packed, and GRUCell, one step at a time."""
    c, decoder = model.config, model.decoder
    both = c.encoder == "bidirectional"
    encoder = nn.GRU(c.embedding_dim, c.dim, batch_first=True, bidirectional=both).double()
    ways = [model.encoder.forwards, *([model.encoder.backwards] if both else [])]
    for gru, end in zip(ways, ("", "_reverse"), strict=False):
        copied(gru, [encoder.get_parameter(f"{kind}_l0{end}") for kind in PARTS])
    cell = nn.GRUCell(decoder.gru.input.in_features, c.dim).double()
    copied(decoder.gru, [cell.get_parameter(kind) for kind in PARTS])
    packed = pack_padded_sequence(model.source_embedding(SOURCE), LENGTHS, batch_first=True, enforce_sorted=False)
    states, last = encoder(packed)
    states, state = pad_packed_sequence(states, batch_first=True)[0], last[-1]
    state = state if c.context == "none" else decoder.first(state).tanh()
    logits = []
    for word in model.target_embedding(TARGET).unbind(1):
        if c.context == "attention":
            scores = (decoder.attention.query(state)[:, None] + decoder.attention.key(states)).tanh()
            share = (scores @ decoder.attention.v).masked_fill(~MASK, -torch.inf).softmax(-1)
            had = [(share[:, :, None] * states).sum(1)]
        else:
            had = [torch.cat([*last], -1)] if c.context == "fixed" else []
        after = cell(torch.cat([word, *had], -1), state)
        if c.output == "maxout":
            sums = model.output.pairs(torch.cat([state, word, *had], -1))
            logits.append(model.head(torch.maximum(sums[:, 0::2], sums[:, 1::2])))
        else:
            logits.append(model.head(after))
        state = after
    return torch.stack(logits, 1)


PARTS = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")


def copied(gru, theirs) -> None:
    for ours, their in zip((*gru.input.parameters(), *gru.recurrent.parameters()), theirs, strict=True):
        their.data = ours.data


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@torch.no_grad()
def test_logits_are_those_of_torchs_gru_step_by_step(kind):
    model = built(*kind)
    logits = model(SOURCE, TARGET, MASK)
    assert logits.std() > 0.1 and torch.allclose(logits, written_plainly(model))


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@torch.no_grad()
def test_alone_and_in_a_batch_at_once_and_token_by_token(kind):
    model = built(*kind, head_bias=True)
    whole = model(SOURCE, TARGET, MASK)
    other = model(torch.where(MASK, SOURCE, 3), TARGET, MASK)
    assert torch.equal(other, whole)  # what stands in the padding is never seen
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model(SOURCE[row : row + 1, :length], TARGET[row : row + 1])
        assert torch.allclose(alone[0], whole[row])
    state = model.start(SOURCE, MASK, capacity=10)
    parts = [model.hidden(TARGET[:, a:b], state) for a, b in ((0, 1), (1, 4), (4, 5), (5, 10))]
    assert torch.allclose(model.logits(torch.cat(parts, 1)), whole) and state.length == 10
    with pytest.raises(ValueError, match="room for 10 tokens and was given 11"):
        model.hidden(TARGET[:, :1], state)


@pytest.mark.parametrize("context", seq2seq.CONTEXTS)
@torch.no_grad()
def test_selected_rows_go_on_as_if_they_had_been_alone(context):
    model, rows = built("bidirectional", context), torch.tensor([2, 0, 0, 1])
    state = model.start(SOURCE, MASK, capacity=10)
    model.hidden(TARGET[:, :4], state)
    for chosen in ([2, 0, 0, 1], [0, 2, 1, 3], [0, 1, 3]):  # other sources, the same ones, fewer
        state.select(torch.tensor(chosen))
    rows = rows[[0, 2, 1, 3]][[0, 1, 3]]
    more = TARGET[:, 4:]
    expected = model(SOURCE[rows], torch.cat([TARGET[rows, :4], more], 1), MASK[rows])[:, 4:]
    assert torch.allclose(model.logits(model.hidden(more, state)), expected)
    with pytest.raises(ValueError, match="for 3 targets and was given tokens of 2"):
        model.hidden(TARGET[:2, :1], state)


@torch.no_grad()
def test_the_alignment_is_a_share_of_each_source_token():
    shares = built().alignment(SOURCE, TARGET, MASK)
    assert shares.shape == (3, 10, 9) and torch.allclose(shares.sum(-1), torch.ones(3, 10).double())
    assert not shares[~MASK[:, None].expand(-1, 10, -1)].any() and shares.std() > 0.01
    with pytest.raises(ValueError, match="'fixed' weighs no source tokens"):
        built("bidirectional", "fixed").alignment(SOURCE, TARGET)


def test_the_start_is_the_papers():
    torch.manual_seed(0)
    model = seq2seq.build(replace(SMALL, dim=60, attention_dim=80))
    for gru in (model.encoder.forwards, model.encoder.backwards, model.decoder.gru):
        for matrix in gru.recurrent.weight.chunk(3):
            assert torch.allclose(matrix @ matrix.T, torch.eye(60), atol=1e-5)
    attention = model.decoder.attention
    assert not attention.v.any() and all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))
    small, rest = [attention.query, attention.key], [model.head, model.output.pairs, model.decoder.first]
    assert all(0.0009 < layer.weight.std() < 0.0011 for layer in small)
    assert all(
        0.009 < layer.weight.std() < 0.011 for layer in [*rest, model.source_embedding, model.encoder.forwards.input]
    )


def test_dropout_is_in_training_alone():
    model = built(dropout=0.5)
    assert torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))
    model.train()
    assert not torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))


@pytest.mark.parametrize("field", ["encoder", "context", "output"])
def test_an_unknown_layer_is_refused_with_those_that_are_known(field):
    with pytest.raises(ValueError, match=f"There is no {field} 'atention'.*Known: "):
        replace(SMALL, **{field: "atention"})


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    tokenizer = train_tokenizer("bpe", ["A sentence and another sentence."] * 3, 280)
    model = built(*kind, vocab_size=280, pad_id=0, end_id=0).float()
    checkpoints.save(model, tokenizer, tmp_path)
    again, same = checkpoints.load(tmp_path)
    assert again.config == model.config and same.fingerprint == tokenizer.fingerprint
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.fixture(scope="module")
def archive():
    """Return g2p-en's archive; the tests are left out where there is no network for it."""
    from keifu.data.catalogue.catalogue import fetch

    try:
        return fetch("g2p-en")
    except (UserError, OSError) as error:
        pytest.skip(f"g2p-en cannot be had here: {error}")


@pytest.fixture(scope="module")
def words() -> list[str]:
    """Return 1,000 different words: of the 20,000 most common ones in the catalogue's English, every twentieth."""
    from collections import Counter

    from keifu.data.catalogue.catalogue import documents

    try:
        counted = Counter(word for text in documents("wiki-summaries") for word in re.findall("[a-z']+", text.lower()))
    except (UserError, OSError) as error:
        pytest.skip(f"No English text can be had here: {error}")
    found = [word for word, _ in counted.most_common(20_000)][::20]
    assert len(set(found)) == 1000
    return found


def spoken(weights, words: list[str]) -> list[list[int]]:
    """Return the archive's phonemes of words by numpy alone, greedily and at most 20, with the archive's ids."""
    rows = [[*(3 + ord(letter) - ord("a") if letter.isalpha() else 1 for letter in word), 2] for word in words]
    state, lengths = np.zeros((len(rows), 256), np.float32), np.array([len(row) for row in rows])[:, None]
    for place in range(lengths.max()):
        letters = [row[place] if place < len(row) else 0 for row in rows]
        state = np.where(place < lengths, turned(weights, "enc", weights["enc_emb"][letters], state), state)
    written = [np.full(len(rows), 2)]
    for _ in range(20):
        state = turned(weights, "dec", weights["dec_emb"][written[-1]], state)
        written.append(np.argmax(state @ weights["fc_w"].T + weights["fc_b"], -1))
    return [row[: row.index(3)] if 3 in row else row for row in np.stack(written[1:], 1).tolist()]


def turned(weights, side: str, x, state):
    """Return the next state of a gated recurrent unit by its formulas, for batches of x and state."""
    a = x @ weights[f"{side}_w_ih"].T + weights[f"{side}_b_ih"]
    b = state @ weights[f"{side}_w_hh"].T + weights[f"{side}_b_hh"]
    reset, update = np.split(1 / (1 + np.exp(-a[:, :512] - b[:, :512])), 2, -1)
    return (1 - update) * np.tanh(a[:, 512:] + reset * b[:, 512:]) + update * state


def phonemes(model, tokenizer, texts) -> list[list[int]]:
    """Return the same by the model, all words in one batch."""
    ids = tokenizer.encode_batch(texts, special=True)
    lengths = torch.tensor([len(row) for row in ids])
    source = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    state = model.start(source, torch.arange(source.shape[1]) < lengths[:, None], 20)
    tokens = [torch.full((len(ids), 1), model.config.start_id)]
    for _ in range(20):
        tokens.append(model.logits(model.hidden(tokens[-1], state)).argmax(-1))
    rows = torch.cat(tokens[1:], 1).tolist()
    return [row[: row.index(model.config.end_id)] if model.config.end_id in row else row for row in rows]


@torch.no_grad()
@pytest.mark.slow
def test_g2p_en_speaks_a_thousand_words_as_its_archive_does(archive, words, tmp_path):
    model, tokenizer = checkpoints.load("g2p-en")
    with np.load(archive, allow_pickle=False) as stored:
        weights = {name: stored[name] for name in stored.files}
    expected = spoken(weights, words)
    assert phonemes(model, tokenizer, words) == expected
    assert tokenizer.decode(expected[words.index("the")]) == "DH IY1"
    assert isinstance(tokenizer, TwoSidedTokenizer) and tokenizer.encode("Café") == tokenizer.encode("cafe")

    checkpoints.save(model, tokenizer, tmp_path)
    again, same = checkpoints.load(tmp_path)
    assert same.fingerprint == tokenizer.fingerprint and same.encode_target_batch(["DH IY1"]) == [expected[0]]
    assert phonemes(again, same, words[:50]) == expected[:50]


def test_a_one_sided_tokenizer_saved_over_a_two_sided_one_is_read_alone(archive, tmp_path):
    checkpoints.save(*checkpoints.load("g2p-en"), tmp_path)
    checkpoints.save(built(vocab_size=280), train_tokenizer("bpe", ["Some text."], 280), tmp_path)
    assert not isinstance(checkpoints.load(tmp_path)[1], TwoSidedTokenizer)


def test_other_archives_are_refused_with_what_is_wrong(archive, tmp_path):
    path = tmp_path / "weights.npz"
    with np.load(archive, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    for change, message in (
        ({"fc_b": None}, "lacks fc_b"),
        ({"fc_b": np.zeros(73, np.float32)}, r"fc_b is \[73\] where the config asks for \[74\]"),
        ({"more": np.zeros(3, np.float32)}, "not part of the model.*more"),
        ({"fc_b": np.zeros(74, np.int8)}, "fc_b as int8"),
        ({"fc_b": np.array([{}] * 74)}, "no NumPy archive of plain numbers"),
    ):
        np.savez(path, **{name: array for name, array in (arrays | change).items() if array is not None})
        with pytest.raises(UserError, match=message):
            checkpoints.load(path)
    whole = archive.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="torn"):
        checkpoints.load(path)
    with zipfile.ZipFile(path, "w") as empty:
        empty.writestr("readme.txt", "nothing")
    with pytest.raises(UserError, match="readme.txt"):
        checkpoints.load(path)
