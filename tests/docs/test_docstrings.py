"""Runs the examples in the docstrings as a user would: without the run-time type checking of the tests."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import doctest, importlib, sys
modules = [importlib.import_module(name) for name in sys.argv[1:]]
results = [doctest.testmod(module, optionflags=doctest.ELLIPSIS) for module in modules]
sys.exit(any(result.failed or not result.attempted for result in results))
"""


@pytest.mark.parametrize("package", ["jmoe", "pallas_kernels", "train"])
def test_examples_in_docstrings_give_what_they_say(package, environment):
    files = [path for path in sorted((ROOT / package).rglob("*.py")) if ">>> " in path.read_text()]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    names = [module.removesuffix(".__init__") for module in modules]
    assert names
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *names],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
