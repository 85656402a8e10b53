"""LT2Config: the grammar of layer_pattern, defaults, and the text of every refusal."""

import json

import pytest
import torch

from lt2_ext.models import LT2, LT2Config

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}


def types(pattern: str, layers: int) -> list[str]:
    return LT2Config(**(SIZES | {"num_hidden_layers": layers, "layer_pattern": pattern})).layer_types


@pytest.mark.parametrize(
    "pattern, layers, expected",
    [
        ("gdn", 3, "ggg"),
        ("full", 1, "f"),
        ("gdn,gdn,full", 3, "ggf"),
        ("interleaved:4:1:gdn:full", 10, "ggggfggggf"),
        ("interleaved:1:2:full:gdn", 5, "fggfg"),
        ("interleaved:4:1:gdn:full", 3, "ggg"),
        ("bookend:1:full:gdn", 4, "fggf"),
        ("bookend:2:full:gdn", 4, "ffff"),
        ("front:2:full:gdn", 5, "ffggg"),
        ("back:1:full:gdn", 4, "gggf"),
    ],
)
def test_layer_pattern(pattern, layers, expected):
    assert "".join(name[0] for name in types(pattern, layers)) == expected


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("full->window:512->window:256->window:128", ["f f f", "512 512 512", "256 256 256", "128 128 128"]),
        ("full->window->full->window", ["f f f", "7 7 7", "f f f", "7 7 7"]),
        ("bookend:1:window:512:gdn->full,gdn,window->window,gdn,full->bookend:1:full:gdn",
         ["512 g 512", "f g 7", "7 g f", "f g f"]),
        ("interleaved:1:1:window:full", ["7 f 7"] * 4),
        ("interleaved:1:1:window:3:window:9", ["3 9 3"] * 4),
        ("gdn,window:12,window", ["g 12 7"] * 4),
    ],
)  # fmt: skip
def test_schedule_over_loops(pattern, expected):
    config = LT2Config(**(SIZES | {"num_hidden_layers": 3, "layer_pattern": pattern, "window_size": 7}))
    got = [" ".join(str(layer.window or layer.mixer[0]) for layer in loop) for loop in config.schedule()]
    assert got == expected
    assert all((layer.mixer == "window") == (layer.window is not None) for loop in config.schedule() for layer in loop)
    assert config.layer_types == [layer.mixer for layer in config.schedule()[0]]


def test_interleaved_is_cut_at_the_depth():
    """The authors' 1.3B hybrid: 21 layers of 4:1 are 17 gdn and 4 full, and the last one is gdn."""
    layers = types("interleaved:4:1:gdn:full", 21)
    assert (layers.count("gdn"), layers.count("full"), layers[-1]) == (17, 4, "gdn")


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("mamba", "unknown mixer 'mamba'.*known: full, window, .*gdn, .*window:SIZE"),
        ("gdn,,full,gdn", "unknown mixer ''.*known: full, window, .*gdn, .*window:SIZE"),
        ("interleaved:9:1:gdn:ful", "unknown mixer 'ful'.*known: full, window, .*gdn, .*window:SIZE"),
        ("gdn,full", "lists 2 layers, num_hidden_layers is 4"),
        ("sandwich:1:full:gdn", "unknown form 'sandwich'.*known: interleaved, bookend, front, back"),
        ("interleaved:4:gdn:full", "must have the form interleaved:N:M:FIRST:SECOND"),
        ("interleaved:0:1:gdn:full", "must have the form interleaved:N:M:FIRST:SECOND with counts in 1..9999"),
        ("interleaved:-1:1:gdn:full", "counts in 1..9999"),
        ("bookend:99999:full:gdn", "counts in 1..9999"),
        ("bookend:3:full:gdn", "needs at least 6 layers, got 4"),
        ("front:5:full:gdn", "needs at least 5 layers, got 4"),
        ("full:512", "unknown mixer 'full:512'.*known: full, window, .*gdn, .*window:SIZE"),
        ("window:512,gdn,ful,gdn", "unknown mixer 'ful'.*known: full, window, .*gdn, .*window:SIZE"),
        ("window:0", r"window:SIZE in 'window:0' must have a SIZE in 1\.\.1048576, got '0'"),
        ("window:1048577", r"must have a SIZE in 1\.\.1048576, got '1048577'"),
        ("interleaved:1:1:gdn:window:", "must have the form interleaved:N:M:FIRST:SECOND"),
        ("window:,gdn,gdn,gdn", r"must have a SIZE in 1\.\.1048576, got ''"),
        ("full->window:512->window:256", "lists 3 loops, loop_count is 4"),
        ("full->full->full->", "unknown mixer ''.*known: full, window, .*gdn, .*window:SIZE"),
        ("full->full->full->swa", "unknown mixer 'swa'.*known: full, window, .*gdn, .*window:SIZE"),
        ("full->gdn->full->gdn", "layer 0 of .* is full and gdn, which share no weights"),
        ("full->full->full->back:1:full:gdn", "layer 0 of .* is full and gdn, which share no weights"),
    ],
)
def test_bad_layer_pattern(pattern, message):
    with pytest.raises(ValueError, match=f"layer_pattern: .*{message}"):
        types(pattern, 4)


