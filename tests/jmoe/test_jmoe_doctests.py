"""The examples in the docstrings of the package run."""

import doctest
import importlib
import pkgutil

import pytest

import jmoe

MODULES = [
    info.name
    for info in pkgutil.walk_packages(jmoe.__path__, "jmoe.")
    if not info.ispkg and not info.name.startswith("jmoe.models.")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_the_public_functions_are_among_them():
    examples = [
        test.name
        for name in MODULES
        for test in doctest.DocTestFinder().find(importlib.import_module(name))
        if test.examples
    ]
    for name in (
        "routing.route_top_k",
        "mlp.moe_mlp",
        "moe.MoE",
        "dispatch.make_dispatch",
        "debug.debug_checks",
    ):
        assert f"jmoe.{name}" in examples
