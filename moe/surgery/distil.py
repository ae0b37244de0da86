"""`moe distil`: train a model, dense as a rule, on a teacher's probabilities, and say what share of the teacher's gain it keeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe import parallel
from moe.config.load import dump, load
from moe.config.schema import Distil, Run
from moe.data import prepare
from moe.errors import ConfigError
from moe.files import write_json
from moe.surgery.start import read_run
from moe.train import train
from moe.train.evaluate import evaluate

RECEIPT = "distilled.json"
"""What a distilled run kept of its teacher, in its folder."""


def distil(
    teacher: Path,
    recipe: str,
    out: Path,
    overrides: Sequence[str],
    *,
    temperature: float = 1.0,
    share: float = 0.5,
    plain: Path | None = None,
) -> dict[str, Any]:
    """Train `recipe` in `out` on the probabilities of `teacher`'s newest checkpoint; returns the receipt, in bits per byte.

    `plain` is a run of the same model that learnt from the text alone: with it the receipt has the share of the gain, teacher
    over plain, that is retained. Raises ConfigError for one that is another model, or where the teacher's tokens are others.
    """
    settings = dump(load(recipe, overrides))
    lesson = Distil(teacher=str(teacher.absolute()), temperature=temperature, share=share)
    settings["train"]["distil"] = dump(lesson)
    run = load(settings)
    _require_same_model(run, plain)
    train(run, out)
    return measure(out, plain)


def measure(out: Path, plain: Path | None = None) -> dict[str, Any]:
    """Bits per byte of a distilled run, its teacher and `plain` on the student's validation rows; written as a receipt.

    Raises ConfigError for a run without a teacher, or where `plain` is another model.
    """
    student = read_run(out)
    _require_same_model(student.run, plain)
    lesson = student.run.train.distil
    if lesson is None:
        raise ConfigError(f"{out} did not learn from a teacher: 'moe distil' trains one that does")
    corpus, ranks, rows = prepare(student.run.data), parallel.start("cpu"), student.run.evaluation.final_rows

    def bits(folder: Path) -> float:
        return evaluate(read_run(folder).model(), corpus, ranks, rows=rows, micro_rows=8).bits_per_byte

    receipt: dict[str, Any] = {
        "teacher": lesson.teacher,
        "teacher_step": read_run(Path(lesson.teacher)).step,
        "step": student.step,
        "temperature": lesson.temperature,
        "share": lesson.share,
        "teacher_bits_per_byte": bits(Path(lesson.teacher)),
        "bits_per_byte": bits(out),
        "rows": rows,
    }
    if plain is not None:
        without = bits(plain)
        kept = retained(receipt["teacher_bits_per_byte"], receipt["bits_per_byte"], without)
        receipt |= {"plain": str(plain), "plain_bits_per_byte": without, "retained": kept}
    write_json(out / RECEIPT, receipt)
    return receipt


def _require_same_model(run: Run, plain: Path | None) -> None:
    if plain is not None and read_run(plain).run.model != run.model:
        raise ConfigError(
            f"{plain} is another model than the student {run.name}: train the student's recipe without a teacher for the comparison"
        )


def retained(teacher: float, student: float, plain: float) -> float | None:
    """Share of the teacher's gain over `plain` that the student has; None where the teacher has none."""
    return (plain - student) / (plain - teacher) if teacher < plain else None


def describe(receipt: dict[str, Any], out: Path) -> str:
    """The receipt in words."""
    lines = [
        f"{out}: {receipt['bits_per_byte']:.4f} bits per byte after {receipt['step']} steps, its teacher "
        f"{receipt['teacher_bits_per_byte']:.4f} ({receipt['rows']} validation rows)"
    ]
    if "plain" not in receipt:
        lines.append(
            "give --plain RUN, the same model trained on the text alone, for the share of the gain that is retained"
        )
    elif receipt["retained"] is None:
        lines.append(
            f"the teacher is no better than {receipt['plain']} ({receipt['plain_bits_per_byte']:.4f}): no gain to retain"
        )
    else:
        lines.append(
            f"without a teacher {receipt['plain_bits_per_byte']:.4f}: {receipt['retained']:.1%} of the teacher's gain is retained"
        )
    return "\n".join(lines)
