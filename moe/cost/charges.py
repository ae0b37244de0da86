"""From seconds and joules to kilowatt-hours, carbon and money; every number with how well it is known.

Pure arithmetic, for what a run has used (`moe ledger`) and for what it is going to (`moe plan`). A product is known no
better than its least known factor; what the user states in `cost.*` counts as known.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moe.config.schema import Cost
from moe.cost.rates import board_watts, grid_intensity, grid_source, rent_per_hour, watts_source

JOULES_PER_KWH = 3.6e6
Grade = Literal["measured", "estimated", "assumed"]
GRADES: tuple[Grade, ...] = ("measured", "estimated", "assumed")


@dataclass(frozen=True)
class Graded:
    """A number and how it is known: by a counter, by a model of this machine, or from a table or by default."""

    value: float
    grade: Grade
    source: str

    def as_json(self) -> dict[str, Any]:
        """Keys value, grade, source."""
        return asdict(self)


def worst(grades: Iterable[Grade]) -> Grade:
    """The least certain of some grades; of none, `measured`."""
    return GRADES[max((GRADES.index(grade) for grade in grades), default=0)]


@dataclass(frozen=True)
class Rates:
    """What a unit of electricity and of a device's time stands for."""

    grid: Graded
    """gCO2e per kWh."""
    pue: Graded
    """Power usage effectiveness: energy of the whole building over that of its computers, 1 or more."""
    per_hour: Graded | None
    """US dollars per device and hour; None if not known."""
    per_kwh: Graded
    """US dollars per kWh, on top of the rent."""

    def as_json(self) -> dict[str, Any]:
        """The four rates, as graded numbers or null."""
        rates = {"grid": self.grid, "pue": self.pue, "per_hour": self.per_hour, "per_kwh": self.per_kwh}
        return {name: None if rate is None else rate.as_json() for name, rate in rates.items()}


def rates_from_json(row: dict[str, Any]) -> Rates:
    """The inverse of `Rates.as_json`."""
    grid, pue, per_kwh = (Graded(**row[name]) for name in ("grid", "pue", "per_kwh"))
    return Rates(grid, pue, None if row["per_hour"] is None else Graded(**row["per_hour"]), per_kwh)


def rates_of(cost: Cost, device_name: str) -> Rates:
    """The rates of a run on a device named as torch names it. Raises ConfigError for an unknown region.

    With a price of electricity and none of the device, the device is the user's own and its time costs nothing.
    """
    if cost.grid_gco2e_per_kwh:
        grid = Graded(cost.grid_gco2e_per_kwh, "measured", "cost.grid_gco2e_per_kwh")
    else:
        grid = Graded(grid_intensity(cost.region), "assumed", f"{cost.region}, {grid_source(cost.region)}")
    pue = Graded(cost.pue, "assumed" if cost.pue == 1 else "measured", "cost.pue")
    listed = rent_per_hour(device_name)
    if cost.price_per_hour:
        per_hour = Graded(cost.price_per_hour, "measured", "cost.price_per_hour")
    elif cost.price_per_kwh:
        per_hour = Graded(0.0, "measured", "own device: cost.price_per_kwh is set and cost.price_per_hour is not")
    else:
        per_hour = None if listed is None else Graded(listed[0], "assumed", listed[1])
    return Rates(grid, pue, per_hour, Graded(cost.price_per_kwh, "measured", "cost.price_per_kwh"))


@dataclass(frozen=True)
class Charge:
    """What some work costs; None where a rate or the energy is not known."""

    kwh: Graded | None
    """Drawn from the grid, PUE included."""
    gco2e: Graded | None
    dollars: Graded | None


def charge(joules: Graded | None, device_seconds: Graded, rates: Rates) -> Charge:
    """kWh = PUE·J/3.6e6, grams = kWh·grid, dollars = device hours·rent + kWh·price of electricity.

    joules: of the devices, without PUE. device_seconds: summed over devices. Where electricity has a price and the energy
    is not known, neither are the dollars.
    """
    kwh = gco2e = None
    if joules is not None:
        grade = worst((joules.grade, rates.pue.grade))
        kwh = Graded(joules.value * rates.pue.value / JOULES_PER_KWH, grade, joules.source)
        gco2e = Graded(kwh.value * rates.grid.value, worst((grade, rates.grid.grade)), rates.grid.source)
    if rates.per_hour is None or (rates.per_kwh.value and kwh is None):
        return Charge(kwh, gco2e, None)
    dollars = device_seconds.value / 3600 * rates.per_hour.value
    grade = worst((device_seconds.grade, rates.per_hour.grade))
    if rates.per_kwh.value and kwh is not None:
        dollars, grade = dollars + kwh.value * rates.per_kwh.value, worst((grade, kwh.grade))
    return Charge(kwh, gco2e, Graded(dollars, grade, rates.per_hour.source))


def planned_joules(device_name: str, devices: int, seconds: float) -> Graded | None:
    """Energy of a run that is yet to come: every board at its limit all the time, so an upper bound; None for an unknown one.

    Measured draw swings between 15 % and 85 % of that limit in a real training run (arXiv 2503.05804); hosts and network
    are not in it.
    """
    watts = board_watts(device_name)
    return (
        None
        if watts is None
        else Graded(watts * devices * seconds, "assumed", f"{watts:g} W {watts_source(device_name)}")
    )


def planned_charge(cost: Cost, device_name: str, devices: int, seconds: float) -> Charge:
    """What `devices` of a kind are going to cost in `seconds` of training."""
    return charge(
        planned_joules(device_name, devices, seconds),
        Graded(devices * seconds, "estimated", "predicted step time"),
        rates_of(cost, device_name),
    )
