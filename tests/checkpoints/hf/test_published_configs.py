"""config.json as the makers published it, older spellings too, is read as the size of that name."""

from json import loads
from pathlib import Path

import pytest
import torch
import transformers
from model_entries import ENTRIES

from keifu.checkpoints.registry import FAMILIES, build, describe, model_file, read_config
from keifu.errors import UserError
from keifu.models import gemma3, llama
from keifu.models.variants import gemma4, smollm3

PUBLISHED = {name: json for entry in ENTRIES.values() for name, json in entry.published.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_is_the_size_of_that_name(name) -> None:
    family, config = read_config(PUBLISHED[name], "config.json")
    assert family.model_type == PUBLISHED[name]["model_type"]
    [expected] = [entry.module.SIZES[name] for entry in ENTRIES.values() if name in entry.published]
    assert describe(config) == describe(expected)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_we_write_means_the_same_to_transformers(name) -> None:
    """Every field that the published file has and transformers keeps has the same value read from ours."""
    kind = PUBLISHED[name]["model_type"]
    theirs = transformers.AutoConfig.for_model(**PUBLISHED[name]).to_dict()
    ours = transformers.AutoConfig.for_model(**describe(read_config(PUBLISHED[name], "config.json")[1])[1]).to_dict()
    indifferent = {"dtype", "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"}
    indifferent |= {"task_specific_params", "predict_special_tokens", "n_special", "n_ctx", "summary_activation"}
    indifferent |= {"is_llama_config", "rope_interleaved", "n_inner", "max_window_layers", "sliding_window"} - (
        {"sliding_window"} if kind in ("mistral", "gemma3_text") else set()
    )
    indifferent |= {"ep_size", "moe_layer_freq", "initial_context_length", "quantization_config"}
    indifferent |= {"cache_implementation", "sliding_window_pattern"}  # which `layer_types` says too
    keys = (theirs.keys() & PUBLISHED[name].keys()) - indifferent | {"rope_parameters", "layer_types"} & theirs.keys()
    keys -= {"block_auto_adjust_ff_dim", "full_attn_idxs"}  # LFM2's: the width itself is written, and `layer_types`
    keys -= {"use_bidirectional_attention"}  # of the pictures of Gemma 4, if it is "vision"
    keys -= {"full_attention_interval", "attn_output_gate"}  # which `layer_types` says too, and what is always on
    for rope in (ours.get("rope_parameters") or {}, theirs.get("rope_parameters") or {}):
        for older in ("type", "truncate", "mrope_interleaved", "mrope_section"):  # older, a default, and of pictures
            rope.pop(older, None)
    assert {key: ours[key] for key in keys} == {key: theirs[key] for key in keys}


@pytest.mark.parametrize("kind", [kind for kind, family in FAMILIES.items() if family.names])
def test_every_size_is_written_and_read_again(kind) -> None:
    module = model_file(kind)
    for name, config in vars(module).get("SIZES", {}).items():
        family, json = describe(config)
        again, back = read_config(json, "config.json")
        assert again == family and describe(back) == (family, json), name
        # networks without a published form; a band, a learned variance
        unpublished = kind.removeprefix("keifu_") in ("mlp", "lstm", "word2vec", "gan", "score", "mean_flow")
        unpublished = unpublished or name.startswith(("gpt3-", "improved-ddpm"))
        assert json["model_type"].startswith("keifu_") == unpublished, name


# fields whose absence means the same in another form, and one that every published file of gpt-oss has
OTHER_DEFAULTS = {("llama", "head_dim"), ("mistral", "head_dim"), ("gpt_oss", "rope_parameters")}


@pytest.mark.parametrize("kind", sorted({*FAMILIES} & {*transformers.models.auto.configuration_auto.CONFIG_MAPPING}))
def test_a_field_that_a_file_leaves_out_has_the_default_of_transformers(kind: str) -> None:
    """A file is read as before if one of transformers' own defaults is left out of it, or refused by that name."""
    defaults = transformers.AutoConfig.for_model(kind).to_dict()
    expected, read = describe(read_config(defaults, "config.json")[1]), 0
    for left_out in defaults.keys() - {"model_type"}:
        if (kind, left_out) in OTHER_DEFAULTS:
            continue
        try:
            found = read_config({name: defaults[name] for name in defaults if name != left_out}, "config.json")[1]
        except UserError as error:
            assert f"no field '{left_out}'" in str(error)
            continue
        assert describe(found) == expected, left_out
        read += 1
    assert read > 5


def test_an_lfm2_has_the_width_of_transformers_and_is_tied_by_either_field() -> None:
    sizes = dict(hidden_size=16, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, vocab_size=20)
    width = dict(block_ff_dim=400, block_ffn_dim_multiplier=0.7, block_multiple_of=32)
    theirs = transformers.Lfm2Config(**sizes, **width, layer_types=["conv", "full_attention"])
    with torch.device("meta"):
        network = transformers.Lfm2Model(theirs).layers[0].feed_forward
    json = {"model_type": "lfm2", **sizes, **width}
    assert read_config(json, "config.json")[1].hidden_dim == network.w1.out_features == 192
    for field in ("tie_embedding", "tie_word_embeddings"):
        assert [read_config({**json, field: tied}, "config.json")[1].tied for tied in (True, False)] == [True, False]


@pytest.mark.parametrize("n_layers", [7, 30])
def test_a_gemma_4_that_transformers_saves_is_read(n_layers: int, tmp_path: Path) -> None:
    """It pads the numbers of layers to equal lengths, as in "05"."""
    transformers.AutoConfig.for_model("gemma4_text", num_hidden_layers=n_layers).save_pretrained(tmp_path)
    json = loads((tmp_path / "config.json").read_text())
    assert ("05" in json["per_layer_config"]) == (n_layers == 30)
    assert read_config(json, "config.json")[1] == gemma4.from_published(
        {**json, "per_layer_config": None, "global_head_dim": 512}
    )


def test_an_exaones_letters_name_its_global_layers() -> None:
    json = {name: value for name, value in PUBLISHED["exaone4-32b"].items() if name != "layer_types"}
    for pattern, expected in (("LLG", (2, 5)), ("LLLG", (3, 7)), (2, (1, 3, 5, 7))):
        config = read_config({**json, "num_hidden_layers": 8, "sliding_window_pattern": pattern}, "config.json")[1]
        assert llama.global_layers(config, 4) == expected


@pytest.mark.parametrize("layers", [10_001, 2**31, 2**63, 10**30])
def test_layers_that_no_model_has_take_no_memory(layers: int) -> None:
    with pytest.raises(UserError, match=f"num_hidden_layers is {layers:,}, and at most 10,000"):
        read_config({**PUBLISHED["gemma3-1b"], "num_hidden_layers": layers}, "config.json")
    with pytest.raises(UserError, match=f"num_layers is {layers:,}, and at most 10,000"):
        read_config({**PUBLISHED["gpt-neo-1.3b"], "num_layers": layers}, "config.json")
    with pytest.raises(UserError, match=rf"attention_types \[\[\['global'\], {layers}\]\] is not supported"):
        read_config({**PUBLISHED["gpt-neo-1.3b"], "attention_types": [[["global"], layers]]}, "config.json")


@pytest.mark.parametrize("scale", [2.0, 0.3, 168**-0.5])
def test_any_scale_of_attention_is_kept(scale: float) -> None:
    family, json = describe(gemma3.Config(attention_scale=scale))
    assert family.read(json).attention_scale == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_no_published_config_says_is_refused(scale: float) -> None:
    with pytest.raises(UserError, match=f"attention_scale is {scale}, and config.json holds 1 / its square"):
        describe(gemma3.Config(attention_scale=scale))


UNET = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}


