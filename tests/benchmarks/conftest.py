"""The programs as users run them, but on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_program(environment):
    """Runs `python -m benchmarks.<name> *arguments`, in which a warning is an error; returns what it printed."""

    def run(name, *arguments):
        program = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *arguments],
            cwd=ROOT,
            env=environment | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert program.returncode == 0, program.stderr
        return program.stdout

    return run
