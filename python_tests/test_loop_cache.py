"""LoopState: any split of a sequence streamed through the state gives the logits of one full forward."""

import copy
import logging
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.mixers import MIXERS
from lt2_ext.models.step import step

VOCAB, LENGTH = 64, 27
# Through the segments random blocks that are not much smaller than h would magnify any rounding.
CALM = {"norm_placement": "sandwich"}
KINDS = {
    "full": {"layer_pattern": "full"},
    "gdn": {"layer_pattern": "gdn"},
    "interleaved": {"layer_pattern": "interleaved:2:1:gdn:full"},
    "bookend": {"layer_pattern": "bookend:1:full:gdn"},
    "grouped": {
        "layer_pattern": "back:1:full:gdn",
        "num_key_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "sandwich": {"layer_pattern": "gdn,full,gdn", "norm_placement": "sandwich", "inter_loop_norm": True},
    "output_gate": {"layer_pattern": "full", "attn_output_gate": True},
    "window": {"layer_pattern": "window", "window_size": 5, "num_key_value_heads": 2},
    "window_hybrid": {"layer_pattern": "bookend:1:window:6:gdn"},
    "long_window": {"layer_pattern": "window", "window_size": 40},
    "dsa": {"layer_pattern": "dsa", "index_topk": 4, "index_head_dim": 16},
    "dsa_hybrid": {"layer_pattern": "interleaved:1:1:gdn:dsa", "index_topk": 5, "num_key_value_heads": 1},
    "dsa_reuse": {"layer_pattern": "dsa,window:6,dsa", "index_topk": 3, "state_reuse": "index:share"},
    "kv_first": {"layer_pattern": "gdn,full,full", "num_key_value_heads": 2, "state_reuse": "kv:first"},
    "kv_first_window": {"layer_pattern": "window:5,window:40,gdn", "state_reuse": "kv:first"},
    "kv_first_dsa": {"layer_pattern": "dsa", "index_topk": 4, "state_reuse": "kv:first"},
    "all_first": {"layer_pattern": "dsa,window:6,dsa", "index_topk": 3, "state_reuse": "kv:first,index:share"},
    "gdn_read": {"layer_pattern": "gdn", "state_reuse": "gdn:read"},
    "read_and_first": {"layer_pattern": "gdn,window:6,gdn", "state_reuse": "gdn:read,kv:first"},
    "segment": {"layer_pattern": "gdn", "state_reuse": "gdn:segment:5"} | CALM,
    "segment_of_one": {"layer_pattern": "back:1:full:gdn", "state_reuse": "gdn:segment:1"} | CALM,
    "segment_first": {"layer_pattern": "gdn,full,window:6", "state_reuse": "gdn:segment:9,kv:first"} | CALM,
    "dsa_warmup": {"layer_pattern": "dsa", "num_key_value_heads": 2},
    "dsa_wide": {"layer_pattern": "back:1:dsa:gdn", "index_topk": 40, "attn_output_gate": True},
    "schedule": {"layer_pattern": "full->window:9->window:5->window:3"},
    "hybrid_schedule": {"layer_pattern": "gdn,window:5,full->gdn,full,window:7->gdn,window:11,full->gdn,full,full"},
    "nsa": {"layer_pattern": "nsa", "nsa_block_size": 4, "nsa_block_count": 3, "nsa_window_size": 5} | {
        "num_key_value_heads": 2
    },
}
KINDS |= {name: {"layer_pattern": name} for name in MIXERS if name not in KINDS}


@pytest.fixture(autouse=True)
def _small(threads, monkeypatch):
    """Operators this small lose time to every further thread. Blocks of windows small enough to have several."""
    threads(1)
    monkeypatch.setattr("lt2_ext.models.mixers.attention.MIN_BLOCK", 4)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)  # dynamo would fill pytest's log


