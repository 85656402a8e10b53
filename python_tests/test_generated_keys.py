"""``kv:last`` and ``kv:mean``: what tokens read of those that were generated before them."""

import pytest
import torch
from test_models import error, ids, make, plain, plain_decoding

TOKENS, PROMPT = 14, 6
MODELS = {
    "full": {},
    "grouped": {},
    "window": {},
    "schedule": {},
    "dsa": {},
    "shared selection": {"reuse": ",index:share", "kind": "dsa"},
    "segment": {"reuse": ",gdn:segment:4"},
    "read": {"reuse": ",gdn:read", "kind": "hybrid"},
}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def model_with(name: str, mode: str, loops: int):
    options = MODELS[name]
    reuse = f"kv:{mode}" + options.get("reuse", "")
    return make(options.get("kind", name), loops, state_reuse=reuse).eval()


def decode(model, x, split: list[int], prompt: int) -> torch.Tensor:
    """The prompt in pieces, then token by token."""
    state = model.new_state(*x.shape)
    parts = [model(piece, state=state) for piece in x[:, :prompt].split(split, 1)]
    parts += [model(t, state=state, generated=True) for t in x[:, prompt:].split(1, 1)]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("mode", ["last", "mean"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_equals_the_model_written_by_hand(name, mode):
    model, x = model_with(name, mode, 3), ids(1, TOKENS)
    got, want = decode(model, x, [4, 1, 1], PROMPT), plain_decoding(model, x[0], PROMPT)
    assert error(got[0].double(), want) < 1e-4
    exact = plain(model, x[0])  # without the rule the prompt and the first generated token are the same, no other
    same = [error(w, e) < 1e-9 for w, e in zip(want, exact, strict=True)]
    assert same == [True] * (PROMPT + 1) + [False] * (TOKENS - PROMPT - 1)


@torch.no_grad()
def test_one_loop_has_nothing_to_hand_on():
    model, x = model_with("full", "mean", 1), ids(2, TOKENS)
    assert error(decode(model, x, [PROMPT], PROMPT), model(x)) < 1e-5


@torch.no_grad()
def test_generate_takes_what_it_makes_as_generated():
    model, x = model_with("full", "last", 3), ids(2, PROMPT)
    tokens = model.generate(x, 8)
    for row in tokens:
        logits = plain_decoding(model, row[:-1], PROMPT)
        assert logits[PROMPT - 1 :].argmax(-1).tolist() == row[PROMPT:].tolist()


@torch.no_grad()
def test_misuse():
    model, x = model_with("full", "last", 2), ids(2, 4)
    for options in ({}, {"state": model.new_state(2, 4)}):
        with pytest.raises(ValueError, match="generated must be False but for one token a row, with a state, got True"):
            model(x, generated=True, **options)
