"""The doctor: every rule over a run's history, the most causal finding first, in words or as JSON. No torch."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe.analysis import causes_load as load
from moe.analysis import causes_router as router
from moe.analysis import causes_training as training
from moe.analysis.finding import Finding
from moe.analysis.history import History, read_history

RULES: dict[str, Callable[[History], list[Finding]]] = {
    "padding_counted": load.padding_counted,
    "convention": router.convention,
    "learning_rate": training.learning_rate,
    "precision": router.rounding,
    "router_frozen": router.router_frozen,
    "drops": load.drops,
    "starvation": load.starvation,
    "redundancy": router.redundancy,
    "rows_aligned": router.rows_aligned,
    "balance_dominates": router.balance_dominates,
    "utility_dead": router.utility_dead,
    "dead": load.dead,
    "collapse": load.collapse,
    "logit_growth": router.logit_growth,
    "churn": router.churn,
    "uninformative": router.uninformative,
}
"""Every rule; of findings that explain each other or nothing, the one whose rule is earlier is named first."""

EXPLAINS = {
    "padding_counted": ("balance_dominates", "over_constrained", "collapse"),
    "convention": ("balance_dominates", "over_constrained"),
    "learning_rate": (
        "router_frozen", "precision", "redundancy", "rows_aligned", "utility_dead", "dead", "collapse", "logit_growth", "churn",
        "uninformative", "balance_dominates",
    ),
    "precision": ("churn", "collapse", "logit_growth", "dead"),
    "router_frozen": ("collapse", "dead", "uninformative", "redundancy", "balance_dominates"),
    "drops": ("dead", "collapse"),
    "starvation": ("learning_rate", "churn", "redundancy", "collapse", "dead", "uninformative"),
    "redundancy": ("balance_dominates", "over_constrained", "churn", "uninformative", "rows_aligned"),
    "rows_aligned": ("uninformative", "collapse", "dead", "churn"),
    "balance_dominates": ("uninformative", "churn", "rows_aligned"),
    "collapse": ("dead", "logit_growth"),
}  # fmt: skip
"""What each cause brings about, so that it is not named first when the cause is there too."""


def diagnose(history: History) -> list[Finding]:
    """Everything that is wrong now, the most causal first: what no other finding explains, in the order of RULES."""
    found = [finding for rule in RULES.values() for finding in rule(history)]
    present = [finding.cause for finding in found]
    found = [
        replace(
            finding,
            consequence_of=tuple(
                c for c in dict.fromkeys(present) if finding.cause in EXPLAINS.get(c, ()) and c != finding.cause
            ),
        )
        for finding in found
    ]
    order = list(RULES)
    rank = {cause: order.index(cause) if cause in order else order.index("balance_dominates") for cause in present}
    return sorted(found, key=lambda finding: (bool(finding.consequence_of), rank[finding.cause]))


def examine(directory: Path) -> tuple[History, list[Finding]]:
    """Read a run folder and diagnose it. Raises UserError as `read_history` does."""
    history = read_history(directory)
    return history, diagnose(history)


def report(history: History, findings: list[Finding]) -> str:
    """The diagnosis in words."""
    layers = len(history.routing)
    head = f"step {history.step} of {history.steps}, {layers} expert layer{'s' if layers > 1 else ''}: "
    if not findings:
        early = " (the first tenth of a run is not judged)" if history.step <= history.grace else ""
        return f"{head}nothing wrong found{early}."
    lines = [f"{head}{len(findings)} finding{'s' if len(findings) > 1 else ''}, the most causal first."]
    for number, finding in enumerate(findings, 1):
        after = f" (follows from {', '.join(finding.consequence_of)})" if finding.consequence_of else ""
        lines += [
            "",
            f"{number}. {finding.cause}{after}: {finding.what}, since step {finding.since}. {finding.sure.capitalize()}.",
            f"   why: {finding.why}.",
            f"   try: {finding.change}.",
        ]
    if not history.probes:
        lines += [
            "",
            "Not probed yet: 'moe probe' on the same folder tells whether the choice of experts matters at all.",
        ]
    return "\n".join(lines)


def as_json(history: History, findings: list[Finding]) -> dict[str, Any]:
    """The diagnosis as one JSON object."""
    return {
        "schema_version": 1,
        "step": history.step,
        "steps": history.steps,
        "healthy": not findings,
        "findings": [finding.as_json() for finding in findings],
    }
