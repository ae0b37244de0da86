"""What electricity emits, and what devices draw and cost: tables with their sources. Everything here is assumed, not measured.

A run's own settings (`cost.*`) come before these tables.
"""

from moe.errors import ConfigError
from moe_triton.chips import find

# gCO2e per kWh of generated electricity, by ISO 3166-1 alpha-3 code. Countries: Our World in Data (CC-BY 4.0) from Ember and
# the Energy Institute, 2023, where marked with a star 2022. WORLD: Ember, Global Electricity Review 2024.
_GRID = """
ARE 561* ARG 354 AUS 549 AUT 111 BEL 138 BGD 691 BRA 98 CAN 170 CHE 35 CHL 291 CHN 582 COL 260 CRI 53 CZE 450 DEU 381
EGY 570 ESP 174 EST 417 FIN 79 FRA 56 GBR 238 GRC 337 HKG 699* IDN 676* IND 713 IRL 291 IRN 655 ISL 28* ISR 583* ITA 331
JPN 485 KAZ 821 KOR 431 KWT 649 LTU 160 LUX 105 LVA 123 MAR 630 MEX 507 MYS 606* NGA 523 NLD 268 NOR 30 NZL 113 OMN 565
PAK 441 PER 266 PHL 611 POL 662 PRT 166 PRY 24 QAT 602 ROU 241 RUS 441 SAU 707* SGP 471 SVN 231 SWE 41 THA 550 TUR 465
TWN 642 URY 129 USA 369 VNM 475 WORLD 480 ZAF 708
"""
_PAIRS = _GRID.split()
GRID = {region: float(value.rstrip("*")) for region, value in zip(_PAIRS[::2], _PAIRS[1::2], strict=True)}

# Chips as moe_triton.chips names them: watts of the whole board at its limit (of an MI250X, half; a question mark where no source
# was found when they were checked, so the figure is remembered), and US dollars for one of them per hour, rented on demand,
# from a public list. docs/rates.md has the sources, line by line.
_DEVICES = """
V100 SXM2      |  300? |      |
T4             |    70 | 0.59 | Modal, 2026-05-07
A100 SXM4 80GB |   400 | 1.79 | RunPod secure, 2026-11-09
A100 SXM4 40GB |   400 | 1.99 | Lambda, 2026-11-16
A100 PCIE 80GB |   300 | 1.79 | RunPod secure, 2026-11-09
A100 PCIE 40GB |   250 |      |
A10            |  150? | 0.86 | Lambda, 2026-05-07
RTX A6000      |  300? |      |
RTX 3090       |   350 |      |
RTX 4090       |   450 |      |
RTX 6000 ADA   |   300 |      |
L4             |    72 | 0.80 | Modal, 2026-05-07
L40            |  300? |      |
L40S           |   350 | 1.95 | Modal, 2026-05-07
H100 HBM3      |   700 | 3.99 | RunPod secure, 2026-11-09
H100 NVL       |   400 | 3.19 | RunPod secure, 2026-11-09
H100 PCIE      |   350 | 2.89 | RunPod secure, 2026-11-09
H800           |  700? | 2.00 | assumed in arXiv 2412.19437, 2024-12
H20            |  400? |      |
H200 NVL       |   600 |      |
H200           |   700 | 4.59 | RunPod, 2026-10-07
B200           |  1000 | 6.79 | RunPod, 2026-10-07
GB200          |  1200 |      |
B300           |       | 7.89 | RunPod, 2026-10-07
RTX 5090       |   575 |      |
MI250X         |   280 |      |
MI300X         |   750 |      |
MI325X         | 1000? |      |
MI350X         |  1000 |      |
MI355X         |  1400 |      |
"""
_ROWS = [[cell.strip() for cell in line.split("|")] for line in _DEVICES.strip().splitlines()]
WATTS = {name: float(watts.rstrip("?")) for name, watts, _, _ in _ROWS if watts}
UNCONFIRMED = frozenset(name for name, watts, _, _ in _ROWS if watts.endswith("?"))
PRICES = {name: (float(price), source) for name, _, price, source in _ROWS if price}

IDLE_WATTS_PER_THREAD = 0.74
"""Of a server's hardware thread that does nothing: Cloud Carbon Footprint's average over AWS's processors (SPECpower)."""
BUSY_WATTS_PER_THREAD = 3.5
"""Of one that is busy; same source. The default of `cost.watts_per_thread`."""
WATTS_PER_GIB = 0.392 * 2**30 / 1e9
"""Of memory in use: Cloud Carbon Footprint's 0.392 W per GB."""


def grid_intensity(region: str) -> float:
    """Grams of CO2 equivalent per kWh of a region's electricity. Raises ConfigError for one that is not in the table."""
    if region not in GRID:
        raise ConfigError(
            f"cost.region ({region!r}) must be one of {', '.join(sorted(GRID))}: or set cost.grid_gco2e_per_kwh yourself"
        )
    return GRID[region]


def grid_source(region: str) -> str:
    """Whose figure of a region that is, and of which year."""
    if region == "WORLD":
        return "Ember 2023"
    year = 2022 if f"{region} {GRID[region]:g}*" in _GRID else 2023
    return f"Our World in Data {year} (CC-BY 4.0)"


def board_watts(device_name: str) -> float | None:
    """Watts of a device at its limit, from the name that torch gives it; None if it is not in the table."""
    chip = find(device_name)
    return None if chip is None else WATTS.get(chip.name)


def watts_source(device_name: str) -> str:
    """What `board_watts` is: a limit that a source confirms, or one that is only remembered."""
    chip = find(device_name)
    return "board limit, not confirmed" if chip is not None and chip.name in UNCONFIRMED else "board limit"


def rent_per_hour(device_name: str) -> tuple[float, str] | None:
    """US dollars per hour of a device, and whose list that is from; None if it is not in the table."""
    chip = find(device_name)
    return None if chip is None else PRICES.get(chip.name)
