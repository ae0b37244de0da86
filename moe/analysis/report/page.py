"""report.json as one HTML file with everything in it: no network, readable on screen (light, dark, narrow) and on paper.

The charts are plotly's, whose script is packed into the page (gzip in base64: 2.0 of 4.8 MB). The page's policy lets nothing run
but that script and ours, by their SHA-256, and nothing be loaded.
"""

import base64
import gzip
import hashlib
import json
from functools import lru_cache
from html import escape
from importlib.resources import files

from plotly.offline import get_plotlyjs

from moe.analysis.report.blocks import bullets, chart, paragraph, switch, table, text
from moe.analysis.report.loads import BALANCE
from moe.analysis.report.tables import arms_table, gain_table, health_table, ledger_table, settings_table, sources
from moe.analysis.rows import Json

BADGES = {"win": "win", "loss": "loss", "undecided": "undecided", None: "not judged"}


@lru_cache(maxsize=1)
def _plotly() -> tuple[str, str]:
    """plotly.js, packed, and the hash of what it unpacks to."""
    script = get_plotlyjs().encode()
    return base64.b64encode(gzip.compress(script, 9, mtime=0)).decode(), _hash(script)


def _hash(script: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"


def embedded(value: Json) -> str:
    """JSON that can stand inside a script element."""
    packed = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return packed.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def render(report: Json) -> str:
    """The whole page for a report.json value."""
    parts = [f"<h1>{escape(report['title'])}</h1>", paragraph(report["subtitle"], "soft"), _verdict(report)]
    parts += [_promise(report), _cautions(report), _losses(report), _forecasts(report), _arms(report), _ledger(report)]
    parts += [_routing(report), _doctor(report), _settings(report), _provenance(report)]
    style = files("moe.analysis.report").joinpath("page.css").read_text("utf-8")
    script = files("moe.analysis.report").joinpath("page.js").read_text("utf-8")
    plotly, plotly_hash = _plotly()
    scripts = f"{plotly_hash} {_hash(script.encode())}"
    policy = f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {scripts}"
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(report["title"])}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="figures">{embedded(report["charts"])}</script>
<script type="text/plain" id="plotly">{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<section><h2>{text(title)}</h2>", *parts, "</section>"])


def _verdict(report: Json) -> str:
    verdict = report["verdict"]
    lines = "".join(
        f'<li class="{escape(line["verdict"] or "none")}"><span class="badge">{escape(BADGES[line["verdict"]])}</span> '
        f"{text(line['sentence'])}</li>"
        for line in verdict["contracts"]
    )
    contracts = f'<ul class="contracts">{lines}</ul>' if lines else ""
    notes = "".join(paragraph(note) for note in verdict["notes"])
    head = f'<p class="sentence">{text(verdict["sentence"])}</p>'
    return f'<div class="verdict {escape(verdict["name"])}">{head}{contracts}{notes}</div>'


def _promise(report: Json) -> str:
    promised = report.get("promise")
    if not promised or not promised["sentences"]:
        return ""
    kind = "tampered" if promised["tampering"] else (promised["outcome"] or {}).get("verdict", "undecided")
    sentences = "".join(paragraph(s, "tampering" if s.startswith("TAMPERING") else "") for s in promised["sentences"])
    return f'<div class="promise {escape(kind)}"><h2>The promise</h2>{sentences}</div>'


def _cautions(report: Json) -> str:
    if not report["cautions"]:
        return ""
    return f'<div class="cautions"><p><strong>Read with care</strong></p>{bullets(report["cautions"])}</div>'


def _losses(report: Json) -> str:
    drawn = report["charts"]
    axes = switch("axis", "Against", [(axis["name"], axis["unit"], axis["missing"]) for axis in drawn["axes"]])
    evaluated = any(run["bits"] for arm in drawn["arms"] for run in arm["runs"])
    views = [
        ("validation", "validation", None if evaluated else "no run has been evaluated yet"),
        ("training", "training", None),
    ]
    which = switch("loss", "Loss of", views)
    parts = [chart("loss", "", f'<div class="controls">{axes}{which}</div>', "Loss against the chosen budget")]
    if drawn["gains"]:
        caption = (
            "Above zero the first-named arm is better where both have used as much of the budget chosen above. Thick: mean over "
            "paired seeds; bands: its Student interval, which may leave the frame; thin: single seeds."
        )
        parts += ["<h3>Gain at an equal budget</h3>", chart("gain", caption, label="Gain at an equal budget")]
    return _section("Loss", *parts)


def _forecasts(report: Json) -> str:
    forecasts = report["charts"]["forecasts"]
    if not forecasts:
        return ""
    caption = (
        "Bands: the interval of the final gain as it was forecast at each share of training (dotted: its middle). Lines: the gain "
        "that came, over the dense run of the same seed."
    )
    return _section("Forecast", chart("forecast", caption), bullets(one["sentence"] for one in forecasts))


def _arms(report: Json) -> str:
    if report["kind"] == "run":
        return _section("The run", arms_table(report))
    if report["kind"] == "runs":
        return _section("The runs", arms_table(report))
    gains = [gain_table(report), *map(paragraph, report["gain"]["notes"])]
    speed = _section("Speed", *map(paragraph, report["speed"]))
    return _section("The arms", arms_table(report)) + _section("Gain by seed", *gains) + speed


def _ledger(report: Json) -> str:
    if not report["ledger"]:
        return _section("What it used", paragraph("Not known: a run has no ledger that can be read."))
    priced = [f"<h3>{text('Prices of loss')}</h3>", bullets(report["prices"])] if report["prices"] else []
    return _section("What it used", ledger_table(report), bullets(sources(report), "sources"), *priced)


def _routing(report: Json) -> str:
    heat = report["charts"]["heat"]
    if not heat:
        return ""
    parts = [*map(paragraph, report["routing_notes"])]
    if report["routing"]:
        parts.append(health_table(report, "routing"))
    for name, lines in report.get("routing_by_arm", {}).items():
        if lines:
            parts += [f"<h3>{text(name)}</h3>", health_table(report, "routing_by_arm", name)]
    run = "".join(f'<option value="{i}">{text(one["run"])}</option>' for i, one in enumerate(heat))
    picker = f'<label class="picker">Run <select name="run">{run}</select></label>' if len(heat) > 1 else ""
    views = switch("heat", "Show", [("moment", "layers × experts", None), ("layer", "experts × time", None)])
    slider = (
        '<label class="slider"><span id="heat-name">Step</span> '
        '<input type="range" name="moment" min="0" value="0" step="1"> <output id="heat-at"></output></label>'
    )
    caption = "White is the ideal share, orange more, purple less; rows of the whole batch, before drops."
    if any(one["averaged"] for one in heat):
        caption += " Neighbouring logged steps are averaged."
    parts.append(chart("heat", caption, f'<div class="controls">{picker}{views}{slider}</div>', "Load of each expert"))
    measures = [measure["name"] for measure in heat[0]["balance"]]
    choice = switch("balance", "Balance", [(name, BALANCE[name].split(" (")[0], None) for name in measures])
    caption = (
        "A line per layer. MaxVio, the largest load over the ideal one, minus one, means something only above its floor, which a "
        "balanced router reaches by chance (dotted)."
    )
    parts.append(chart("balance", caption, f'<div class="controls">{choice}</div>', "Balance over time"))
    return _section("Routing", *parts)


def _doctor(report: Json) -> str:
    said, parts = report["doctor"], []
    for finding in said["findings"]:
        after = f", which follows from {', '.join(finding['consequence_of'])}" if finding["consequence_of"] else ""
        parts.append(
            f'<div class="finding"><p><strong>{text(finding["cause"])}</strong>{text(after)} ({text(", ".join(finding["runs"]))}): '
            f"{text(finding['what'])}. {text(finding['sure'].capitalize())}.</p>"
            f"<p>Why: {text(finding['why'])}.</p><p>Try: {text(finding['change'])}.</p></div>"
        )
    if said["healthy"]:
        parts.append(paragraph(f"Nothing wrong found: {', '.join(said['healthy'])}."))
    if said["early"]:
        parts.append(
            paragraph(f"Nothing wrong found, but a run's first tenth is not judged: {', '.join(said['early'])}.")
        )
    parts += [paragraph(f"Not examined, {one['run']}: {one['why']}.") for one in said["not_examined"]]
    return _section("The doctor", *parts) if parts else ""


def _settings(report: Json) -> str:
    if report["kind"] == "run":
        return ""
    notes = [paragraph(note) for note in report.get("twin_notes", ())]
    if not report["settings"]:
        return _section("What differs between the arms", paragraph("Nothing but the seed."), *notes)
    return _section("What differs between the arms", settings_table(report), *notes)


def _provenance(report: Json) -> str:
    command = [f"<pre>{escape(report['command'])}</pre>"] if report["command"] else []
    return _section("How it was run", *command, table(["", ""], report["environment"], kind="text"))
