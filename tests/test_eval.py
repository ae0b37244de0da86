"""`moe eval`: figures against transformers on the same text and against arithmetic; tasks against the harness's own HF model."""

import ast
import json
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe.cli import main
from moe.config.load import load
from moe.data import prepare
from moe.errors import CheckpointError, ConfigError
from moe.evaluation.offline_tasks import items
from moe.evaluation.perplexity import evaluate_folder, measure, summed
from moe.model import Transformer
from moe.opened import open_model
from moe.surgery.start import begin_run, model_of, read_run
from moe.train.evaluate import EvaluationResult
from tests.tiny_runs import tiny_dict, write_corpus


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """An untrained run of two sources, with weights large enough to matter, and its export."""
    folder = tmp_path_factory.mktemp("eval")
    values = tiny_dict(folder)
    path = write_corpus(folder)
    other = folder / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"{'xyz' * 9} {i * i}"}) + "\n" for i in range(60)))
    values["data"]["sources"] = [{"name": "files", "paths": [str(p)]} for p in (path, other)]
    values["model"] |= {"document_mask": False, "init_std": 0.3}
    run = load(values)
    begin_run(folder / "run", run, Transformer(run.model).state_dict(), {})
    assert main(["export", str(folder / "run"), "--out", str(folder / "hf")]) == 0
    return folder


