# Sourced by the other scripts: `. scripts/_setup.sh; setup [test|dev]` makes .venv and installs the project into it.
# Needs bash, Python 3.11+, git and pip. Doing it again with nothing changed takes a moment.
#   PYTHON               the interpreter to make .venv with (default: the first of python3, python3.14 ... that is new enough)
#   MOE_TORCH_INDEX_URL  take the pinned torch from this index, e.g. https://download.pytorch.org/whl/cpu
# A torch >= 2.11 that is already in .venv is kept. To change a .venv's torch, delete .venv first.

set -euo pipefail
unset PYTHONDONTWRITEBYTECODE # pip compiles nothing (below), so every process would compile what it imports: torch alone takes 3 s more
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/moe-lab.stamp # of the last complete installation: its fingerprint, its extra, its folder; a line each

say() { printf '==> %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_recent "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11 or newer: point it at one, or unset it."
        echo "$PYTHON"
        return
    fi
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        if is_recent "$candidate"; then echo "$candidate"; return; fi
    done
    fail "no Python 3.11 or newer found: install one, or name it with PYTHON=/path/to/python3.11."
}

make_venv() {
    local base why=""
    if [ -f "$stamp" ] && [ "$(sed -n 3p "$stamp")" != "$root" ]; then
        why="it was made in another folder, and its commands still point there"
    elif is_recent "$python" && { "$python" -m pip --version || "$python" -m ensurepip; } >/dev/null 2>&1; then
        return
    elif [ -e "$venv" ] || [ -L "$venv" ]; then
        why="the one that is there is broken, or older than Python 3.11"
    fi
    base=$(find_python)
    if [ -n "$why" ]; then
        say "making .venv again: $why"
        rm -rf "$venv"
    fi
    say "making .venv with $("$base" --version) ($(command -v "$base"))"
    "$base" -m venv "$venv" || { rm -rf "$venv"; fail "$base cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)."; }
}

# What an installation depends on: this folder (an editable install points at it), the declared dependencies, the pins.
fingerprint() {
    "$python" - "$root" "${MOE_TORCH_INDEX_URL:-}" <<'PY'
import hashlib, pathlib, sys
root = pathlib.Path(sys.argv[1])
parts = [*map(str.encode, (*sys.argv[1:], sys.version)), *((root / f).read_bytes() for f in ("pyproject.toml", "constraints.txt"))]
print(hashlib.sha256(b"\0".join(parts)).hexdigest())
PY
}

# pip_install PYTHON ARGS...: pip install under the constraints, except for the pin of a torch that was chosen by hand.
pip_install() {
    local python=$1 pins found
    shift
    if [ -n "${MOE_TORCH_INDEX_URL:-}" ]; then
        say "torch from $MOE_TORCH_INDEX_URL"
        "$python" -m pip install --quiet --no-compile --index-url "$MOE_TORCH_INDEX_URL" "$(grep '^torch==' "$root/constraints.txt")"
    fi
    pins=$(mktemp)
    found=$("$python" -c 'from importlib.metadata import version; print(version("torch").split("+")[0])' 2>/dev/null || true)
    if [ -z "$found" ] || grep -qx "torch==$found" "$root/constraints.txt"; then
        cp "$root/constraints.txt" "$pins"
    else
        say "keeping torch $found, which is not the version that the tests ran on"
        grep -vE '^(torch|triton)==' "$root/constraints.txt" >"$pins"
    fi
    # what is imported compiles itself when it first is: of all that is installed, that is a small part
    "$python" -m pip install --quiet --no-compile --constraint "$pins" "$@" || { rm -f "$pins"; fail "pip could not install $*: see its message above."; }
    rm -f "$pins"
}

# setup [test|dev]: no argument installs what running needs.
setup() {
    local extra=${1:-} print
    make_venv
    print=$(fingerprint)
    if [ -x "$venv/bin/moe" ] && [ "$(sed -n 1p "$stamp" 2>/dev/null)" = "$print" ]; then
        # dev holds test, and test holds everything that running needs.
        case "$extra:$(sed -n 2p "$stamp")" in :* | test:test | test:dev | dev:dev) return ;; esac
    fi
    say "installing moe-lab${extra:+ with the extra '$extra'} and its dependencies into .venv (a few minutes the first time)"
    rm -f "$stamp"
    pip_install "$python" --editable "$root${extra:+[$extra]}"
    printf '%s\n' "$print" "$extra" "$root" >"$stamp"
    say "installed: $("$python" --version), torch $("$python" -c 'from importlib.metadata import version; print(version("torch"))')"
}