@pytest.mark.parametrize(
    "wrong",
    [
        PUBLISHED["qwen3-0.6b"] | {"num_attention_heads": 0, "head_dim": None},
        PUBLISHED["gemma3-1b"] | {"query_pre_attn_scalar": 0},
        PUBLISHED["llama-7b"] | {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 0}},
        {"model_type": "UNet2DModel", "block_out_channels": [0], **UNET},
        {"model_type": "UNet2DModel", "block_out_channels": [], "down_block_types": [], "up_block_types": []},
    ],
)
def test_numbers_that_nothing_can_be_divided_by_are_one_sentence(wrong) -> None:
    with pytest.raises(UserError, match=f"config.json cannot be read as a '{wrong['model_type']}' model: "):
        read_config(wrong, "config.json")


def test_a_network_without_levels_is_one_sentence() -> None:
    none = {"block_out_channels": [], "down_block_types": [], "up_block_types": []}
    family, config = read_config({"model_type": "UNet2DConditionModel", **none}, "config.json")
    with pytest.raises(UserError, match="config.json describes a model that cannot be built: "):
        build(family, config, "config.json")


def test_a_head_that_turns_in_part_is_refused_with_its_part() -> None:
    with pytest.raises(UserError, match="partial_rotary_factor 0.25 is not supported"):
        read_config({**PUBLISHED["llama-7b"], "partial_rotary_factor": 0.25}, "config.json")


