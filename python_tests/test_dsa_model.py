"""The mixer dsa: what trains its indexer, the dense warm-up, selections shared by loops."""

import copy

import pytest
import torch

from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.loop_state import Tokens
from lt2_ext.models.presets import preset
from lt2_ext.recipes.trainer import count_parameters
from lt2_ext.reference import dsa as reference

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "index_topk": 6}
SIZES |= {"intermediate_size": 48, "layer_pattern": "dsa", "loop_count": 2}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def make(**change) -> LT2:
    torch.manual_seed(0)
    return LT2(LT2Config(**SIZES | change))


def ids(rows: int = 2, length: int = 30) -> torch.Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients(model: LT2, **call) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(ids(), labels=ids(), **call).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reuse", ["none", "index:share"])
def test_the_indexer_trains_nothing_but_itself(reuse):
    with_loss, without = (gradients(make(state_reuse=reuse, index_loss_weight=w)) for w in (0.5, 0.0))
    assert {n for n in with_loss if n not in without} == {n for n in with_loss if ".index_" in n}
    assert all(torch.equal(with_loss[n], g) for n, g in without.items())
    double = gradients(make(state_reuse=reuse, index_loss_weight=1.0))
    for name in set(with_loss) - set(without):
        assert bool((with_loss[name] != 0).any()), name
        torch.testing.assert_close(double[name], 2 * with_loss[name])


@pytest.mark.parametrize("dense", [False, True], ids=["selection", "dense"])
def test_the_index_loss_is_that_of_its_definition(dense):
    model = make(num_hidden_layers=1, loop_count=1, num_key_value_heads=2)
    model.dense_warmup = dense
    out = model(ids(), labels=ids())
    block, x = copy.deepcopy(model.layers[0]).double(), model.embed_tokens(ids()).double()
    x = block.mixer_norm(x)
    tokens = Tokens(model.config, ids().shape, x.device)
    q, (k, v, _) = block.mixer.project(x, tokens, None, None)
    index = block.mixer.index(x, tokens)
    topk, scale = ids().shape[1] if dense else 6, block.mixer.index_scale
    indices = reference.lightning_indexer(index.q, index.k, index.weights, topk=topk, scale=scale)
    _, lse = reference.dsa_attention(q, k, v, indices, return_lse=True)
    want = reference.indexer_loss(index.q, index.k, index.weights, q, k, lse, indices, index_scale=scale)
    assert out.index_loss.item() == pytest.approx(want.item(), rel=1e-4)
    with torch.no_grad():
        language = model(ids(), labels=ids())
    assert language.index_loss is None
    assert out.loss.item() == pytest.approx(language.loss.item() + want.item(), rel=1e-4)


def test_the_warmup_is_full_attention():
    sparse, full = make(), make(layer_pattern="full")
    full.load_state_dict({n: t for n, t in sparse.state_dict().items() if ".index_" not in n})
    assert not torch.allclose(sparse(ids()), full(ids()), atol=1e-3)
    sparse.dense_warmup = True
    assert torch.equal(sparse(ids()), full(ids()))


def test_shared_indices_are_those_of_the_first_loop():
    model = make(state_reuse="index:share", loop_count=3)
    seen = []
    for block in model.layers:
        block.mixer.register_forward_hook(lambda module, args, out: seen.append(out[1].selection.indices))
    model(ids())
    first = seen[:2]
    assert not torch.equal(*first)
    for i, indices in enumerate(seen):
        assert indices is first[i % 2]
    state, apart = model.new_state(2, 30), make(loop_count=3).new_state(2, 30)
    names = [[sorted(layer) for layer in loop] for loop in state.layers]
    assert names == [[["index_k", "k", "v"]] * 2, [["k", "v"]] * 2, [["k", "v"]] * 2]
    assert apart.nbytes - state.nbytes == 2 * 2 * 2 * 30 * model.config.index_head_dim * 4


def test_every_loop_trains_a_shared_indexer():
    model = make(state_reuse="index:share", loop_count=2, num_hidden_layers=1)
    losses = []
    model.layers[0].register_forward_hook(lambda module, args, out: losses.append(out[1].loss))
    out = model(ids(), labels=ids())
    torch.testing.assert_close(out.index_loss, sum(losses) / 2)
    weight = model.layers[0].mixer.index_q_proj.weight
    parts = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]
    assert all(bool((p != 0).any()) for p in parts)
    torch.testing.assert_close(torch.autograd.grad(out.loss, weight)[0], sum(parts) / 2)


@pytest.mark.parametrize("reuse", ["none", "index:share"])
@torch.no_grad()
def test_blocks_of_keys_in_a_stream_and_beside_padding(reuse):
    model, x = make(index_pool=32, state_reuse=reuse).eval(), ids(2, 150)
    whole = model(x)
    assert not torch.allclose(whole[:, 140:], make(state_reuse=reuse)(x)[:, 140:], atol=1e-3)
    state = model.new_state(2, 150)
    pieces = [model(piece, state=state) for piece in x.split([70, 1, 2, 57, 20], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
    padded, mask = torch.cat([ids(2, 45), x], 1), torch.ones(2, 195, dtype=torch.bool)
    mask[0, :45] = False
    first = model(padded, attention_mask=mask)[0, 45:]
    torch.testing.assert_close(first, whole[0], rtol=1e-4, atol=1e-4)
    state = model.new_state(2, 195)
    pieces = [model(padded[:, :180], state=state, attention_mask=mask[:, :180])]
    pieces += [model(piece, state=state) for piece in padded[:, 180:].split(5, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1)[0, 45:], whole[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["dsa", "interleaved:1:1:gdn:dsa"])
def test_learns(pattern):
    model, x = make(layer_pattern=pattern), ids(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    history = []
    for step in range(40):
        model.dense_warmup = step < 5
        out = model(x, labels=x)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.append((out.loss - out.index_loss).item())
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize("options", [{}, {"state_reuse": "index:share"}])
@pytest.mark.parametrize("dense", [False, True], ids=["selection", "dense"])
def test_checkpointing_changes_no_bit(options, dense):
    model = make(layer_pattern="gdn,dsa", **options)
    model.dense_warmup = dense
    want = gradients(model)
    model.gradient_checkpointing = True
    got = gradients(model)
    assert all(torch.equal(got[n], g) for n, g in want.items())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("options", [{}, {"state_reuse": "index:share"}])
def test_compiles_into_one_graph(options, checkpointed):
    model = make(layer_pattern="gdn,dsa", **options)
    model.gradient_checkpointing = checkpointed
    want = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    compiled(ids(), labels=ids()).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, want[name], msg=name)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_attention_heads": 8}, "hidden_size must be a multiple of 8 num_attention_heads = 64 with dsa"),
        ({"index_head_dim": 12}, "index_head_dim must be a multiple of 8, got 12"),
        ({"index_pool": 40}, "index_pool must be 0 or a multiple of 32, got 40"),
        ({"index_topk": 0}, r"index_topk must be an integer in 1\.\.1048576, got 0"),
        ({"index_loss_weight": -1.0}, "index_loss_weight must be a positive number or 0, got -1.0"),
        ({"layer_pattern": "full->dsa"}, "layer 0 of 'full->dsa' is full and dsa, which share no weights"),
    ],
)  # fmt: skip
def test_wrong_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


@pytest.mark.parametrize("name, billions", [("lt2-1.3b-dsa", (1.3, 1.8)), ("lt2-1.3b-gdn-dsa", (1.3, 1.8))])
def test_presets_have_the_size_in_their_name(name, billions):
    low, high = billions
    assert low < count_parameters(preset(name)) / 1e9 < high