def test_the_whole_equals_transformers_and_the_sources_add_up(run_folder):
    result = evaluate_folder(run_folder / "run", rows=12)
    corpus = prepare(load(run_folder / "run" / "run.json").data)
    batch = corpus.validation_batch(range(min(12, corpus.num_validation_rows)))
    theirs = AutoModelForCausalLM.from_pretrained(run_folder / "hf")
    with torch.no_grad():
        logits = theirs(batch.ids_BS).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), reduction="none")
    counted = int((batch.targets_BS != -100).sum())
    assert result["loss"] == pytest.approx(float(nats.sum()) / counted, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(float(nats.sum()) / counted), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(
        float(nats.sum()) / math.log(2) / float(batch.bytes_B.sum()), abs=1e-5
    )
    assert result["low"] < result["bits_per_byte"] < result["high"]
    names = [source["name"] for source in result["sources"]]
    assert names == ["corpus", "other"]
    assert sum(source["bytes"] for source in result["sources"]) == result["bytes"] == int(batch.bytes_B.sum())
    total = sum(source["bits_per_byte"] * source["bytes"] for source in result["sources"])
    assert total / result["bytes"] == pytest.approx(result["bits_per_byte"], abs=1e-6)


def test_rows_belong_to_the_source_whose_text_they_hold(run_folder):
    corpus = prepare(load(run_folder / "run" / "run.json").data)
    rows = range(corpus.num_validation_rows)
    for row, source in zip(rows, corpus.validation_sources(rows), strict=True):
        text = bytes(i for i in corpus.validation_batch([row]).ids_BS[0].tolist() if i < 256)
        assert (b"xyz" in text) == (source == 1)


def test_a_run_and_its_export_have_the_same_figures(run_folder, capsys):
    capsys.readouterr()
    assert main(["eval", str(run_folder / "run"), "--rows", "6", "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    assert main(["eval", str(run_folder / "hf"), "--rows", "6"]) == 2
    assert "--recipe" in capsys.readouterr().err
    recipe = str(run_folder / "run" / "run.json")
    assert main(["eval", str(run_folder / "hf"), "--rows", "6", "--recipe", recipe, "--json"]) == 0
    export = json.loads(capsys.readouterr().out)
    assert export["step"] is None and own["step"] == 0
    for key in ("loss", "bits_per_byte", "low", "high", "tokens", "bytes"):
        assert export[key] == pytest.approx(own[key], rel=1e-5)
    assert main(["eval", str(run_folder / "run"), "--rows", "6"]) == 0
    assert "other" in capsys.readouterr().out


def test_overrides_change_what_is_measured_or_are_refused(run_folder, capsys):
    folder, recipe = run_folder / "run", str(run_folder / "run" / "run.json")
    whole = evaluate_folder(folder, rows=4)
    other = evaluate_folder(folder, rows=4, overrides=["model.moe.top_k=4"])
    saved = load(folder / "run.json", ["model.moe.top_k=4"])
    expected = measure(model_of(saved, read_run(folder).tensors), prepare(saved.data), 4)[0]
    assert other["loss"] == expected.loss != whole["loss"]
    with pytest.raises(ConfigError, match=r"train\.steps changes nothing"):
        evaluate_folder(folder, overrides=["train.steps=3"])
    for folder in (run_folder / "run", run_folder / "hf"):
        with pytest.raises(ConfigError, match="weights are of one model"):
            evaluate_folder(folder, recipe=recipe, overrides=["model.moe.top_k=4"])
    with pytest.raises(CheckpointError, match="do not fit"):
        evaluate_folder(run_folder / "run", overrides=["model.ffn_hidden=8", "model.moe.expert_hidden=4"])
    assert main(["eval", str(run_folder / "run"), "--tasks", "offline", "--recipe", recipe]) == 2


def test_bits_per_byte_is_what_its_name_says():
    result = EvaluationResult(np.array([2.0, 4.0]) * math.log(2), np.array([1.0, 5.0]), np.array([2.0, 2.0]))
    one = summed("x", result, np.array([True, True]))
    assert one.bits_per_byte == pytest.approx(1.0) and one.loss == pytest.approx(1.5 * math.log(2))


def test_every_item_of_the_offline_tasks_has_one_right_choice():
    for name, rows in items().items():
        assert len(rows) >= 15, name
        for row in rows:
            assert len(set(row["choices"])) == len(row["choices"]) and 0 <= row["answer"] < len(row["choices"])
    sums = [(eval(row["context"].rstrip("=")), int(row["choices"][row["answer"]])) for row in items()["moe_sums"]]
    assert all(left == right for left, right in sums)
    for row in items()["moe_brackets"]:
        line = row["context"].strip().removeprefix("return ")
        depth = [line + choice for choice in row["choices"]]
        assert [_parses(text) for text in depth] == [i == row["answer"] for i in range(len(depth))]


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


@pytest.mark.skipif(find_spec("lm_eval") is None or find_spec("accelerate") is None, reason="needs lm-eval[hf]")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.full
def test_tasks_give_what_the_harness_gives_for_the_export(run_folder, tmp_path):
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    from moe.evaluation.harness import adapter, run_tasks
    from moe.evaluation.offline_tasks import configs

    ours = adapter(open_model(run_folder / "run"), 32)
    theirs = HFLM(pretrained=str(run_folder / "hf"), max_length=32, batch_size=1, device="cpu", dtype="float32")

    def ask(kind, *arguments):
        return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]

    pairs = ask("loglikelihood", ("one7 two", "14 red"), ("", "abc"), ("x" * 50, "yz"))
    for own, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert own[0] == pytest.approx(other[0], rel=1e-4) and own[1] == other[1]
    text = ask("loglikelihood_rolling", ("one7 two14 red21",))
    assert ours.loglikelihood_rolling(text)[0] == pytest.approx(theirs.loglikelihood_rolling(text)[0], rel=1e-4)
    wanted = ask("generate_until", ("one7", {"until": [" "], "max_gen_toks": 8, "do_sample": False}))
    assert ours.generate_until(wanted) == theirs.generate_until(wanted)
    expected = simple_evaluate(theirs, tasks=configs(tmp_path), bootstrap_iters=0)["results"]
    found = run_tasks(run_folder / "run", ["offline"])["tasks"]
    assert found.keys() == expected.keys()
    for name, figures in found.items():
        assert figures["acc"] == expected[name]["acc,none"] and figures["acc_norm"] == expected[name]["acc_norm,none"]
