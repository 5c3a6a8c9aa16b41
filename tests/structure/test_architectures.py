"""Networks of the catalogue: specs are proved, permuted copies matched back, programs run.

A network is traced once for all tests of this file.
"""

import importlib.util
import json
import os
from collections import Counter
from functools import cache

import pytest
import torch
from torch.testing import assert_close

from evaluation.benchmarks.architectures import OWN, TRANSFORMERS
from metamerge.alignment.weight_matching import weight_matching
from metamerge.structure import Concat, PermutationSpec, discover_program, run, trace

# Wired like another one of the catalogue but for a few operators; the benchmark has them all.
TWINS = {
    *("roberta", "electra", "mistral", "qwen2", "gemma", "deit", "dinov2", "clip_vision"),
    *("convnext", "mobilenet_v1", "pvt_v2", "hubert"),
    *("mobilenet_v2", "resnet"),  # blocks of mobilevit and efficientnet; of resnet20 and bit
    *("pvt", "swin", "ast"),  # segformer; swinv2, with beit's table of positions; vit
    *("pegasus", "t5_gated"),  # whisper, bart; t5, with llama's gates
    *("phi", "stablelm", "gpt_neo"),  # gptj; gpt_neox and llama; gpt2 and opt
    "mpnet",  # bert, with t5's table of positions
}
CATALOGUE = {name: make for name, make in (OWN | TRANSFORMERS).items() if name not in TWINS}
NOISE = 0.01  # of the standard deviation of each tensor, far less than units differ by


def built(name):
    """A network and its example inputs; without its package, CI fails and others go on."""
    if name in TRANSFORMERS and importlib.util.find_spec("transformers") is None:
        message = f"{name} is a model of the transformers package, which is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return (OWN | TRANSFORMERS)[name]()


# Three groups of a convolution, shuffled into three groups of eight channels: 8 is no multiple of
# 3, so that no two channels come from the same group and go to the same place of another.
SHARES = {"shufflenet": 0.5}


@cache
def traced(name):
    """A network, its example inputs and its program."""
    model, example = built(name)
    return model, example, trace(model, example)


@cache
def proved(name):
    """State dict and spec of a network."""
    model, _, program = traced(name)
    spec = discover_program(program)
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}, spec


def noised(weights, generator):
    return {
        key: t + NOISE * t.std(correction=0) * torch.randn(t.shape, generator=generator)
        if t.is_floating_point()
        else t
        for key, t in weights.items()
    }


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_network_is_proved_and_its_permuted_and_noised_copy_is_matched_back(name):
    weights, spec = proved(name)
    assert spec.pinned == ()
    assert len(spec.groups) >= 1
    assert min(spec.groups.values()) > 1
    assert all(spec.touching(group) for group in spec.groups)
    assert spec.free_share >= SHARES.get(name, 0.9)
    assert PermutationSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec

    generator = torch.Generator().manual_seed(3)
    perm = spec.random(generator)
    permuted = spec.permute(weights, perm)
    assert any(not torch.equal(permuted[key], weights[key]) for key in spec.axes)
    back = spec.unpermute(permuted, perm)
    assert all(torch.equal(back[key], tensor) for key, tensor in weights.items())

    copy = noised(permuted, generator)
    family = {key: torch.stack([weights[key], copy[key]])[None] for key in spec.axes}
    found = weight_matching(family, spec)
    one, other = ({group: index[0, i] for group, index in found.items()} for i in range(2))
    aligned = spec.permute({key: weights[key] for key in spec.axes}, one)
    matched = spec.permute({key: permuted[key] for key in spec.axes}, other)
    assert [key for key in spec.axes if not torch.equal(aligned[key], matched[key])] == []


