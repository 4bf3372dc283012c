"""What the plugin keeps with a test."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qmpvcpu.testing.plugin.evidence import Evidence

EVIDENCE: "pytest.StashKey[list[Evidence]]" = pytest.StashKey()
"""What its VMs have to tell when it fails."""