def test_two_scalings_that_differ_are_refused() -> None:
    """transformers 5 takes the old spelling, if both are there, and other readers the new one."""
    old, new = {"type": "yarn", "factor": 4.0}, {"rope_type": "default", "rope_theta": 1e4}
    for scaling, parameters in ((old, new), (old, {"rope_type": "yarn", "factor": 2.0})):
        json = {**PUBLISHED["llama-7b"], "rope_scaling": scaling, "rope_parameters": parameters}
        with pytest.raises(UserError, match="rope_parameters and rope_scaling in config.json name two scalings"):
            read_config(json, "config.json")
    both = {"rope_scaling": old, "rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 5e5}}
    found = read_config({**PUBLISHED["llama-7b"], **both}, "config.json")[1]
    assert found.rope_theta == 5e5 and found.rope_scaling.kind == "yarn"


@pytest.mark.parametrize(("n_layers", "interval"), [(9, 4), (7, 3), (4, 4), (3, 4)])
def test_layers_without_positions_that_a_config_does_not_list_are_those_of_transformers(
    n_layers: int, interval: int
) -> None:
    sizes = dict(num_hidden_layers=n_layers, hidden_size=16, num_attention_heads=4, num_key_value_heads=2)
    theirs = transformers.SmolLM3Config(**sizes, no_rope_layer_interval=interval)
    published = theirs.to_dict()
    uses = published.pop("no_rope_layers")
    expected = tuple(layer for layer, has_positions in enumerate(uses) if not has_positions)
    assert smollm3.position_free(smollm3.from_published(published)) == expected
    assert (len(expected) > 1) == (n_layers > 4)


REFUSED = {  # changes of a published config, and the words of the error
    ("exaone4-32b", "layer_types", ("chunked_attention",) * 64): "layer_types must be full_attention or sliding_attent",
    ("lfm2-1.2b", "layer_types", ("sliding_attention",) * 16): "layer_types must be full_attention or conv for each",
    ("smollm3-3b", "layer_types", ("full_attention",) * 35): "for each of 36 layers, not 35 of full_attention",
    ("smollm3-3b", "layer_types", ("sliding_attention",) * 36): "its sliding_window is not set",
    ("qwen3-next-80b-a3b", "layer_types", ("sliding_attention",) * 48): "must be full_attention or linear_attention",
    ("granite3-8b", "head_dim", 64): "sets head_dim to 64, which keifu does not implement for this model; only 128",
    ("gemma4-e2b", "use_bidirectional_attention", "all"): "use_bidirectional_attention is 'all', and only causal",
    ("gemma4-e2b", "per_layer_config", "0"): "its per_layer_config must give all layers with full attention",
    ("gemma4-e2b", "rope_parameters", "rope_type"): "its rope_parameters must be of full_attention and sliding_attent",
}


@pytest.mark.parametrize(("name", "setting", "value"), REFUSED)
def test_a_setting_that_is_not_implemented_is_refused_by_its_name(name: str, setting: str, value) -> None:
    wrong = {value: {"head_dim": 64}} if setting in ("per_layer_config", "rope_parameters") else value
    with pytest.raises(UserError, match=REFUSED[name, setting, value]):
        read_config({**PUBLISHED[name], setting: [*wrong] if isinstance(wrong, tuple) else wrong}, "config.json")


@pytest.mark.parametrize("shared", [35, 34, 31])
def test_layers_that_have_no_keys_to_share_are_refused(shared: int) -> None:
    family, config = read_config({**PUBLISHED["gemma4-e2b"], "num_kv_shared_layers": shared}, "config.json")
    with pytest.raises(UserError, match=f"The last {shared} of 35 layers share keys and values, but no earlier layer"):
        build(family, config, "config.json")
