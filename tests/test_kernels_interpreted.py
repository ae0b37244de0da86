"""The kernels under triton's interpreter: tests/kernels_interpreted/ in a process of its own, where TRITON_INTERPRET=1.

Triton reads the variable once, when a kernel is decorated, so those tests cannot share this process with others.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("kernels_interpreted")


@pytest.mark.timeout(3600)
def test_kernels_under_the_interpreter(request):
    pytest.importorskip("triton", reason="triton exists on Linux only")
    full = ["--full"] if request.config.getoption("--full") else []
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--durations=5", *full, str(FOLDER)]
    result = subprocess.run(
        command,
        cwd=FOLDER.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(result.stdout, result.stderr)
    assert result.returncode == 0, "the output above names what failed"


def test_they_are_not_collected_without_the_variable():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", str(FOLDER)]
    result = subprocess.run(
        command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 5, result.stdout  # pytest's code for "no tests collected"
