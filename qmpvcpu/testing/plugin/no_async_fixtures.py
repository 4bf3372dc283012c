"""The fixtures that need pytest-asyncio, where it is missing or too old."""

import pytest

_NEEDS = "the fixture {} runs on the test's event loop and needs pytest-asyncio 0.24: pip install 'qmpvcpu[pytest]'"


@pytest.fixture
def vcpus() -> None:
    """Fail with what is missing."""
    pytest.fail(_NEEDS.format("vcpus"), pytrace=False)


@pytest.fixture
def scripted_qmp() -> None:
    """Fail with what is missing."""
    pytest.fail(_NEEDS.format("scripted_qmp"), pytrace=False)
