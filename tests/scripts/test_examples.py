import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "assets_translation",
        "environment",
        "film_reviews",
        "intervals",
        "repin",
        "seeds",
        "steps",
        "training_process",
    ],
)
def test_the_examples_in_a_script_hold(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted > 0
    assert results.failed == 0
