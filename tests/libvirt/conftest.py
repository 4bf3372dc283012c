"""One libvirtd for all of these tests."""

from collections.abc import Iterator

import pytest

from tests.libvirt.daemon import Libvirt, running_libvirtd


@pytest.fixture(scope="session")
def _daemon() -> Iterator[Libvirt]:
    with running_libvirtd() as daemon:
        yield daemon


@pytest.fixture
def libvirt(_daemon: Libvirt) -> Iterator[Libvirt]:
    """The daemon, without any domain."""
    yield _daemon
    _daemon.forget_all()
