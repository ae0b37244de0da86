"""Hold a benchmark's figures against those of its last run: `python scripts/bench_repeat.py FORMER.json NEW.json`.

Both files have `figures`: by name, a quartile, the median, and a quartile (or an interval and its middle). A figure is reproduced
if the two intervals meet. Prints those that are not, and one line of counts; ends with 1 if there are any.
"""

import json
import sys
from pathlib import Path


def compare(former: dict[str, list[float]], new: dict[str, list[float]]) -> tuple[int, list[str]]:
    """How many figures are in both, and a line for each whose intervals do not meet."""
    shared = [name for name in new if name in former]
    apart = [
        f"{name}: {former[name][1]:.4g} [{former[name][0]:.4g}, {former[name][2]:.4g}] before, "
        f"{new[name][1]:.4g} [{new[name][0]:.4g}, {new[name][2]:.4g}] now"
        for name in shared
        if former[name][2] < new[name][0] or new[name][2] < former[name][0]
    ]
    return len(shared), apart


def main(former: Path, new: Path) -> int:
    """Compare two files and say what was found."""
    figures = [json.loads(path.read_text(encoding="utf-8"))["figures"] for path in (former, new)]
    count, apart = compare(figures[0], figures[1])
    print(
        "\n".join([*apart, f"{new.stem}: {count - len(apart)} of {count} figures within their spread of the last run"])
    )
    return 1 if apart else 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
