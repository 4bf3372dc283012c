"""One libvirtd for all of these tests."""

from collections.abc import Iterator

import pytest

from tests.libvirt.daemon import Libvirt, running_libvirtd


@pytest.fixture(scope="session")
def _daemon() -> Iterator[Libvirt]:
    with running_libvirtd(log_monitors=True) as daemon:
        yield daemon


@pytest.fixture
def libvirt(_daemon: Libvirt) -> Iterator[Libvirt]:
    """The daemon, without any domain."""
    yield _daemon
    if not _daemon.answers():  # a test that stopped it failed before it started it again
        _daemon.start()
    _daemon.forget_all()