def test_defaults():
    config = LT2Config(vocab_size=64, hidden_size=1024, num_hidden_layers=2, num_attention_heads=8)
    assert (config.num_key_value_heads, config.intermediate_size, config.head_dim) == (8, 2816, 128)
    assert (config.linear_num_key_heads, config.linear_num_value_heads) == (8, 8)
    assert (config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim) == (96, 192, 4)
    odd = LT2Config(vocab_size=64, hidden_size=36, num_hidden_layers=2, num_attention_heads=2, linear_num_value_heads=4)
    assert (odd.linear_num_key_heads, odd.linear_key_head_dim, odd.linear_value_head_dim) == (2, 16, 32)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_size": 0}, r"vocab_size must be an integer in 1\.\.16777216, got 0"),
        ({"hidden_size": -32}, "hidden_size must be an integer in .*, got -32"),
        ({"hidden_size": 2**31}, "hidden_size must be an integer in .*, got 2147483648"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer in .*, got 1000000000"),
        ({"num_hidden_layers": 2.0}, r"num_hidden_layers must be an integer in .*, got 2\.0"),
        ({"num_attention_heads": True}, "num_attention_heads must be an integer in .*, got True"),
        ({"loop_count": 0}, r"loop_count must be an integer in 1\.\.8, got 0"),
        ({"window_size": 0}, r"window_size must be an integer in 1\.\.1048576, got 0"),
        ({"loop_count": 9}, r"loop_count must be an integer in 1\.\.8, got 9"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide hidden_size = 32, got 5"),
        ({"num_attention_heads": 32}, "hidden_size must be an even multiple of num_attention_heads = 32, got 32"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads = 4, got 3"),
        ({"linear_num_value_heads": 6}, "linear_num_value_heads must be a multiple of linear_num_key_heads = 4, got 6"),
        ({"linear_num_key_heads": 0}, "linear_num_key_heads must be an integer in"),
        ({"linear_key_head_dim": 512}, r"linear_key_head_dim must be an integer in 1\.\.256, got 512"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim must be an integer in"),
        ({"rope_theta": 0.0}, r"rope_theta must be a positive number, got 0\.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, got nan"),
        ({"norm_placement": "post"}, "norm_placement must be 'pre' or 'sandwich', got 'post'"),
        ({"inter_loop_norm": 1}, "inter_loop_norm must be true or false, got 1"),
        ({"attn_output_gate": "yes"}, "attn_output_gate must be true or false, got 'yes'"),
        ({"layer_pattern": 7}, "layer_pattern must be a string, got 7"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(ValueError, match=f"LT2Config: {message}"):
        LT2Config(**(SIZES | change))


def test_dict_round_trip():
    config = LT2Config(
        **SIZES,
        layer_pattern="bookend:1:full:gdn",
        loop_count=2,
        rope_theta=5e5,
        norm_placement="sandwich",
        inter_loop_norm=True,
    )
    assert LT2Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "values, message",
    [
        (SIZES | {"loop_counts": 2}, "unknown key 'loop_counts'; did you mean 'loop_count'?"),
        (SIZES | {"xyzzy": 2}, "unknown key 'xyzzy'; known keys: vocab_size, hidden_size"),
        (SIZES | {"model_type": "llama"}, "model_type must be 'lt2', got 'llama'"),
        ({"vocab_size": 64, "hidden_size": 32}, "missing num_hidden_layers, num_attention_heads"),
        ([1], "a config must be an object of names and values, got list"),
    ],
)
def test_bad_dict(values, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        LT2Config.from_dict(values)


@pytest.mark.parametrize(
    "hidden, layers, heads, pattern, millions",
    [
        (1024, 21, 8, "gdn", 445.78),
        (1024, 25, 16, "full", 452.52),
        (2048, 22, 8, "gdn", 1578.95),
        (2048, 21, 16, "interleaved:4:1:gdn:full", 1485.89),
    ],
)
def test_sizes_of_the_published_models(hidden, layers, heads, pattern, millions):
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = LT2Config(vocab_size=128256, layer_pattern=pattern, **sizes)
    with torch.device("meta"):
        model = LT2(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions
