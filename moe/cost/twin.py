"""The dense twins: the same run without experts, at equal FLOPs per token, or with as many parameters in all."""

from dataclasses import replace

from moe.config.schema import Forecast, Model, Run, expert_widths, ffn_hidden
from moe.config.words import typed
from moe.cost.counting import flops_by_layer, moe_layers, parameters, train_flops_per_token
from moe.errors import ConfigError

TOLERANCE = 0.005
"""Largest relative difference of training FLOPs per token that still counts as equal."""
MULTIPLE = 8
"""F of the twin is a multiple of this, as matrix units want it."""


def dense_twin(run: Run) -> Run:
    """The run with a dense FFN in each expert layer's place, of the FLOPs of router and experts together.

    Depth, width, attention, head, tokenizer, data, order of batches and schedule stay. F is rounded to a multiple of 8:
    the same in all former expert layers if that keeps the FLOPs of forward plus backward to 0.5 %, else some of them
    are 8 wider than others. Scores count under the causal mask, the strictest way: in full they dilute the difference.
    Raises ConfigError if there is no expert layer, or if neither rounding is close enough.
    """
    if not moe_layers(run.model):
        raise ConfigError(
            f"{run.name} has no expert layer, so it is its own dense twin: compare a recipe with model.moe"
        )
    model = _densify(run.model, run.data.sequence_length)
    difference = _difference(run.model, model, run.data.sequence_length)
    if abs(difference) > TOLERANCE:
        raise ConfigError(_too_different(run, model, difference))
    logging = replace(run.logging, record_routing=False, replay_routing="")
    return replace(run, name=f"{run.name}-dense", model=model, logging=logging, forecast=Forecast())


def dense_total_twin(run: Run) -> Run:
    """The run with a dense FFN in each expert layer's place, of the parameters of router and experts together.

    Everything else stays, as in `dense_twin`. Raises ConfigError if there is no expert layer, or if multiples of 8 do not come
    within 0.5 % of the parameters.
    """
    if not moe_layers(run.model):
        raise ConfigError(f"{run.name} has no expert layer, so it has no twin of equal total parameters")
    wanted = parameters(run.model)
    layer = wanted.layers[moe_layers(run.model)[0]]
    exact = sum(layer.get(name, 0) for name in ("router", "experts", "latent", "shared")) / (3 * run.model.dim)
    model = _spread(run.model, exact)
    difference = parameters(model).total / wanted.total - 1
    if abs(difference) > TOLERANCE:
        raise ConfigError(
            f"the dense twin must have the parameters of {run.name} to {TOLERANCE:.1%}, but its FFN of hidden size "
            f"{exact:.0f}, rounded to multiples of {MULTIPLE}, differs by {difference:+.2%}: use more or wider experts"
        )
    logging = replace(run.logging, record_routing=False, replay_routing="")
    return replace(run, name=f"{run.name}-dense-total", model=model, logging=logging, forecast=Forecast())


def relative_difference(run: Run, twin: Run) -> float:
    """Training FLOPs per token of the twin over the run's, minus 1; scores counted under the causal mask."""
    return _difference(run.model, twin.model, run.data.sequence_length)


def _difference(model: Model, twin: Model, sequence_length: int) -> float:
    sparse, dense = (train_flops_per_token(m, sequence_length, causal_half=True) for m in (model, twin))
    return dense / sparse - 1


def _densify(model: Model, sequence_length: int) -> Model:
    """The dense model of nearest FLOPs, of one width in the former expert layers if that is near enough."""
    layers = moe_layers(model)
    parts = flops_by_layer(model, sequence_length)[layers[0]]
    exact = sum(parts.get(name, 0) for name in ("router", "experts", "latent", "shared")) / (2 * 3 * model.dim)
    uniform = max(MULTIPLE, MULTIPLE * int(exact / MULTIPLE + 0.5))
    twin = _with_widths(model, dict.fromkeys(layers, uniform))
    if abs(_difference(model, twin, sequence_length)) <= TOLERANCE or exact < MULTIPLE:
        return twin
    return _spread(model, exact)


def _spread(model: Model, exact: float) -> Model:
    """The dense model whose former expert layers have this F on average, in multiples of 8, evenly over the depth."""
    layers = moe_layers(model)
    lower = MULTIPLE * int(exact / MULTIPLE)
    wider = int(len(layers) * (exact - lower) / MULTIPLE + 0.5)
    # Layer i of n is wider where i·wider/n passes a whole number.
    steps = [(i + 1) * wider // len(layers) - i * wider // len(layers) for i in range(len(layers))]
    return _with_widths(model, {layer: lower + MULTIPLE * step for layer, step in zip(layers, steps, strict=True)})


def _with_widths(model: Model, hidden: dict[int, int]) -> Model:
    """A dense model with these F in the former expert layers; the other layers keep theirs."""
    widths = tuple(hidden.get(layer, ffn_hidden(model, layer)) for layer in range(model.num_layers))
    if len(set(widths)) == 1:
        return replace(model, moe=None, ffn_hidden=widths[0], ffn_hidden_per_layer=())
    return replace(model, moe=None, ffn_hidden_per_layer=widths)


def _too_different(run: Run, twin: Model, difference: float) -> str:
    widths = sorted({ffn_hidden(twin, layer) for layer in moe_layers(run.model)})
    fitting = _fitting_setting(run)
    way_out = f"use {fitting}" if fitting else "use more or wider experts"
    return (
        f"the dense twin must agree with {run.name} in FLOPs per token to {TOLERANCE:.1%}, but its FFN of hidden size "
        f"{' and '.join(map(str, widths))}, rounded to multiples of {MULTIPLE}, differs by {difference:+.2%}: {way_out}"
    )


def _fitting_setting(run: Run) -> str:
    """The setting with all experts a little wider or narrower, by up to 64, nearest to the run's, for which there is a twin."""
    moe, length = run.model.moe, run.data.sequence_length
    assert moe is not None
    for change in sorted(range(-64, 65), key=abs):
        widths = tuple(width + change for width in expert_widths(moe))
        if min(widths) < 1:
            continue
        name, value = ("expert_widths", widths) if moe.expert_widths else ("expert_hidden", widths[0])
        model = replace(run.model, moe=replace(moe, **{name: value}))
        if abs(_difference(model, _densify(model, length), length)) <= TOLERANCE:
            return f"model.moe.{name}={typed(value)}"
    return ""
