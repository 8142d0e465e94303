"""The page of methods is written from the registries."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "methods.py"


def test_the_page_of_methods_is_up_to_date():
    spec = importlib.util.spec_from_file_location("methods", SCRIPT)
    methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(methods)
    assert methods.PAGE.read_text() == methods.page(), "run `make docs`"
