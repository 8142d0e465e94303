"""Tiny pipelines, built once for all tests that sample from some."""

import json

import pytest

from tests.tasks import tiny_pipelines as tiny


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(tiny.PROMPTS) + "\n")
    return str(path)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Builds a pipeline once, by its name in ``tiny_pipelines`` and arguments: (stock pipeline, folder)."""
    held = {}

    def get(name, **more):
        key = (name, json.dumps(more, sort_keys=True))
        if key not in held:
            folder = tmp_path_factory.mktemp(name)
            held[key] = (getattr(tiny, name)(folder, **more), str(folder))
        return held[key]

    return get