def test_the_catalogue_is_wide_and_most_of_its_hidden_units_are_free():
    assert not OWN.keys() & TRANSFORMERS.keys()
    assert len(CATALOGUE) >= 40
    assert len(TRANSFORMERS) >= 25
    shares = [proved(name)[1].free_share for name in CATALOGUE]
    assert sum(shares) / len(shares) >= 0.9


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail), ("", pytest.skip)])
def test_a_missing_package_fails_in_ci_and_is_skipped_elsewhere(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(outcome.Exception, match="bert is a model of the transformers package"):
        built("bert")
    assert built("mlp")


# ---------------------------------------------------------------------------- programs

FOLLOWED = [
    *("prelu_mlp", "weight_norm_mlp", "gated_mlp", "siren", "vgg", "mobilenet", "group_norm_net"),
    *("audio_net", "video_net", "autoencoder", "super_resolution", "resnext", "densenet", "unet"),
    *("squeeze_excitation", "shufflenet", "mixer", "encoder_pre_norm", "cross_attention"),
    *("einsum_attention", "tied_language_model", "bilinear", "two_towers", "two_outputs"),
    *("gcn", "gin", "graph_sage", "gat"),
    *("bert", "gpt2", "llama", "deberta", "swin", "mamba"),
]
RECURRENT = ["lstm_tagger", "gru_classifier"]
COUNT = 3  # networks that run side by side


@pytest.mark.parametrize("name", [*FOLLOWED, *RECURRENT])
def test_programs_compute_what_their_modules_do(name):
    model, inputs, program = traced(name)
    named = isinstance(inputs, dict)
    with torch.no_grad():
        expected = model(**inputs) if named else model(*inputs)
        found = run(program, model.state_dict(), [*(inputs.values() if named else inputs)])
    expected = getattr(expected, "logits", expected)
    expected = expected[0] if isinstance(expected, tuple) else expected
    assert found.shape == expected.shape
    # Up to a hundred operators, each rounded to 1e-7 of what it puts out.
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


def stacked(name):
    """A network in float64: program, three sets of weights, inputs."""
    model, inputs, program = traced(name)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, tensor in model.state_dict().items():
        weights[key] = tensor.expand(COUNT, *tensor.shape)
        if tensor.is_floating_point():
            noise = torch.rand(weights[key].shape, generator=generator)
            weights[key] = tensor.double() * (1 + 0.1 * noise)
    given = inputs.values() if isinstance(inputs, dict) else inputs
    inputs = [x.double() if x.is_floating_point() else x for x in given]
    return program.in_float64(), weights, inputs


def one_by_one(program, weights, inputs):
    own = [{key: tensor[n] for key, tensor in weights.items()} for n in range(COUNT)]
    return torch.stack([run(program, member, inputs) for member in own])


@pytest.mark.parametrize("name", FOLLOWED)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_stacked_networks_agree_with_a_loop_over_them(name):
    program, weights, inputs = stacked(name)
    found = run(program, weights, inputs, stacked=True)
    expected = one_by_one(program, weights, inputs)
    assert found.shape == expected.shape
    # Up to a hundred layers deep, each of which may double a difference of 1e-16 or so.
    assert float((found - expected).norm()) < 1e-10 * float(expected.norm())
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_networks_run_one_after_the_other(name):
    program, weights, inputs = stacked(name)
    found = run(program, weights, inputs, stacked=True)
    assert_close(found, one_by_one(program, weights, inputs))


# ---------------------------------------------------------------------------- by hand


def sizes(spec):
    """How many groups there are of each size, nested ones as ``(size, sizes of the blocks)``."""
    return Counter((n, spec.blocks(g)) if spec.outer(g) else n for g, n in spec.groups.items())


def at(spec, key, axis):
    """Factors of an axis, outermost first: names of groups, and reasons of what is fixed."""

    def named(factors):
        return [
            [named(part) for part in f.axes] if isinstance(f, Concat) else f.group or f.reason
            for f in factors
        ]

    return named(spec.axes[key][axis])


def test_resnet20_has_three_streams_and_one_group_inside_each_of_its_nine_blocks():
    _, spec = proved("resnet20")
    assert sizes(spec) == {8: 4, 16: 4, 32: 4}
    streams = [spec.row_group(f"{block}.second.0.weight") for block in range(2, 11)]
    assert streams == ["0.0"] * 3 + ["5.second.0"] * 3 + ["8.second.0"] * 3
    inner = [spec.row_group(f"{block}.first.0.weight") for block in range(2, 11)]
    assert len({*inner, *streams}) == 12
    for block in range(2, 11):  # in between, nothing but the convolutions and their statistics
        names = {key for key, _ in spec.touching(inner[block - 2])}
        statistics = ("weight", "bias", "running_mean", "running_var")
        assert names == {
            *(f"{block}.first.1.{own}" for own in statistics),
            f"{block}.first.0.weight",
            f"{block}.second.0.weight",
        }
    assert at(spec, "8.shortcut.0.weight", 0) == ["8.second.0"]
    assert at(spec, "8.shortcut.0.weight", 1) == ["5.second.0"]
    assert at(spec, "13.weight", 1) == ["8.second.0"]
    assert at(spec, "13.weight", 0) == ["outputs"]
    assert at(spec, "0.0.weight", 1) == ["inputs"]


def test_resnext_has_groups_of_channels_and_channels_nested_in_them():
    _, spec = proved("resnext")
    assert sizes(spec) == {6: 1, 4: 1, (4, (4,)): 3}
    (blocks,) = [g for g, n in spec.groups.items() if n == 4 and not spec.outer(g)]
    stream = at(spec, "5.weight", 1)
    assert stream[0] == blocks
    assert stream == at(spec, "1.shortcut.0.weight", 0) == at(spec, "2.second.0.weight", 0)
    for block in ("1", "2"):
        made = at(spec, f"{block}.first.0.weight", 0)
        assert made[0] == blocks
        assert made != stream
        # a grouped convolution reads the channels of its own group alone
        assert at(spec, f"{block}.second.0.weight", 1) == made[1:]
        assert spec.outer(made[1]) == (blocks,)


def test_unet_reads_its_skips_behind_what_comes_from_below():
    _, spec = proved("unet")
    assert sizes(spec) == {8: 1, 12: 1, 20: 1, 14: 1, 10: 1, 9: 1}
    assert at(spec, "rise.0.weight", 1) == [[["coarse.0"], ["middle.0"]]]
    assert at(spec, "out.0.0.weight", 1) == [[["up"], ["fine.0"]]]
    assert at(spec, "up.weight", 0) == ["rise.0"]  # transposed: channels in come first
    assert at(spec, "up.weight", 1) == ["up"]
    assert at(spec, "middle.0.weight", 1) == ["fine.0"]


def test_lstm_tagger_moves_all_gates_of_a_unit_and_both_directions_on_their_own():
    _, spec = proved("lstm_tagger")
    assert sizes(spec) == {14: 1, 10: 4}
    gates = "gates of a recurrent layer"
    for layer in range(2):
        units = [at(spec, f"lstm.weight_hh_l{layer}{way}", 1)[0] for way in ("", "_reverse")]
        assert len({*units}) == 2
        for way, own in zip(("", "_reverse"), units, strict=True):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                assert at(spec, f"lstm.{kind}_l{layer}{way}", 0) == [gates, own]
        readers = (["lstm.weight_ih_l1", "lstm.weight_ih_l1_reverse"], ["out.weight"])
        for key in readers[layer]:
            assert at(spec, key, 1) == [[[own] for own in units]]
    assert at(spec, "embedding.weight", 1) == at(spec, "lstm.weight_ih_l0", 1)
    assert at(spec, "embedding.weight", 0) == ["entries are looked up by number"]


def check_attention_block(spec, query, key, value, out, *, heads, units):
    """Heads, with units of queries and keys, and of values, nested in them."""
    asked, kept = at(spec, f"{query}.weight", 0), at(spec, f"{value}.weight", 0)
    assert asked[0] == kept[0]
    assert asked[1] != kept[1]
    assert at(spec, f"{key}.weight", 0) == at(spec, f"{key}.bias", 0) == asked
    assert at(spec, f"{query}.bias", 0) == asked
    assert at(spec, f"{value}.bias", 0) == at(spec, f"{out}.weight", 1) == kept
    assert spec.groups[asked[0]] == heads
    for nested in (asked[1], kept[1]):
        assert spec.groups[nested] == units
        assert spec.outer(nested) == (asked[0],)


def test_bert_has_one_stream_and_in_each_layer_heads_and_a_hidden_layer():
    _, spec = proved("bert")
    assert sizes(spec) == {32: 2, 4: 2, (8, (4,)): 4, 56: 2}
    (stream,) = at(spec, "bert.embeddings.word_embeddings.weight", 1)
    for table in ("position_embeddings", "token_type_embeddings"):
        assert at(spec, f"bert.embeddings.{table}.weight", 1) == [stream]
    for layer in ("bert.encoder.layer.0", "bert.encoder.layer.1"):
        names = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        for name in names:
            assert at(spec, f"{name}.weight", 1) == [stream]
        check_attention_block(spec, *names, f"{layer}.attention.output.dense", heads=4, units=8)
        assert at(spec, f"{layer}.attention.output.dense.weight", 0) == [stream]
        (feed,) = at(spec, f"{layer}.intermediate.dense.weight", 0)
        assert spec.groups[feed] == 56
        assert at(spec, f"{layer}.output.dense.weight", 1) == [feed]
        assert at(spec, f"{layer}.output.dense.weight", 0) == [stream]
        assert at(spec, f"{layer}.output.LayerNorm.bias", 0) == [stream]
    (pooled,) = at(spec, "bert.pooler.dense.weight", 0)
    assert pooled != stream
    assert at(spec, "bert.pooler.dense.weight", 1) == [stream]
    assert at(spec, "classifier.weight", 1) == [pooled]
    assert at(spec, "classifier.weight", 0) == ["outputs"]


def test_albert_has_one_layer_that_is_used_twice():
    weights, spec = proved("albert")
    assert sizes(spec) == {18: 1, 32: 2, 4: 1, (8, (4,)): 2, 56: 1}
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    names = [f"{layer}.attention.{part}" for part in ("query", "key", "value", "dense")]
    check_attention_block(spec, *names, heads=4, units=8)
    # what goes into the layer comes out of it, so both are one stream
    (stream,) = at(spec, f"{layer}.attention.query.weight", 1)
    assert at(spec, f"{layer}.ffn_output.weight", 0) == [stream]
    assert at(spec, "albert.encoder.embedding_hidden_mapping_in.weight", 0) == [stream]
    assert spec.groups[at(spec, "albert.encoder.embedding_hidden_mapping_in.weight", 1)[0]] == 18
    assert set(spec.axes) <= set(weights)


def test_gpt2_has_queries_keys_and_values_behind_each_other_in_one_matrix():
    _, spec = proved("gpt2")
    assert sizes(spec) == {32: 1, 4: 2, (8, (4,)): 4, 56: 2}
    (stream,) = at(spec, "transformer.wte.weight", 1)
    assert at(spec, "transformer.wpe.weight", 1) == at(spec, "lm_head.weight", 1) == [stream]
    assert spec.axes["lm_head.weight"] == spec.axes["transformer.wte.weight"]
    for layer in ("transformer.h.0", "transformer.h.1"):
        ((query, key, value),) = at(spec, f"{layer}.attn.c_attn.weight", 1)
        assert at(spec, f"{layer}.attn.c_attn.bias", 0) == [[query, key, value]]
        assert query == key
        heads, units = query
        assert value[0] == heads
        assert value[1] != units
        assert spec.outer(units) == spec.outer(value[1]) == (heads,)
        assert at(spec, f"{layer}.attn.c_proj.weight", 0) == value
        assert at(spec, f"{layer}.attn.c_proj.weight", 1) == [stream]
        assert at(spec, f"{layer}.attn.c_attn.weight", 0) == [stream]
        assert at(spec, f"{layer}.mlp.c_fc.weight", 1) == at(spec, f"{layer}.mlp.c_proj.weight", 0)


def test_llama_has_heads_of_queries_in_heads_of_keys_and_rotated_units_in_place():
    _, spec = proved("llama")
    assert sizes(spec) == {32: 1, 2: 2, (2, (2,)): 2, (8, (2,)): 2, 56: 2}
    (stream,) = at(spec, "model.embed_tokens.weight", 1)
    assert at(spec, "lm_head.weight", 1) == at(spec, "model.norm.weight", 0) == [stream]
    for layer in ("model.layers.0", "model.layers.1"):
        heads, served, *rotated = at(spec, f"{layer}.self_attn.q_proj.weight", 0)
        assert spec.outer(served) == (heads,)
        assert at(spec, f"{layer}.self_attn.k_proj.weight", 0) == [heads, *rotated]
        assert rotated == [[["constants"], ["constants"]]]  # each half by its own angles
        own, units = at(spec, f"{layer}.self_attn.v_proj.weight", 0)
        assert own == heads
        assert spec.outer(units) == (heads,)
        assert at(spec, f"{layer}.self_attn.o_proj.weight", 1) == [heads, served, units]
        (feed,) = at(spec, f"{layer}.mlp.gate_proj.weight", 0)
        assert at(spec, f"{layer}.mlp.up_proj.weight", 0) == [feed]
        assert at(spec, f"{layer}.mlp.down_proj.weight", 1) == [feed]
        for part in ("q_proj", "k_proj", "v_proj"):
            assert at(spec, f"{layer}.self_attn.{part}.weight", 1) == [stream]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("distilbert", {32: 2, 4: 2, (8, (4,)): 4, 56: 2}),
        ("vit", {32: 1, 4: 2, (8, (4,)): 4, 56: 2}),
        ("two_outputs", {24: 1, 18: 1, 9: 1}),
        ("densenet", {8: 1, 6: 5, 10: 1}),
        ("gated_mlp", {14: 1, 18: 1}),
        # heads are an axis of the weights beside that of the units, which move alike in all of them
        ("einsum_attention", {18: 1, 3: 1, 8: 2}),
        ("squeeze_excitation", {12: 1, 7: 1, 9: 1}),
    ],
)
def test_groups_of_well_known_networks_have_the_sizes_of_their_parts(name, expected):
    assert sizes(proved(name)[1]) == expected


def test_channels_that_a_shuffle_leaves_in_place_are_not_counted_as_free():
    # The shuffle takes the 24 channels of the first grouped convolution apart, one by one.
    _, spec = proved("shufflenet")
    assert all(not place for place in spec.places("first.weight", 0))
    assert spec.hidden[0] >= spec.hidden[1] + 24