def make(kind: str, loops: int, seed: int = 0) -> LT2:
    """A small model in which nothing is left at zero."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape = sizes | KINDS[kind]
    pattern = "->".join(shape["layer_pattern"].split("->")[:loops])  # the first loops of a schedule
    model = LT2(LT2Config(**(shape | {"layer_pattern": pattern}), intermediate_size=48, loop_count=loops))
    model.dense_warmup = kind == "dsa_warmup"
    with torch.no_grad():
        model.rho.normal_(std=0.3)
        sandwich, step = model.config.norm_placement == "sandwich", 0.03 if model.config.reuse.segment else 0.3
        for block in model.layers:
            if getattr(block.mixer, "gate_proj", None) is not None:
                block.mixer.gate_proj.weight.normal_(std=0.3)
            if getattr(block.mixer, "read_gate", None) is not None:
                block.mixer.read_gate.normal_(std=0.5)
            if sandwich:  # smaller steps: random blocks as large as h itself magnify any rounding from loop to loop
                block.mixer_post_norm.weight.fill_(step)
                block.mlp_post_norm.weight.fill_(step)
    return model.eval()


def ids(rows: int, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def stream(model: LT2, x: torch.Tensor, split: list[int], state=None) -> torch.Tensor:
    state = model.new_state(x.shape[0], x.shape[1]) if state is None else state
    return torch.cat([model(piece, state=state) for piece in x.split(split, dim=1)], dim=1)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def random_split(rng: random.Random) -> list[int]:
    cuts = sorted(rng.sample(range(1, LENGTH), rng.randint(1, 6)))
    return [b - a for a, b in zip([0, *cuts], [*cuts, LENGTH], strict=True)]


@pytest.mark.parametrize("loops", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_any_split_equals_full_forward(kind, loops):
    model, x = make(kind, loops), ids(2)
    full = model(x)
    rng = random.Random(loops)
    # One piece, single tokens, step after prefill, prefill after steps, both sides of the step limit; then any.
    splits = [[27], [1] * 27, [20, 1, 1, 1, 4], [1, 2, 3, 21], [8, 9, 10], [9, 8, 10]]
    splits += [random_split(rng) for _ in range(4)]
    for split in splits:
        assert error(stream(model, x, split), full) < 1e-4, split


@pytest.mark.slow
@torch.no_grad()
def test_decoding_compiles_once():
    """Into one graph for the prefill and one for all steps, whatever the length."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    model, x = make("window_hybrid", 1), ids(2)
    compiled, state = torch.compile(model, fullgraph=True, backend=counter), model.new_state(2, LENGTH)
    got = [compiled(piece, state=state) for piece in x.split([15] + [1] * 12, dim=1)]
    assert counter.frame_count == 2
    assert error(torch.cat(got, dim=1), model(x)) < 1e-4


@pytest.mark.parametrize("kind", ["interleaved", "grouped", "window"])
@torch.no_grad()
def test_streaming_in_bfloat16(kind):
    """As near to the same weights in fp32 as a full forward is. The two do not round in the same places, so either may
    be nearer in one model, but not over several."""
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(10):
        model, x = make(kind, 2, seed).bfloat16(), ids(2, seed=seed)
        exact = copy.deepcopy(model).float()(x)
        outputs = stream(model, x, [12, 3, 1, 11]), model(x)
        squares += torch.tensor([error(o.float(), exact) ** 2 for o in outputs])
    assert squares[0] < 1.05**2 * squares[1]


@torch.no_grad()
def test_logits_to_keep_advances_the_whole_piece():
    model, x = make("interleaved", 2), ids(2)
    full, state = model(x), model.new_state(2, LENGTH)
    last = model(x[:, :20], state=state, logits_to_keep=1)
    assert last.shape == (2, 1, VOCAB)
    assert error(last, full[:, 19:20]) < 1e-4
    assert error(model(x[:, 20:], state=state, logits_to_keep=2), full[:, -2:]) < 1e-4
    assert state.lengths.tolist() == state.host_lengths == [LENGTH, LENGTH]


