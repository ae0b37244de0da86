"""Distillation: the divergence against torch's kl_div in float64, and a student's run with its receipt, resumed and refused."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from moe import checkpoint
from moe.cli import main
from moe.config.load import load
from moe.loss import IGNORE, Soft
from moe.model import Transformer
from moe.surgery.distil import retained
from moe.surgery.start import read_run
from tests.tiny_runs import write_corpus

STUDENT = ["model.moe=null", "model.ffn_hidden=24"]


def tensors(*shape):
    """Student's and teacher's logits and targets, some of them without loss."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    targets[0, :3] = IGNORE
    return student.requires_grad_(), teacher, targets


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_torchs(temperature):
    student, teacher, targets = tensors(2, 5, 7)
    found = Soft(teacher, temperature, 0.5).divergence(student, targets)
    kept = targets != IGNORE
    logs = [(logits[kept] / temperature).log_softmax(-1) for logits in (student, teacher)]
    expected = temperature**2 * kl_div(*logs, reduction="sum", log_target=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    ours, theirs = (torch.autograd.grad(value, student, retain_graph=True)[0] for value in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert Soft(student, temperature, 0.5).divergence(student, targets) == 0


def test_the_objective_mixes_divergence_and_cross_entropy():
    """Written out from the student's logits; auxiliary losses of a sparse student count beside."""
    config = load("recipes/smoke.py").model
    model = Transformer(config, seed=1)
    ids = torch.randint(0, 257, (2, 9), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1)
    targets[:, -1] = IGNORE
    teacher = torch.randn(2, 9, config.vocab_size, generator=torch.Generator().manual_seed(2))
    soft, plain = model(ids, targets, soft=Soft(teacher, 2.0, 0.25)), model(ids, targets)
    logits = model(ids).logits_BSV[:, :-1].flatten(0, 1)
    far = 4 * kl_div(
        (logits / 2).log_softmax(-1), (teacher[:, :-1].flatten(0, 1) / 2).softmax(-1), reduction="batchmean"
    )
    near = cross_entropy(logits, targets[:, :-1].flatten())
    torch.testing.assert_close(soft.loss, near)
    torch.testing.assert_close(soft.losses["distil"], far)
    auxiliary = plain.objective - plain.loss
    torch.testing.assert_close(soft.objective, 0.25 * far + 0.75 * near + auxiliary)


def settings(folder, steps: int) -> list[str]:
    """Overrides of the smoke recipe for a run of a few steps on the CPU."""
    source = json.dumps([{"name": "files", "paths": [str(write_corpus(folder))]}])
    return [
        f"data.sources={source}",
        f"data.cache_dir={folder / 'cache'}",
        "data.sequence_length=32",
        "data.validation_fraction=0.3",
        f"train.steps={steps}",
        "train.batch_rows=4",
        "train.micro_rows=2",
        "train.schedule.warmup_steps=0",
        "train.device=cpu",
        "evaluation.final_rows=4",
        "evaluation.rows=4",
        "evaluation.probe_rows=0",
        "logging.console=off",
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a sparse teacher's run of six steps."""
    folder = tmp_path_factory.mktemp("distil")
    assert main(["train", "recipes/smoke.py", f"out={folder / 'teacher'}", *settings(folder, 6)]) == 0
    return folder


def student(place, name, *more, steps=3):
    """`moe distil` of a small dense model."""
    given = [str(place / "teacher"), "recipes/smoke.py", "--out", str(place / name)]
    return main(["distil", *given, *settings(place, steps), *STUDENT, *more])


def test_a_student_reports_what_it_retained(place, capsys):
    plain = [f"out={place / 'plain'}", *settings(place, 3), *STUDENT]
    assert main(["train", "recipes/smoke.py", *plain]) == 0
    assert student(place, "student", "--share", "1.0", "--plain", str(place / "plain")) == 0
    receipt = json.loads((place / "student" / "distilled.json").read_text())
    gained = receipt["plain_bits_per_byte"] - receipt["teacher_bits_per_byte"]
    assert receipt["retained"] == pytest.approx(
        1 - (receipt["bits_per_byte"] - receipt["teacher_bits_per_byte"]) / gained
    )
    assert "of the teacher's gain is retained" in capsys.readouterr().out
    rows = [json.loads(line) for line in (place / "student" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["losses"]["distil"] > 0 for row in rows if "losses" in row) and any("losses" in row for row in rows)
    assert read_run(place / "student").run.model.moe is None
    assert retained(2.0, 2.5, 3.0) == 0.5 and retained(3.0, 2.5, 2.9) is None


def test_what_a_recipes_student_retained_is_measured_afterwards(place, capsys):
    """`moe retained` on a student that `moe train` trained, as recipes/distil.py does, is the receipt of `moe distil`."""
    for name, more in {"plain2": [], "student2": [f'train.distil={{"teacher": "{place / "teacher"}"}}']}.items():
        assert main(["train", "recipes/smoke.py", f"out={place / name}", *settings(place, 3), *STUDENT, *more]) == 0
    assert student(place, "student3", "--plain", str(place / "plain2")) == 0
    assert main(["retained", str(place / "student2"), "--plain", str(place / "plain2")]) == 0
    ours, theirs = (json.loads((place / name / "distilled.json").read_text()) for name in ("student2", "student3"))
    assert ours == theirs
    assert main(["retained", str(place / "plain2")]) == 2 and "did not learn from a teacher" in capsys.readouterr().err
    assert main(["retained", str(place / "student2"), "--plain", str(place / "teacher")]) == 2
    assert "is another model than the student" in capsys.readouterr().err


def test_a_resumed_student_equals_one_that_ran_through(place):
    assert student(place, "whole", "train.schedule.final_fraction=1.0") == 0
    ends = read_run(place / "whole").tensors
    first = checkpoint.newest(place / "whole")
    assert first is not None and first.step == 3
    assert student(place, "part", "train.schedule.final_fraction=1.0", steps=2) == 0
    assert main(["resume", str(place / "part"), "train.steps=3"]) == 0
    again = read_run(place / "part").tensors
    for name, tensor in ends.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-7)
    rows = [(place / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "part")]
    whole, part = ([json.loads(line) for line in lines] for lines in rows)
    assert [row["losses"] for row in part] == [row["losses"] for row in whole], "of the teacher too, in every step"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["model.vocab_size=300"], "model.vocab_size=257, and this run"),
        (["parallel.pipeline=2"], "parallel.pipeline=1"),
        (["--share", "0"], "share"),
    ],
)
def test_what_cannot_be_distilled_is_said_before(place, more, says, capsys):
    assert student(place, "no", *more) == 2
    assert says in capsys.readouterr().err


def test_a_teacher_without_a_run_is_named(place, capsys):
    given = ["distil", str(place), "recipes/smoke.py", "--out", str(place / "no2"), *settings(place, 3), *STUDENT]
    assert main(given) == 2
    assert "holds no run.json" in capsys.readouterr().err
