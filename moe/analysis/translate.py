"""Past curves as another schedule would have made them: each keeps its deviations from its law, and the law gets the other rates.

Used where the past runs' schedule is not the new run's; `annealing.py` has the law.
"""

from collections.abc import Sequence
from dataclasses import fields, replace

from moe.analysis.annealing import areas, fit_laws, relative_rates
from moe.analysis.curves import Curve, totals_of
from moe.config.schema import Schedule
from moe.errors import DataError

SAME = 0.01
"""Shares of training (or of the peak rate) that are closer count as one schedule."""


def same_shape(one: Schedule, steps: int, other: Schedule, other_steps: int) -> bool:
    """Whether two schedules rise and fall at the same shares of training."""
    return type(one) is type(other) and all(
        abs(getattr(one, name) / (steps if name.endswith("_steps") else 1)
            - getattr(other, name) / (other_steps if name.endswith("_steps") else 1)) <= SAME
        for name in (field.name for field in fields(one)) if name != "name"
    )  # fmt: skip


def stretched(schedule: Schedule, steps: int, new_steps: int) -> Schedule:
    """The schedule at the same shares of another number of steps."""
    names = [field.name for field in fields(schedule) if field.name.endswith("_steps")]
    changed = {name: round(getattr(schedule, name) * new_steps / steps) for name in names}
    return replace(schedule, **{name: max(value, int(name == "decay_steps")) for name, value in changed.items()})


def to_schedule(curves: Sequence[Curve], schedule: Schedule, steps: int) -> list[Curve]:
    """Curves under the shape of `schedule` (a training of `steps`); those that have it already are left as they are.

    Evaluations in either schedule's warm-up are dropped where a curve is translated. Raises DataError for a curve whose own
    schedule is not known, or with too few evaluations for a law.
    """
    totals, moved = totals_of(curves), []
    for curve in curves:
        if curve.schedule is None:
            raise DataError(
                f"the run {curve.run} does not tell its schedule: fill the column `schedule` for all runs, or for none."
            )
        T = round(totals.get(curve.reference, 0))
        if T and not same_shape(curve.schedule, T, schedule, steps):
            moved.append((curve, T))
    found = {curve.run: curve for curve in _translated(moved, schedule, steps)}
    return [found.get(curve.run, curve) for curve in curves]


def _translated(moved: Sequence[tuple[Curve, int]], schedule: Schedule, steps: int) -> list[Curve]:
    """Each curve (of T steps) with the law's difference between the two schedules added."""
    inputs = []
    for curve, T in moved:
        assert curve.schedule is not None
        new = stretched(schedule, steps, T)
        keep_S = curve.step_S > max(curve.schedule.warmup_steps, new.warmup_steps, T / 50)
        inputs.append(
            (relative_rates(curve.schedule, T), relative_rates(new, T), curve.step_S[keep_S], curve.loss_S[keep_S])
        )
    laws = fit_laws([(old_T, step_S, loss_S) for old_T, _, step_S, loss_S in inputs]) if inputs else []
    found = []
    for (curve, _), law, (old_T, new_T, step_S, loss_S) in zip(moved, laws, inputs, strict=True):
        before, after = (law.at(areas(rate_T, law.memory)[:, step_S.astype(int) - 1]) for rate_T in (old_T, new_T))
        found.append(replace(curve, step_S=step_S, loss_S=loss_S + after - before))
    return found
