"""What loops of a layer may hand on: the grammar, what leaks the future and what does not, memory. That each mode
equals its equation, streams, trains and packs is tested where all models are, by their ``state_reuse``."""

import pytest
import torch
from test_loop_cache import CALM, KINDS, error, ids, make

from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.reuse import Reuse, parse

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "loop_count": 4}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def test_grammar():
    assert parse("none") == Reuse()
    assert parse("gdn:read,kv:first") == parse("kv:first,gdn:read") == Reuse(kv="first", gdn="read")
    assert parse("gdn:segment:64") == Reuse(gdn="segment", segment=64)
    assert LT2Config(**SIZES, layer_pattern="dsa", state_reuse="index:share").reuse == Reuse(index="share")


@pytest.mark.parametrize(
    "text, pattern, message",
    [
        ("indices", "dsa", "unknown mode 'indices' in 'indices'; known: none, kv:first, kv:last, kv:mean, "),
        ("kv:all", "full", "unknown mode 'kv:all' in 'kv:all'; known: none, kv:first, kv:last, kv:mean, index:share"),
        ("kv:first,none", "full", "unknown mode 'none' in 'kv:first,none'"),
        ("", "full", "unknown mode '' in ''"),
        ("kv:first,kv:first", "full", "'kv:first,kv:first' names 'kv' twice"),
        ("kv:first", "gdn", "must have a layer for kv:first: full or window or dsa, got 'kv:first'"),
        ("index:share", "full", "must have a layer for index:share: dsa, got 'index:share'"),
        ("gdn:read", "full", "must have a layer for gdn:read: gdn, got 'gdn:read'"),
        ("kv:first", "full->full->full->window:8", "must not be kv:first when the window of a layer differs"),
        ("gdn:segment", "gdn", "unknown mode 'gdn:segment' in 'gdn:segment'"),
        ("gdn:segment:0", "gdn", "unknown mode 'gdn:segment:0'"),
        ("gdn:segment:8,gdn:read", "gdn", "'gdn:segment:8,gdn:read' names 'gdn' twice"),
        ("gdn:segment:8", "gdn,dsa", "must not be gdn:segment with layers other than gdn, full and window"),
        (None, "full", "must be a string, got None"),
    ],
)
def test_wrong_modes_are_named(text, pattern, message):
    with pytest.raises(ValueError, match=f"state_reuse:? {message}"):
        LT2Config(**SIZES, layer_pattern=pattern, state_reuse=text)


def changed_logits(model: LT2, run) -> list[bool]:
    """For each token before the one that is changed, whether its logits change."""
    x, t = ids(1, 12), 8
    other = x.clone()
    other[:, t] = (x[:, t] + 1) % 64
    return (run(model, x) != run(model, other)).any(-1)[0, :t].tolist()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "state_reuse" in KINDS[kind]])
@torch.no_grad()
def test_no_mode_lets_a_token_see_a_later_one(kind):
    assert not any(changed_logits(make(kind, 3), lambda model, x: model(x)))


@torch.no_grad()
def test_the_state_at_the_end_of_a_loop_must_not_start_the_next():
    """The obvious reuse: each loop goes on with the matrix that the loop before ends with. Every token of loop 2 then
    depends on the last one: a token sees its future."""

    def handed_over(model: LT2, x: torch.Tensor) -> torch.Tensor:
        state = model.new_state(1, x.shape[1])
        hooks = []
        for i, block in enumerate(model.layers):
            loops = iter(range(model.config.loop_count))

            def enter(module, arguments, i=i, loops=loops):
                if (loop := next(loops)) > 0:
                    state.layers[loop][i]["matrix"].copy_(state.layers[loop - 1][i]["matrix"])

            hooks.append(block.register_forward_pre_hook(enter))
        out = model(x, state=state)
        for hook in hooks:
            hook.remove()
        return out

    assert all(changed_logits(make("gdn", 2), handed_over))
    assert not any(changed_logits(make("gdn", 1), handed_over))  # nothing is handed over


@torch.no_grad()
def test_one_segment_is_no_segment_and_each_of_one_token_is_a_recurrence_of_the_last_loop():
    """As long as the text: the model without the mode. One token: loops 1 to T continue what loop T left before."""
    shape = SIZES | {"loop_count": 2, "num_hidden_layers": 1, "layer_pattern": "gdn"} | CALM
    torch.manual_seed(0)
    models = [LT2(LT2Config(**shape, state_reuse=reuse)) for reuse in ("none", "gdn:segment:27", "gdn:segment:1")]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    x = ids(2)
    none, long, short = (model(x) for model in models)
    assert torch.equal(none, long)
    assert error(short, none) > 1e-3
    state = models[0].new_state(2, 27)
    steps = []
    for t in range(27):
        state.layers[0][0]["matrix"].copy_(state.layers[1][0]["matrix"])
        steps.append(models[0](x[:, t : t + 1], state=state))
    assert error(short, torch.cat(steps, 1)) < 1e-4


@torch.no_grad()
def test_memory_of_shared_keys_is_that_of_one_loop():
    sizes = {}
    for reuse in ("none", "kv:first", "kv:first,index:share"):
        model = LT2(LT2Config(**SIZES, layer_pattern="dsa", index_head_dim=16, state_reuse=reuse))
        sizes[reuse] = model.new_state(2, 50).kind_nbytes
    one = 2 * 2 * 50 * 4  # slots, layers, tokens, bytes
    assert sizes["none"] == {"k": 4 * 32 * one, "v": 4 * 32 * one, "index_k": 4 * 16 * one}
    assert sizes["kv:first"] == {"k": 32 * one, "v": 32 * one, "index_k": 4 * 16 * one}
    assert sizes["kv:first,index:share"] == {"k": 32 * one, "v": 32 * one, "index_k": 16 * one}


@torch.no_grad()
def test_a_closed_gate_reads_nothing():
    """A new model with gdn:read is the model without it, whose weights it takes."""
    torch.manual_seed(0)
    read = LT2(LT2Config(**SIZES, layer_pattern="gdn,full", state_reuse="gdn:read"))
    plain = LT2(LT2Config(**SIZES, layer_pattern="gdn,full"))
    missing = plain.load_state_dict(read.state_dict(), strict=False)
    assert missing.unexpected_keys == ["layers.0.mixer.read_gate"]
    x = ids(2)
    assert torch.equal(read(x), plain(x))
    torch.nn.init.ones_(read.layers[0].mixer.read_gate)
    assert error(read(x), plain(x)) > 1e-2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_only_the_first_loop_computes_keys(checkpointed):
    model, x, calls = LT2(LT2Config(**SIZES, layer_pattern="full", state_reuse="kv:first")), ids(2), []
    model.gradient_checkpointing = checkpointed
    for block in model.layers:
        for projection in (block.mixer.k_proj, block.mixer.v_proj):
            projection.register_forward_hook(lambda *_: calls.append(1))
    loss = model(x, labels=x).loss
    assert len(calls) == 2 * 2
    loss.backward()
    assert len(calls) == 2 * 2 * (2 if checkpointed else 1)