@pytest.mark.parametrize("kind", ["full", "gdn", "interleaved", "window"])
@torch.no_grad()
def test_reset_slot_starts_a_new_sequence_beside_a_running_one(kind):
    """Rows of different age; the restarted row must not see its predecessor, not even a NaN of it."""
    model = make(kind, 2)
    old, new = ids(2, 12), ids(1, 15, seed=2)
    state = model.new_state(2, LENGTH)
    model(old, state=state)
    for loop in state.layers:
        for layer in loop:
            for tensor in layer.values():
                tensor[1] = torch.nan
    state.reset([1])
    assert state.lengths.tolist() == state.host_lengths == [12, 0]
    both = torch.cat([old[:1].roll(3, dims=1).repeat(1, 2)[:, :15], new])
    for split in ([11, 4], [1, 14]):
        fresh = model.new_state(2, LENGTH)
        model(old, state=fresh)
        fresh.reset([1])
        got = stream(model, both, split, fresh)
        assert error(got[:1], model(torch.cat([old[:1], both[:1]], dim=1))[:, 12:]) < 1e-4
        assert error(got[1:], model(new)) < 1e-4
    got = stream(model, both, [2, 13], state)
    assert error(got[1:], model(new)) < 1e-4


@torch.no_grad()
def test_reset_all_equals_new_state_and_leaves_no_trace():
    model, x = make("interleaved", 2), ids(2)
    state = model.new_state(2, LENGTH)
    first = stream(model, x, [10, 17], state)
    state.reset()
    assert state.lengths.tolist() == state.host_lengths == [0, 0]
    assert all(not t.any() for loop in state.layers for layer in loop for t in layer.values())
    assert torch.equal(stream(model, x, [10, 17], state), first)


@pytest.mark.parametrize("kind", ["full", "gdn", "window", "hybrid_schedule"])
@torch.no_grad()
def test_reorder_moves_sequences_of_any_length_between_slots(kind):
    model, state = make(kind, 2), make(kind, 2).new_state(3, LENGTH)
    first, second, third = ids(3, 9), ids(3, 4, seed=2), ids(3, 7, seed=3)
    model(first, state=state)
    state.reset([1])
    model(second, state=state)
    state.reorder(torch.tensor([1, 0, 1], dtype=torch.int32))
    assert state.lengths.tolist() == state.host_lengths == [4, 13, 4]
    got = model(third, state=state)
    pasts = [second[1], torch.cat((first[0], second[0])), second[1]]
    for row, past in enumerate(pasts):
        assert error(got[row], model(torch.cat((past, third[row]))[None])[0, len(past) :]) < 1e-4
    with pytest.raises(ValueError, match=r"LoopState.reorder: order must have shape \[3\], got \[2\]"):
        state.reorder(torch.tensor([0, 1]))


@torch.no_grad()
def test_two_states_do_not_touch_each_other():
    model, x, y = make("interleaved", 2), ids(1), ids(1, seed=3)
    a, b = model.new_state(1, LENGTH), model.new_state(1, LENGTH)
    got = {"a": [], "b": []}
    for i in range(0, LENGTH, 3):
        got["a"].append(model(x[:, i : i + 3], state=a))
        got["b"].append(model(y[:, i : i + 3], state=b))
    assert error(torch.cat(got["a"], dim=1), model(x)) < 1e-4
    assert error(torch.cat(got["b"], dim=1), model(y)) < 1e-4


def snapshot(state):
    return [t.clone() for loop in state.layers for layer in loop for t in layer.values()] + [state.lengths.clone()]


@pytest.mark.parametrize("count", [8, 20])
def test_overflow_is_refused_and_changes_nothing(count):
    model, x = make("interleaved", 2), ids(2)
    state = model.new_state(2, 12)
    model(x[:, :5], state=state)
    before = snapshot(state)
    with pytest.raises(ValueError, match=rf"input_ids must fit max_length = 12 .* holds 5 tokens, got {count} more"):
        model(x[:, 5 : 5 + count], state=state)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(state), strict=True))
    assert state.host_lengths == [5, 5]
    assert error(model(x[:, 5:12], state=state), model(x[:, :12])[:, 5:]) < 1e-4  # exactly full is allowed


@pytest.mark.parametrize("kind", ["interleaved", "gdn"])
def test_wrong_token_leaves_the_state_unchanged(kind):
    model, x = make(kind, 2), ids(2)
    state = model.new_state(2, LENGTH)
    model(x[:, :5], state=state)
    before = snapshot(state)
    with pytest.raises(IndexError):
        model(torch.full((2, 3), VOCAB), state=state)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(state), strict=True))


def test_state_is_inference_only():
    model, x = make("interleaved", 2), ids(2)
    state = model.new_state(2, LENGTH)
    for piece in x.split([12, 15], dim=1):
        assert not model(piece, state=state).requires_grad
    assert all(not t.requires_grad for loop in state.layers for layer in loop for t in layer.values())
    assert model(x).requires_grad


