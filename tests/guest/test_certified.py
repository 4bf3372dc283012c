"""The real guests can do what the page of certified guests says, and nothing else."""

import pytest

from qmpvcpu.cli.certify import as_markdown
from qmpvcpu.testing.linuxguest import find_kernels
from tests.guest.certified import GUESTS, certificate_of, found_in, table_of

pytestmark = pytest.mark.guest


@pytest.mark.parametrize("name", [name for name, (_, kernel, _) in GUESTS.items() if kernel in find_kernels()])
async def test_a_guest_can_do_what_the_page_says(name: str) -> None:
    certificate = await certificate_of(name)
    assert found_in(as_markdown(certificate)) == found_in(table_of(name))
    assert certificate.ok == ("no hypervisor" not in name)
