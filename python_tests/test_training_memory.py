"""What training keeps in memory: the loss without the logits, and gradient checkpointing per (loop, block)."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.loss import cross_entropy

SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48}
KINDS = {
    "gdn": {"layer_pattern": "gdn"},
    "hybrid": {"layer_pattern": "interleaved:2:1:gdn:full", "attn_output_gate": True},
    "sandwich": {"layer_pattern": "window", "window_size": 5, "norm_placement": "sandwich", "inter_loop_norm": True},
    "reuse": {"layer_pattern": "gdn,full,window:9", "state_reuse": "gdn:read,kv:first"},
    "segment": {"layer_pattern": "gdn,full,window:9", "state_reuse": "gdn:segment:20"},
    "dsa_reuse": {"layer_pattern": "dsa,gdn,dsa", "index_topk": 9, "state_reuse": "index:share,kv:first"},
    "family": {"layer_pattern": "kda,mamba2,nsa", "nsa_block_size": 4, "nsa_block_count": 3, "nsa_window_size": 5},
    "linear": {"layer_pattern": "retnet,gla,delta"},
    "schedule": {"layer_pattern": "full,gdn,full->window:9,gdn,window:3", "tie_word_embeddings": False},
}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def make(kind: str) -> LT2:
    torch.manual_seed(0)
    model = LT2(LT2Config(**(SIZES | KINDS[kind] | {"loop_count": 2})))
    torch.nn.init.normal_(model.rho, std=0.3)
    for name, p in model.named_parameters():
        if "read_gate" in name:
            torch.nn.init.normal_(p, std=0.5)
    return model


def error(got, want):
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("block", [1, 97 * 7, 97 * 40, 2**26])
@pytest.mark.parametrize("dtype, floor", [(torch.float64, 1e-14), (torch.float32, 1e-7), (torch.bfloat16, 1e-3)])
def test_loss_equals_cross_entropy_of_the_logits(block, dtype, floor, monkeypatch):
    """As exact as plain torch in the same dtype, both against float64."""
    monkeypatch.setattr("lt2_ext.models.loss.BLOCK", block)
    h = (8 * torch.randn(40, 16, dtype=torch.float64)).to(dtype).requires_grad_()  # some rows are sure, some are not
    weight = torch.randn(97, 16, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(97, (40,)).masked_fill(torch.rand(40) < 0.3, -100)
    wide = torch.promote_types(dtype, torch.float32)

    def results(loss, *inputs):
        return loss, *torch.autograd.grad(3 * loss, inputs)

    exact = [t.detach().double().requires_grad_() for t in (h, weight)]
    want = results(F.cross_entropy(exact[0] @ exact[1].T, labels), *exact)
    plain = results(F.cross_entropy((h @ weight.T).to(wide), labels), h, weight)
    got = results(cross_entropy(h, weight, labels), h, weight)
    assert [t.dtype for t in got] == [wide, dtype, dtype]
    for g, w, p in zip(got, want, plain, strict=True):
        assert error(g, w) < 2 * error(p, w) + floor
    assert not got[1][labels == -100].any()


def test_loss_of_no_labels_and_of_wrong_ones():
    h, weight = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    assert cross_entropy(h, weight, torch.full((3,), -100)).isnan()  # a mean over nothing, as in torch
    for wrong in (5, -1):
        with pytest.raises((RuntimeError, IndexError)):
            cross_entropy(h, weight, torch.tensor([0, wrong, 1]))


def test_loss_computes_only_the_gradients_that_are_asked_for():
    h, weight, labels = torch.randn(6, 8), torch.randn(5, 8, requires_grad=True), torch.randint(5, (6,))
    cross_entropy(h, weight, labels).backward()
    assert h.grad is None
    assert weight.grad is not None
    with torch.no_grad():
        assert not cross_entropy(h, weight, labels).requires_grad
    (grad,) = torch.autograd.grad(cross_entropy(h, weight, labels).square(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_logits_come_with_labels_on_request(autocast):
    model, x = make("hybrid"), torch.randint(97, (2, 20))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(x)
        loss, none, _ = model(x, labels=x)
        same, every, _ = model(x, labels=x, logits_to_keep=0)
        _, last, _ = model(x, labels=x, logits_to_keep=3)
    assert none is None
    assert torch.equal(same, loss)
    assert torch.equal(every, logits)
    assert last.shape == (2, 3, 97)
    assert error(last.float(), logits[:, -3:].float()) < 1e-2
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten())
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_gradients_bit_for_bit(kind, autocast):
    """Also when two forwards precede the first backward, and for padded and packed rows."""
    model, runs = make(kind), []
    x, y = torch.randint(97, (2, 70)), torch.randint(97, (1, 70))
    mask = torch.ones_like(x).index_fill(1, torch.arange(5), 0)
    for on in (False, True):
        model.gradient_checkpointing = on
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = model(x, labels=x, attention_mask=mask).loss
            second = model(y, labels=y, cu_seqlens=torch.tensor([0, 30, 70])).loss
        result = [first, second]
        for loss in (first, second):
            model.zero_grad()
            loss.backward()
            result += [p.grad.clone() for p in model.parameters()]
        runs.append(result)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_runs_every_block_of_every_loop_again_and_keeps_less():
    model, x = make("hybrid"), torch.randint(97, (2, 70))
    calls, kept = [], []

    def keep(t):
        kept[-1] += t.nbytes
        return t

    for block in model.layers:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for on in (False, True):
        model.gradient_checkpointing = on
        calls.clear()
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(x, labels=x).loss
        assert len(calls) == 2 * 3
        loss.backward()
        assert len(calls) == 2 * 3 * (2 if on else 1)
    assert kept[1] < kept[0] / 5
    calls.clear()
    with torch.no_grad():
        model(x)
    model(x[:, :5], state=model.new_state(2, 10))
    assert len(calls) == 2 * 2 * 3


TRAIN = """
import resource, sys, torch
from lt2_ext.models import LT2, LT2Config
vocab = int(sys.argv[1])
model = LT2(LT2Config(vocab_size=vocab, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, loop_count=2,
                      layer_pattern="gdn,full"))
model.gradient_checkpointing = True
optimizer = torch.optim.AdamW(model.parameters())
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before, losses = peak(), []
x = torch.randint(vocab, (1, 8192))
for _ in range(2):
    loss = model(x, labels=x).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[1] < losses[0], losses
print(peak() - before, sum(p.nbytes for p in model.parameters()) / 2**30)
"""


@pytest.mark.slow
def test_memory_of_a_large_vocabulary():
    """Two AdamW steps on 8192 tokens: within 2 GiB above the parameters, and growing by copies of parameters only."""
    peaks = {}
    for vocab in (16032, 128256):
        run = subprocess.run([sys.executable, "-c", TRAIN, str(vocab)], capture_output=True, text=True, check=True)
        peaks[vocab], parameters = map(float, run.stdout.split())
    assert peaks[128256] < 2.0, peaks
    assert peaks[128256] - peaks[16032] < 6 * parameters + 0.1, peaks  # the logits are 3.9 GiB