def test_memory_is_what_the_geometry_says():
    model = make("bookend", 4)
    state, config = model.new_state(3, 50), model.config
    full = 4 * 3 * 2 * 50 * config.hidden_size * 4
    matrix = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    channels = 4 * (2 * config.linear_key_head_dim + config.linear_value_head_dim)
    gdn = 4 * 3 * (matrix + channels * config.linear_conv_kernel_dim) * 4
    assert state.layer_nbytes == [("full", full), ("gdn", gdn), ("full", full)]
    assert state.nbytes == 2 * full + gdn
    assert len(state.layers) == 4


def test_a_window_holds_no_more_than_itself():
    model = make("schedule", 4)
    state, row = model.new_state(3, 50), 3 * 2 * model.config.hidden_size * 4
    assert [[t["k"].shape[1] for t in loop] for loop in state.layers] == [[50] * 3, [9] * 3, [5] * 3, [3] * 3]
    assert state.layer_nbytes == [("full", row * (50 + 9 + 5 + 3))] * 3
    assert model.new_state(1, 4).layers[1][0]["k"].shape[1] == 4


def test_dtypes_follow_the_model_except_the_matrix():
    state = make("bookend", 1).bfloat16().new_state(1, 4)
    assert {name: t.dtype for layer in state.layers[0] for name, t in layer.items()} == {
        "k": torch.bfloat16,
        "v": torch.bfloat16,
        "matrix": torch.float32,
        "conv": torch.bfloat16,
    }


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"max_length": 0}, {"max_length": 2.5}, {"batch_size": True}])
def test_bad_state_size(bad):
    (name, value), model = next(iter(bad.items())), make("gdn", 1)
    with pytest.raises(ValueError, match=f"LoopState: {name} must be a positive integer, got {value}"):
        model.new_state(**({"batch_size": 1, "max_length": 1} | bad))


def test_misuse():
    model, x = make("gdn", 1), ids(2)
    state = model.new_state(2, LENGTH)
    with pytest.raises(ValueError, match="input_ids must have the 2 rows of the state, got"):
        model(x[:1], state=state)
    with pytest.raises(ValueError, match="state must be None when labels are given"):
        model(x, labels=x, state=state)
    with pytest.raises(ValueError, match="state must be None when cu_seqlens is given"):
        model(x[:1], cu_seqlens=torch.tensor([0, LENGTH]), state=model.new_state(1, LENGTH))
    with pytest.raises(ValueError, match="state must come from new_state of this model"):
        make("gdn", 2)(x, state=state)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="state must be used without autocast"):
        model(x, state=state)
    with pytest.raises(ValueError, match=r"slots must be integers in 0\.\.1, got 2"):
        state.reset([0, 2])
    assert state.host_lengths == [0, 0]


class Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_bias(linear):
    linear.bias = torch.nn.Parameter(torch.randn(linear.out_features))


CHANGES = {
    "subclass": lambda linear: setattr(linear, "__class__", Doubled),
    "wrapper": None,
    "hook": lambda linear: linear.register_forward_hook(lambda module, args, out: 2 * out),
    "pre_hook": lambda linear: linear.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "bias": with_bias,
}


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_projections_that_are_not_plain_are_called(change):
    """A decode step reads the weights of plain ones itself."""
    model, x = make("interleaved", 2), ids(2)
    taken = []

    def counted(*args, original=step):
        taken.append(1)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lt2_ext.models.lt2.step", counted)
        before = stream(model, x, [20, 1, 1, 5])
        assert len(taken) == 3 * 2 * 3  # calls, loops, layers
        taken.clear()
        for block in model.layers:
            for parent, name in ((block.mixer, "o_proj"), (block.mlp, "up_proj")):
                linear = getattr(parent, name)
                if change == "wrapper":
                    setattr(parent, name, torch.nn.Sequential(linear, torch.nn.Tanh()))
                else:
                    CHANGES[change](linear)
        after = stream(model, x, [20, 1, 1, 5])
        assert not taken
    assert error(after, model(x)) < 1e-4
    assert error(after, before) > 0.1
