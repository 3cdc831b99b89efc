"""Every example of a docstring runs, and gives what it says."""

import doctest
import importlib
import pkgutil

import pytest

import sdgm_edge.export
import sdgm_edge.models
import sdgm_edge.runtime

MODULES = [
    module.name
    for package in (sdgm_edge, sdgm_edge.export, sdgm_edge.models, sdgm_edge.runtime)
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
    if not module.name.endswith("__main__")
]
FINDER = doctest.DocTestFinder(exclude_empty=True)
EXAMPLES = [
    test for name in MODULES for test in FINDER.find(importlib.import_module(name), name) if test.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_an_example_gives_what_it_says(example: doctest.DocTest) -> None:
    told: list[str] = []
    assert doctest.DocTestRunner().run(example, out=told.append).failed == 0, "".join(told)


def test_examples_are_found_in_every_package() -> None:
    assert {example.name.split(".")[1] for example in EXAMPLES} >= {"export", "models", "runtime", "compare"}
