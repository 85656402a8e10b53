"""``python -m lt2_ext.recipes.evaluate``: the harness's numbers are the model's own. Local files only."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

from lt2_ext.models import LT2
from lt2_ext.models.presets import preset
from lt2_ext.recipes import evaluate, text

QUESTIONS = [
    {"question": "2 + 2 =", "choices": ["4", "five", "22"], "answer": 0},
    {"question": "the opposite of hot is", "choices": ["warm", "cold"], "answer": 1},
    {"question": "naïve “quotes” 中", "choices": ["é", "<|eos|>", "x" * 40], "answer": 2},
    {"question": "red, green,", "choices": ["blue", "seven"], "answer": 0},
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
TEXTS = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
WORDS = """
task: local_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    model = LT2(preset("tiny"))
    with torch.no_grad():
        model.norm.weight.mul_(0.3)
    model.save(tmp_path / "model")
    text.ByteTokenizer().save(tmp_path / "model")
    return model


def log_likelihood(model, context, continuation):
    """Of the bytes of ``continuation`` after those of ``context``, bos first."""
    ids = [256, *context.encode(), *continuation.encode()]
    logp = model(torch.tensor([ids]))[0].log_softmax(-1)
    start = 1 + len(context.encode())
    return sum(logp[i - 1, ids[i]].item() for i in range(start, len(ids)))


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokenizer_for_transformers(kind):
    tokenizer = text.ByteTokenizer() if kind == "bytes" else text.train_bpe(["the loop of the state"] * 9, 300)
    theirs = text.for_transformers(tokenizer)
    for sample in ("the loop  of\n\tthe naïve 中 \U0001f600 \x00\x7f\xad", "<|eos|> is text", ""):
        ids = tokenizer.encode([sample])[0].tolist()
        assert theirs.encode(sample) == [tokenizer.bos, *ids]
        assert theirs.encode(sample, add_special_tokens=False) == ids
        assert theirs.decode(ids) == sample
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos, tokenizer.eos)


class TestHarness:
    @pytest.fixture(autouse=True)
    def offline(self, tmp_path, monkeypatch):
        pytest.importorskip("lm_eval")
        import datasets

        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            monkeypatch.setenv(name, "1")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
        (tmp_path / "tasks").mkdir()
        for name, task in (("choice", CHOICE), ("text", TEXTS), ("words", WORDS)):
            (tmp_path / "tasks" / f"{name}.yaml").write_text(task.format(data=data))

    def test_log_likelihoods_are_those_of_the_model(self, model, tmp_path):
        from lm_eval.api.instance import Instance

        harness = evaluate.harness_model(tmp_path / "model", "cpu", 3, 2048)
        pairs = [(q["question"], f" {c}") for q in QUESTIONS for c in q["choices"]]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        with torch.no_grad():
            expected = [log_likelihood(model, *pair) for pair in pairs]
        found = [score for score, _ in harness.loglikelihood(requests, disable_tqdm=True)]
        assert found == pytest.approx(expected, rel=1e-4)

    def test_tasks(self, model, tmp_path, capsys):
        arguments = ["model", "--task-folder", "tasks", "--tasks", "local_choice,local_text,local_words"]
        assert evaluate.main([*arguments, "--out", "results.json"]) == 0
        out = capsys.readouterr().out
        assert "local_choice" in out
        results = json.loads((tmp_path / "results.json").read_text())
        with torch.no_grad():
            right = 0
            for q in QUESTIONS:
                scores = [log_likelihood(model, q["question"], f" {c}") for c in q["choices"]]
                right += scores.index(max(scores)) == q["answer"]
            nats = -sum(log_likelihood(model, "", q["question"]) for q in QUESTIONS)
        assert results["local_choice"]["acc,none"] == right / len(QUESTIONS)
        size = sum(len(q["question"].encode()) for q in QUESTIONS)
        assert results["local_text"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
        assert results["local_words"]["exact_match,none"] == 0

    def test_generation_is_that_of_the_model(self, model, tmp_path):
        from lm_eval.api.instance import Instance

        harness = evaluate.harness_model(tmp_path / "model", "cpu", 2, 2048)
        options = {"until": ["\0"], "max_gen_toks": 6, "do_sample": False}
        prompts = [q["question"] for q in QUESTIONS]  # of different lengths: padded on the left
        found = harness.generate_until(
            [Instance("generate_until", {}, (p, options), i) for i, p in enumerate(prompts)], disable_tqdm=True
        )
        tokenizer = text.for_transformers(text.ByteTokenizer())
        for prompt, words in zip(prompts, found, strict=True):
            ids = torch.tensor([[256, *prompt.encode()]])
            new = model.generate(ids, 6, eos_token_id=257)[0, ids.shape[1] :]
            expected = tokenizer.decode(new, skip_special_tokens=True)
            assert words == expected.split("\0")[0]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["nothing"], "there is no folder nothing"),
            (["model", "--tasks", "no_task"], "--tasks: there is no task 'no_task' in tasks"),
            (["model", "--device", "tpu9"], "--device must be a device of this machine, got 'tpu9'"),
            (["model", "--limit", "0"], "--limit must be at least 1, got 0"),
            (["model", "--task-folder", "nowhere"], "--task-folder must be a folder, there is no nowhere"),
        ],
    )
    def test_mistakes_are_one_sentence(self, args, message, model, capsys):
        folder = [] if "--task-folder" in args else ["--task-folder", "tasks"]
        assert evaluate.main([*args, *folder]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_the_harness(model, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert evaluate.main([str(tmp_path / "model")]) == 2
    assert "evaluation needs lm_eval (pip install 'lm_eval[hf]')" in capsys.readouterr().err
