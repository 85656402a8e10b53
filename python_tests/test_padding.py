"""Padding and packing: a token's logits, gradients and state know nothing of pads or of other documents."""

import pytest
import torch
from torch import Tensor

from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.mixers import MIXERS

VOCAB = 64
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "tie_word_embeddings": False}
KINDS = {
    "full": {"layer_pattern": "full"},
    "gdn": {"layer_pattern": "gdn"},
    "window": {"layer_pattern": "window", "window_size": 5},
    "hybrid": {"layer_pattern": "interleaved:2:1:gdn:full"},
    "front": {"layer_pattern": "front:1:full:gdn", "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "bookend": {"layer_pattern": "bookend:1:window:gdn", "window_size": 6, "num_key_value_heads": 2},
    "sandwich": {"layer_pattern": "back:1:full:gdn", "norm_placement": "sandwich", "inter_loop_norm": True},
    "dsa": {"layer_pattern": "dsa", "index_topk": 4},
    "dsa_warmup": {"layer_pattern": "dsa,gdn,dsa", "num_key_value_heads": 2},
    "dsa_hybrid": {"layer_pattern": "back:1:dsa:gdn", "index_topk": 5, "num_key_value_heads": 2},
    "dsa_reuse": {"layer_pattern": "dsa,full,dsa", "index_topk": 3, "state_reuse": "kv:first,index:share"},
    "reuse": {"layer_pattern": "gdn,full,gdn", "state_reuse": "gdn:read,kv:first"},
    "segment": {"layer_pattern": "gdn,full,window", "window_size": 6, "state_reuse": "gdn:segment:7"},
    "schedule": {"layer_pattern": "full,gdn,full->window:9,gdn,full->window:5,gdn,window:3->full,gdn,full"},
    "nsa": {"layer_pattern": "nsa", "nsa_block_size": 4, "nsa_block_count": 3, "nsa_window_size": 5} | {
        "num_key_value_heads": 2
    },
}
KINDS |= {name: {"layer_pattern": name} for name in MIXERS if name not in KINDS}
LENGTHS = [30, 19, 1, 24]
WIDTH = 30

loops = pytest.mark.parametrize("loops", [1, 2, 4])
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _small(threads, monkeypatch):
    """Operators this small lose time to every further thread. Blocks of windows small enough to have several."""
    threads(1)
    monkeypatch.setattr("lt2_ext.models.mixers.attention.MIN_BLOCK", 4)


def make(kind: str, loops: int) -> LT2:
    torch.manual_seed(0)
    shape = SIZES | KINDS[kind] | {"loop_count": loops}
    shape["layer_pattern"] = "->".join(shape["layer_pattern"].split("->")[:loops])
    model = LT2(LT2Config(**shape))
    model.dense_warmup = kind == "dsa_warmup"
    torch.nn.init.normal_(model.rho, std=0.3)
    for name, p in model.named_parameters():
        if "read_gate" in name:
            torch.nn.init.normal_(p, std=0.5)
    if model.config.norm_placement == "sandwich":  # random blocks as large as h magnify any rounding from loop to loop
        for block in model.layers:
            torch.nn.init.constant_(block.mixer_post_norm.weight, 0.3)
            torch.nn.init.constant_(block.mlp_post_norm.weight, 0.3)
    return model


def ids(length: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def padded(pad: int, side: str = "left") -> tuple[list[Tensor], Tensor, Tensor]:
    """The rows, and what a tokenizer makes of them."""
    rows = [ids(n, seed) for seed, n in enumerate(LENGTHS)]
    x, mask = torch.full((len(rows), WIDTH), pad), torch.zeros(len(rows), WIDTH, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(WIDTH - len(row), None) if side == "left" else slice(len(row))
        x[i, place], mask[i, place] = row, 1
    return rows, x, mask


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@loops
@kinds
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_alone(kind, loops, side):
    model, (rows, x, mask) = make(kind, loops), padded(0, side)
    labels = x.clone()  # labels of the pads are the tokens there: the mask alone must hide them
    loss, logits, _ = model(x, labels=labels, attention_mask=mask, logits_to_keep=0)
    loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = []
    for i, row in enumerate(rows):
        if len(row) > 1:
            alone, want, index = model(row[None], labels=row[None], logits_to_keep=0)
            index = 0 if index is None else index  # a mean over all tokens, not only over those that are predicted
            share = (len(row) - 1) / sum(n - 1 for n in LENGTHS)
            losses.append((alone - index) * share + index * len(row) / sum(LENGTHS))
            assert error(logits[i][mask[i] == 1], want[0]) < 1e-4
    want = sum(losses)
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    for (name, p), grad in zip(model.named_parameters(), got, strict=True):
        # Of all pairs one product within rounding of zero passes the indexer's relu here and not there, or the reverse.
        assert error(grad, p.grad) < (5e-3 if kind == "dsa_warmup" and ".index_" in name else 1e-3), name


@kinds
def test_nothing_of_a_pad_gets_out(kind):
    """Another pad token, even one whose embedding is NaN, changes no bit of the logits, the loss and the gradients."""
    results = []
    for pad, value in ((0, None), (7, None), (VOCAB - 1, torch.nan)):
        model, (rows, x, mask) = make(kind, 2), padded(pad)
        if value is not None:
            rows = [row.clamp(max=VOCAB - 2) for row in rows]
            with torch.no_grad():
                model.embed_tokens.weight[pad] = value
        real = mask == 1
        x = torch.where(real, x.clamp(max=VOCAB - 2), pad)
        labels = torch.where(real, x, -100)
        loss, logits, _ = model(x, labels=labels, attention_mask=mask.bool(), logits_to_keep=0)
        loss.backward()
        results.append([logits[real], loss, *(p.grad for n, p in model.named_parameters() if "embed" not in n)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@loops
@kinds
@torch.no_grad()
def test_packed_documents_equal_rows_alone_and_know_nothing_of_each_other(kind, loops):
    model, documents = make(kind, loops), [ids(n, n) for n in (11, 1, 20, 6)]
    x, bounds = torch.cat(documents)[None], torch.tensor([0, 11, 12, 32, 38])
    logits = model(x, cu_seqlens=bounds)
    want = torch.cat([model(d[None]) for d in documents], dim=1)
    assert error(logits, want) < 1e-4
    changed = x.clone()
    changed[:, 12:32] = (x[:, 12:32] + 1) % VOCAB
    same = model(changed, cu_seqlens=bounds) == logits
    assert same[:, :12].all()
    assert same[:, 32:].all()
    assert not same[:, 12:32].all(dim=-1).any()


@pytest.mark.parametrize("pattern", ["gdn", "interleaved:1:1:gdn:full", "interleaved:1:1:gdn:window"])
def test_gradients_of_a_deep_model_with_padding_are_finite(pattern):
    """RMSNorm of zeros multiplies gradients by 1000: let into a pad by a convolution, they overflow in a few blocks."""
    torch.manual_seed(0)
    model = LT2(LT2Config(**(SIZES | {"num_hidden_layers": 12, "layer_pattern": pattern, "loop_count": 4})))
    _, x, mask = padded(0)
    model(x, labels=x, attention_mask=mask).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@loops
@kinds
@torch.no_grad()
def test_padded_prefill_then_decoding_equals_rows_alone(kind, loops):
    """Also when the prefill comes in pieces, of which some are all padding in some rows."""
    model, (rows, x, mask) = make(kind, loops), padded(3)
    more = torch.stack([ids(12, 10 + i) for i in range(len(rows))])
    wants = [model(torch.cat((row, new))[None])[0] for row, new in zip(rows, more, strict=True)]
    for split in ([30], [3, 20, 7], [9, 1, 20], [29, 1]):
        state = model.new_state(len(rows), WIDTH + 12)
        pieces = zip(x.split(split, dim=1), mask.split(split, dim=1), strict=True)
        logits = [model(piece, attention_mask=there, state=state) for piece, there in pieces]
        assert state.lengths.tolist() == LENGTHS
        for tail in more.split([1, 8, 1, 2], dim=1):
            logits.append(model(tail, state=state))
        assert torch.cat(logits, dim=1).isfinite().all()  # those of pads, too
        for i, want in enumerate(wants):
            assert error(torch.cat(logits, dim=1)[i, WIDTH - LENGTHS[i] :], want) < 1e-4, split
        assert state.lengths.tolist() == [n + 12 for n in LENGTHS]


@loops
@kinds
@torch.no_grad()
def test_left_padded_generation_equals_rows_alone(kind, loops):
    model, (rows, x, mask) = make(kind, loops), padded(0)
    got = model.generate(x, 8, attention_mask=mask)
    for i, row in enumerate(rows):
        assert torch.equal(got[i, WIDTH - len(row) :], model.generate(row[None], 8)[0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m[:, :-1], r"have the shape \[4, 30\] of input_ids, got \[4, 29\]"),
        (lambda m: m.float(), "be bool or an integer dtype, got torch.float32"),
        (lambda m: m.index_fill(1, torch.tensor([15]), 0), "have its ones side by side in every row, got"),
    ],
)
def test_bad_masks(change, message):
    model, (_, x, mask) = make("hybrid", 2), padded(0)
    with pytest.raises(ValueError, match=f"LT2: attention_mask must {message}"):
        model(x, attention_mask=change(mask))


def test_masks_that_a_state_cannot_take():
    model, (_, x, mask) = make("hybrid", 2), padded(0)
    rule = "attention_mask must with a state have zeros only before the first token of a sequence"
    state = model.new_state(4, 60)
    with pytest.raises(ValueError, match=rule):
        model(x, attention_mask=mask.flip(1), state=state)
    model(x, attention_mask=mask, state=state)
    with pytest.raises(ValueError, match=rule):
        model(x, attention_mask=mask, state=state)
    with pytest.raises(ValueError, match="attention_mask must be None when cu_seqlens is given"):
        model(x[:1], attention_mask=mask[:1], cu_seqlens=torch.tensor([0, 30]))
    assert state.lengths.tolist() == LENGTHS


@kinds
def test_gradients_stay_in_their_document(kind):
    """A loss on the second of three packed documents: exact zeros for the embeddings of the other two."""
    model = make(kind, 2)
    own, other = torch.arange(20, 40), torch.arange(20)
    x = torch.cat((other, own[torch.randperm(20)], other))[None]
    labels = torch.full_like(x, -100)
    labels[:, 20:40] = x[:, 20:40]
    model(x, labels=labels, cu_seqlens=torch.tensor([0, 20, 40, 60])).loss.backward()
    grad = model.embed_tokens.weight.grad
    assert (grad[own[:-1]].abs().sum(dim=1) > 0).any()
    assert not grad[other].any()
