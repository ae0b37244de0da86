"""`moe import`: a model that transformers wrote, as a run: the same loss as transformers', the same tensors back, trained on.

Memory is the process's own peak as the kernel counted it, against the bytes of the files.
"""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moe import checkpoint
from moe.cli import main
from moe.config.load import load
from moe.data import prepare
from moe.data.tokenizers import Bytes
from moe.hf.tokenizer import save_tokenizer
from moe.surgery.start import read_run
from tests.tiny_runs import write_corpus

VALUES = {
    "vocab_size": 257,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture
def theirs(tmp_path):
    """A folder as transformers writes it, with a tokenizer of bytes."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **VALUES), attn_implementation="eager")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(0.2 * torch.randn(tensor.shape))
    model.eval().save_pretrained(tmp_path / "theirs")
    save_tokenizer(Bytes(), tmp_path / "theirs", 64)
    return model


def settings(folder) -> list[str]:
    """Overrides for a corpus beside the test and two steps."""
    source = json.dumps([{"name": "files", "paths": [str(write_corpus(folder))]}])
    return [
        f"data.sources={source}",
        "data.sequence_length=32",
        "data.validation_fraction=0.3",
        f"data.cache_dir={folder / 'cache'}",
        "train.steps=2",
        "train.batch_rows=4",
        "train.micro_rows=4",
        "train.schedule.warmup_steps=0",
        "train.device=cpu",
        "evaluation.rows=4",
        "evaluation.final_rows=4",
        "logging.console=off",
    ]


def bring(folder, *extra) -> int:
    out = ["--out", str(folder / "run")]
    return main(["import", str(folder / "theirs"), *out, *settings(folder), *extra])


def test_an_imported_model_has_their_loss_and_trains_on(theirs, tmp_path):
    assert bring(tmp_path) == 0
    source = read_run(tmp_path / "run")
    batch = prepare(source.run.data).validation_batch(range(4))
    with torch.no_grad():
        logits = theirs(batch.ids_BS).logits
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.targets_BS.flatten(), ignore_index=-100
        )
        # the ids alone: transformers knows no documents within a row
        found = source.model()(batch.ids_BS, batch.targets_BS).loss
    assert abs(float(found) - float(expected)) < 1e-5
    assert main(["resume", str(tmp_path / "run")]) == 0
    saved = checkpoint.newest(tmp_path / "run")
    assert saved is not None and saved.step == 2
    assert json.loads((tmp_path / "run" / "origin.json").read_text())["family"] == "olmoe"


def test_import_and_export_give_the_same_tensors(theirs, tmp_path):
    assert bring(tmp_path) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "back"), "--family", "olmoe"]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_first_step_is_a_fresh_optimizers(theirs, tmp_path):
    """One step from the checkpoint of step 0 = one step of torch's AdamW that never stepped, on the same gradient."""
    assert bring(tmp_path, "train.clip_norm=0", "train.optimizer.lr=0.01") == 0
    source = read_run(tmp_path / "run")
    assert main(["resume", str(tmp_path / "run"), "train.steps=1", "train.schedule.final_fraction=1.0"]) == 0
    after = read_run(tmp_path / "run").tensors
    moved = (after["layers.0.attention.out.weight"] - source.tensors["layers.0.attention.out.weight"]).abs()
    # Adam's first step moves every weight by lr·g/(|g|+eps) and decays it; a second moment that had counted a step before
    # would make it 0.74 of that
    decay = 0.01 * 0.1 * source.tensors["layers.0.attention.out.weight"].abs()
    assert torch.allclose(moved.median(), torch.tensor(0.01), atol=float(decay.max()), rtol=0.02)


def test_what_is_missing_is_named_and_nothing_is_left(theirs, tmp_path, capsys):
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    assert bring(tmp_path) == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    assert bring(tmp_path) == 2
    assert "--recipe" in capsys.readouterr().err


def test_a_recipe_gives_data_and_training(theirs, tmp_path):
    (tmp_path / "theirs" / "tokenizer.json").unlink()
    assert bring(tmp_path, "--recipe", "recipes/smoke.py") == 0
    run = load(tmp_path / "run" / "run.json")
    assert run.train.optimizer.lr == 3e-3 and run.model.dim == 16 and run.data.tokenizer.name == "bytes"


_MEASURED = """
import sys
import torch
from moe.cli import main
from moe.train.memory import peak_memory_bytes

def peak(small, large):
    assert main(small) == 0
    before = peak_memory_bytes(torch.device("cpu"))
    assert main(large) == 0
    return (peak_memory_bytes(torch.device("cpu")) - before) // 1024

folder, *settings = sys.argv[1:]
small, large = (["import", f"{folder}/{name}", "--out", f"{folder}/run-{name}", *settings] for name in ("small", "large"))
print("grown by KB:", peak(small, large))
"""


def test_import_holds_a_shard_and_a_stacked_tensor_not_the_model(tmp_path):
    """72 MB in shards of 6 MB, each layer's experts spread over two of them: the whole model and its averages are 216 MB."""
    values = {
        **VALUES,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    for name, layers in (("small", 1), ("large", 5)):
        config = AutoConfig.for_model("olmoe", **{**values, "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / name, max_shard_size="6MB")
        save_tokenizer(Bytes(), tmp_path / name, 64)
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 10
    command = [sys.executable, "-c", _MEASURED, str(tmp_path), *settings(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"grown by KB: (\d+)", done.stdout)
    assert found is not None and int(found[1]) < 24_000, done.stdout
    stacked = read_run(tmp_path / "run-large").tensors["layers.3.moe.experts.w_up_EDF"]
    theirs = model.state_dict()["model.layers.3.mlp.experts.gate_up_proj"]
    assert torch.equal(stacked, theirs[:, 1024:].transpose(1, 2))
