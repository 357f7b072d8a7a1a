"""The language of WEIGHT_NAMES: whatever is joined, transposed or turned comes back bit by bit."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from keifu.checkpoints.hf.weight_names import Link, halves, links, matches, pairs
from keifu.checkpoints.registry import FAMILIES, describe, model_file
from keifu.layers.linear import JoinedLinear
from keifu.layers.meta import on_meta
from keifu.models.clip import clip, image as clip_image


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        blocks = [{"qkv": JoinedLinear(6, (4, 2, 2)), "out": nn.Linear(4, 6)} for _ in range(2)]
        self.blocks = nn.ModuleList(map(nn.ModuleDict, blocks))
        self.register_buffer("scale", torch.ones(()))


TABLE = {
    "embedding": "wte",
    "blocks.*.qkv": "h.*.attn.[q,k,v]_proj",
    "blocks.*.out": "h.*.attn.c_proj.T",
    "scale": "log_scale",
}


def test_every_word_of_the_language() -> None:
    found = {link.ours: link for link in links(Toy(), TABLE)}
    assert found["embedding.weight"] == Link("embedding.weight", (7, 6), ("wte.weight",), (7,))
    joined = found["blocks.1.qkv.weight"]
    assert joined.theirs == tuple(f"h.1.attn.{one}_proj.weight" for one in "qkv")
    assert joined.rows == (4, 2, 2) and joined.stored_shapes() == [(4, 6), (2, 6), (2, 6)]
    assert found["blocks.0.qkv.bias"].stored_shapes() == [(4,), (2,), (2,)]
    turned = found["blocks.0.out.weight"]
    assert turned.theirs == ("h.0.attn.c_proj.weight",) and turned.transposed and turned.stored_shapes() == [(4, 6)]
    assert not found["blocks.0.out.bias"].transposed
    assert found["scale"].theirs == ("log_scale",) and found["scale"].stored_shapes() == [()]


def test_without_a_table_both_sides_have_the_same_names() -> None:
    assert all(link.theirs == (link.ours,) for link in links(Toy(), None))


def test_what_the_table_does_not_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="no entry for blocks.0.out.weight"):
        links(Toy(), {key: value for key, value in TABLE.items() if key != "blocks.*.out"})


def test_only_joined_matrices_face_several() -> None:
    with pytest.raises(ValueError, match="blocks.0.out.weight is no joined matrix of 2 parts"):
        links(Toy(), TABLE | {"blocks.*.out": "h.*.[a,b]"})


@given(
    rows=st.lists(st.integers(1, 4).map(lambda n: 6 * n), min_size=1, max_size=3),
    columns=st.integers(0, 5),
    transposed=st.booleans(),
    turned=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_split_undoes_join(rows, columns, transposed, turned) -> None:
    shape = (sum(rows), columns) if columns else (sum(rows),)
    heads = tuple(6 * (n % 2) for n in range(len(rows))) if turned else ()
    names = tuple(map(str, rows))
    link = Link("x", shape, names, tuple(rows), transposed and bool(columns), heads)
    stored = [torch.randn(shape) for shape in link.stored_shapes()]
    ours = link.join(stored)
    assert tuple(ours.shape) == shape and ours.is_contiguous()
    back = link.split(ours)
    assert all(torch.equal(a, b) and b.is_contiguous() for a, b in zip(stored, back, strict=True))


def test_halves_moves_the_even_rows_of_a_head_to_its_front() -> None:
    rows = torch.arange(12)
    assert halves(rows, 6).tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert pairs(halves(rows, 6), 6).tolist() == rows.tolist()
    assert halves(rows, 0) is rows


def test_a_link_that_changes_nothing_copies_nothing() -> None:
    stored = torch.randn(4, 3)
    assert Link("x", (4, 3), ("x",), (4,)).join([stored]) is stored


def test_stars_match_numbers_alone() -> None:
    assert matches("h.12.attn.bias", ["h.*.attn.bias"])
    assert not matches("h.x.attn.bias", ["h.*.attn.bias"]) and not matches("hx12.attn.bias", ["h.*.attn.bias"])


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_names_all_of_its_weights_once(kind) -> None:
    family = FAMILIES[kind]
    published = vars(model_file(kind)).get("SIZES", {})
    sizes = [clip.SIZES["clip-vit-b32"].image] if model_file(kind) is clip_image else published.values()
    known = [*(size for size in sizes if describe(size)[0] is family), *sizes]
    config = known[0] if family.names and known else family.config_class()
    if vars(config).get("n_experts"):  # hundreds take long to name, and their names differ by a number
        config = replace(config, n_experts=min(config.n_experts, 16))
    if vars(config).get("n_layers", 0) > 6 and not any(isinstance(each, tuple) for each in vars(config).values()):
        config = replace(config, n_layers=6)  # layers that are all alike differ by a number too
    if isinstance(vars(config).get("positions"), int):  # one buffer, which takes a second to compute
        config = replace(config, positions=min(config.positions, 96))
    with on_meta():
        model = family.build(config)
    found = links(model, family.names)
    theirs = [name for link in found for name in link.theirs]
    assert len(theirs) == len(set(theirs)) and {link.ours for link in found} == set(model.state_dict())
