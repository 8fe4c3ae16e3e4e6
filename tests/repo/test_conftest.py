"""tests/conftest.py: how the suite is dealt to the workers."""

import pytest


def test_a_file_stays_in_one_worker(request) -> None:
    if not request.config.getvalue("loadgroup"):
        pytest.skip("not run by `make test`: no --dist loadgroup")
    assert request.node.nodeid.endswith(f"@{request.path}"), (
        "xdist deals by this suffix; without it files are torn apart"
    )
