"""The transformers adapter: files in both directions, generate() with and without the cache, padding, packing."""

import itertools
import json
import pickle

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

from lt2_ext.models import LT2, LT2Config
from lt2_ext.models.hf import CACHE, LoopCache, LT2ForCausalLM, LT2HFConfig

VOCAB = 41
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48}
KINDS = {
    "full": {"layer_pattern": "full"},
    "gdn": {"layer_pattern": "gdn", "tie_word_embeddings": False},
    "window": {"layer_pattern": "window", "window_size": 5},
    "interleaved": {"layer_pattern": "interleaved:2:1:gdn:full", "num_key_value_heads": 2},
    "bookend": {"layer_pattern": "bookend:1:window:4:gdn", "attn_output_gate": True},
    "front": {"layer_pattern": "front:1:full:gdn", "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "back": {"layer_pattern": "back:1:full:window", "window_size": 6},
    "list": {"layer_pattern": "gdn,full,gdn", "norm_placement": "sandwich", "inter_loop_norm": True},
    "dsa": {"layer_pattern": "dsa,gdn,dsa", "index_topk": 4, "index_loss_weight": 0.0, "state_reuse": "index:share"},
    "family": {"layer_pattern": "kda,mamba2,nsa", "nsa_block_size": 4, "nsa_block_count": 3, "nsa_window_size": 5},
    "linear": {"layer_pattern": "retnet,gla,delta"},
    "schedule": {"layer_pattern": "full->window:9->window:5->window:3"},
}
LENGTHS = [12, 5, 1]

slow = pytest.mark.slow
loops = pytest.mark.parametrize("loops", [pytest.param(1, marks=slow), 2, pytest.param(4, marks=slow)])
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """Operators this small lose time to every further thread."""
    threads(1)


def make(kind: str, loops: int, **change) -> LT2ForCausalLM:
    torch.manual_seed(0)
    shape = SIZES | KINDS[kind] | {"loop_count": loops} | change
    shape["layer_pattern"] = "->".join(shape["layer_pattern"].split("->")[:loops])
    model = LT2ForCausalLM(LT2HFConfig(**shape)).eval()
    torch.nn.init.normal_(model.model.rho, std=0.3)
    if model.model.lm_head is None:  # else the likeliest token is the last one, again and again
        torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    return model


def ids(rows: int, length: int, seed: int = 1, vocab: int = VOCAB) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[list[Tensor], dict[str, Tensor]]:
    rows = [ids(1, n, seed)[0] for seed, n in enumerate(LENGTHS)]
    x, mask = torch.zeros(len(rows), max(LENGTHS), dtype=torch.int64), torch.zeros(len(rows), max(LENGTHS))
    for i, row in enumerate(rows):
        x[i, -len(row) :], mask[i, -len(row) :] = row, 1
    return rows, {"input_ids": x, "attention_mask": mask.long()}


def generate(model: LT2ForCausalLM, x: Tensor | dict[str, Tensor], count: int = 9, **options) -> Tensor:
    inputs = x if isinstance(x, dict) else {"input_ids": x}
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": count} | options
    return model.generate(**inputs, **options)


# Files.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@kinds
@torch.no_grad()
def test_files_go_both_ways(kind, dtype, tmp_path):
    adapter, x = make(kind, 2), ids(2, 15)
    core = adapter.model.to(dtype)
    core.save(tmp_path / "core")
    adapter.save_pretrained(tmp_path / "hf")
    for directory, auto in itertools.product(("core", "hf"), (LT2ForCausalLM, AutoModelForCausalLM)):
        loaded = auto.from_pretrained(tmp_path / directory)
        assert type(loaded) is LT2ForCausalLM
        assert loaded.model.config == core.config
        for name, t in core.state_dict().items():
            assert loaded.model.state_dict()[name].dtype == t.dtype, name
            assert torch.equal(loaded.model.state_dict()[name], t), name
        assert torch.equal(loaded(x).logits, core(x))
    for directory in ("core", "hf"):
        loaded = LT2.load(tmp_path / directory)
        assert loaded.config == core.config
        assert torch.equal(loaded(x), core(x))
    assert not list((tmp_path / "hf").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "hf" / "config.json").read_text())


def test_decay_parameters_stay_exact_in_any_dtype(tmp_path):
    model = make("gdn", 2)
    model.save_pretrained(tmp_path)
    loaded = LT2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, p in loaded.model.named_parameters():
        exact = name.endswith(("A_log", "dt_bias"))
        assert p.dtype == (torch.float32 if exact else torch.bfloat16)
        if exact:
            assert torch.equal(p, model.model.get_parameter(name))


def test_incomplete_or_foreign_weights_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    make("gdn", 2).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    name = "layers.1.mixer.A_log"
    for change, message in (
        ({n: t for n, t in weights.items() if n != name}, r"missing_keys must be none, got .*A_log"),
        (weights | {"extra": torch.ones(2)}, r"unexpected_keys must be none, got .*extra"),
    ):
        save_file(change, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            LT2ForCausalLM.from_pretrained(tmp_path)
        path.unlink()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_hostile_directories_are_refused(tmp_path):
    make("gdn", 2).save_pretrained(tmp_path)
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    config = json.loads(path.read_text())
    for change, error, message in (
        ({"vocab_size": 2**24, "hidden_size": 2**17}, RuntimeError, "ignore_mismatched_sizes"),  # 8 TB if allocated
        ({"hidden_size": 2**30}, ValueError, "hidden_size must be an integer in"),
        ({"loop_counts": 3}, ValueError, "unknown key 'loop_counts'"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, ValueError, "unknown key 'auto_map'"),  # remote code
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(error, match=message):
            LT2ForCausalLM.from_pretrained(tmp_path)
    path.write_text(json.dumps(config))
    weights.unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(OSError, match="model.safetensors"):
        LT2ForCausalLM.from_pretrained(tmp_path)


def test_config():
    config = LT2HFConfig(**SIZES, layer_pattern="gdn", pad_token_id=3, eos_token_id=5)
    assert config.shape() == LT2Config(**SIZES, layer_pattern="gdn")
    assert (config.pad_token_id, config.eos_token_id) == (3, 5)
    again = AutoConfig.for_model(**config.to_dict())
    assert type(again) is LT2HFConfig
    assert again.shape() == config.shape()
    with pytest.raises(ValueError, match="unknown key 'loop_counts'; did you mean 'loop_count'"):
        LT2HFConfig(**SIZES, loop_counts=2)
    with pytest.raises(ValueError, match="unknown mixer 'mamba'"):
        LT2HFConfig(**SIZES, layer_pattern="mamba")


# Generation.


@loops
@kinds
def test_cached_equals_uncached(kind, loops):
    """Greedy, sampled, and beam search, whose reordering copies slots of the state."""
    model, x = make(kind, loops), ids(2, 7)
    want = model.model.generate(x, 9)
    assert torch.equal(generate(model, x), want)
    sampled = {"do_sample": True, "top_k": 10, "temperature": 1.5}
    for options in ({}, sampled, {"num_beams": 4}, {"num_beams": 3, "do_sample": True}):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(7)
            results.append(generate(model, x, use_cache=use_cache, **options))
        assert torch.equal(*results), options
        assert results[0].shape == (2, 16)


@loops
@kinds
def test_left_padded_equals_rows_alone(kind, loops):
    model, (rows, batch) = make(kind, loops), padded()
    for options in ({}, {"use_cache": False}, {"num_beams": 3}, {"prefill_chunk_size": 4}):
        got = generate(model, batch, **options)
        for i, row in enumerate(rows):
            alone = {k: v for k, v in options.items() if k != "prefill_chunk_size"}
            assert torch.equal(got[i, 12 - len(row) :], generate(model, row[None], **alone)[0]), options


@loops
@kinds
@torch.no_grad()
def test_beam_search_with_all_beams_is_exhaustive_search(kind, loops):
    vocab, steps = 5, 3
    model = make(kind, loops, vocab_size=vocab)
    rows = [ids(1, n, n, vocab)[0] for n in (6, 2)]
    batch = {"input_ids": torch.zeros(2, 6, dtype=torch.int64), "attention_mask": torch.zeros(2, 6, dtype=torch.int64)}
    for i, row in enumerate(rows):
        batch["input_ids"][i, -len(row) :], batch["attention_mask"][i, -len(row) :] = row, 1
    beams = vocab ** (steps - 1)
    got = generate(model, batch, steps, num_beams=beams, num_return_sequences=5)[:, 6:].view(2, 5, steps)
    tails = torch.tensor(list(itertools.product(range(vocab), repeat=steps)))
    for i, row in enumerate(rows):
        logp = model.model(torch.cat((row.expand(len(tails), -1), tails), dim=1)).log_softmax(dim=-1)
        score = logp[:, -steps - 1 : -1].gather(2, tails[..., None]).sum(dim=(1, 2))
        best = score.topk(5).indices
        assert (score[best].diff() < -1e-5).all()  # no ties
        assert torch.equal(got[i], tails[best])


@torch.no_grad()
def test_a_cache_of_the_user_goes_on():
    model, x = make("interleaved", 2), ids(2, 20)
    full, cache = model(x).logits, LoopCache(30)
    output = model(x[:, :8], **{CACHE: cache}, logits_to_keep=1)
    assert output[CACHE] is cache
    assert cache.get_seq_length() == 8
    torch.testing.assert_close(output.logits[:, 0], full[:, 7], atol=1e-4, rtol=1e-4)
    rest = model(x[:, 8:], past_key_values=cache).logits
    torch.testing.assert_close(rest, full[:, 8:], atol=1e-4, rtol=1e-4)


def test_what_it_refuses():
    model, x = make("interleaved", 2), ids(2, 5)
    with pytest.raises(ValueError, match="must be a LoopCache .*, got DynamicCache"):
        model(x, **{CACHE: transformers.DynamicCache()})
    with pytest.raises(ValueError, match="cache_implementation must be None, got 'static'"):
        generate(model, x, cache_implementation="static")
    with pytest.raises(ValueError, match=r"fit max_length = 4 of the state"):
        model(x, **{CACHE: LoopCache(4)})
    cache = LoopCache(9)
    model(x[:, :3], **{CACHE: cache})
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, 5\], or \[B, 8\] .*, got \[2, 6\]"):
        model(x, **{CACHE: cache}, attention_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        generate(model, x[:1], assistant_model=make("full", 1))


# Training.


@kinds
def test_packed_rows_of_the_collator_equal_separate_ones(kind):
    model, documents = make(kind, 2), [ids(1, n, n)[0] for n in (9, 1, 14)]
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": d.tolist()} for d in documents])
    output = model(**batch, logits_to_keep=0)
    want = torch.cat([model(d[None]).logits for d in documents], dim=1)
    torch.testing.assert_close(output.logits, want, atol=1e-3, rtol=1e-3)
    bounds = torch.tensor([0, 9, 10, 24])
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        assert torch.equal(model(batch["input_ids"], **{name: bounds}).logits, output.logits)
    losses = [(model(d[None], labels=d[None]).loss * (len(d) - 1), len(d) - 1) for d in documents if len(d) > 1]
    want = sum(s for s, _ in losses) / sum(n for _, n in losses)
    torch.testing.assert_close(output.loss, want, atol=1e-5, rtol=1e-5)


def test_trains_with_checkpointing():
    model, x = make("interleaved", 2), ids(2, 15)
    model(x, labels=x).loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    assert model.model.gradient_checkpointing
    output = model(x, labels=x)
    output.loss.backward()
    assert output.logits is None
    for p, grad in zip(model.parameters(), want, strict=True):
        assert torch.equal(p.grad, grad)
    model.gradient_checkpointing_disable()
    assert not model.model.gradient_checkpointing


def test_trainer_trains_packed_documents(tmp_path):
    """Accumulated, checkpointed; what it saves is what LT2.load reads."""
    pytest.importorskip("accelerate")
    model, x = make("interleaved", 2), ids(2, 9)
    documents = [{"input_ids": ids(1, n, n)[0].tolist()} for n in (9, 5, 14, 7, 3, 8, 12, 4)]
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    options |= {"gradient_checkpointing": True, "learning_rate": 1e-2, "use_cpu": True, "report_to": []}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(tmp_path, logging_steps=1, disable_tqdm=True, save_strategy="no", **options),
        data_collator=DataCollatorWithFlattening(return_tensors="pt"),
        train_dataset=documents,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    trainer.save_model(tmp_path / "model")
    assert torch.equal(LT2.load(tmp_path / "model")(x), model(x).logits)


def test_embeddings_can_grow(tmp_path):
    for kind in ("full", "gdn"):  # tied, and not
        model, x = make(kind, 1), ids(2, 9)
        want = model(x).logits
        model.resize_token_embeddings(VOCAB + 7)
        assert torch.equal(model(x).logits[..., :VOCAB], want)
        model.save_pretrained(tmp_path / kind)
        assert torch.equal(LT2.load(tmp_path / kind)(x), model(x).logits)
