"""Hypothesis: the core beside a model of QEMU, in any order of anything.

``QMPVCPU_MODEL_CASES=50000 pytest tests/engine/test_against_model.py`` tries more of them.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.engine.crash_machine import CrashesBesideQemu
from tests.engine.engine_machine import EngineBesideQemu
from tests.engine.model_qemu import Deletions

CASES = int(os.environ.get("QMPVCPU_MODEL_CASES", "2000"))  # of all machines together
STEPS = 40
A_FEW = settings(
    max_examples=CASES // 10,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # where other tests keep the machine busy
)
MOST = settings(A_FEW, max_examples=CASES * 4 // 10)

# Not measured: under branch coverage it takes three times as long, and other tests reach every line of the core.
pytestmark = [pytest.mark.timeout(300 + CASES // 10), pytest.mark.no_cover]


class EngineBesideTcg(EngineBesideQemu):
    """The same, where no event tells that a CPU is gone."""

    deletions = Deletions.NEVER


class EngineBesideNewerTcg(EngineBesideQemu):
    """The same, where the event comes when the next CPU is plugged."""

    deletions = Deletions.WITH_THE_NEXT_PLUG


class CrashesBesideTcg(CrashesBesideQemu):
    """The same, where no event tells that a CPU is gone."""

    deletions = Deletions.NEVER


class CrashesBesideNewerTcg(CrashesBesideQemu):
    """The same, where the event comes when the next CPU is plugged."""

    deletions = Deletions.WITH_THE_NEXT_PLUG


TestEngineUnderKvm = EngineBesideQemu.TestCase
TestEngineUnderKvm.settings = A_FEW
TestEngineUnderTcg = EngineBesideTcg.TestCase
TestEngineUnderTcg.settings = A_FEW
TestEngineUnderNewerTcg = EngineBesideNewerTcg.TestCase
TestEngineUnderNewerTcg.settings = A_FEW
TestTransitionsUnderKvm = CrashesBesideQemu.TestCase
TestTransitionsUnderKvm.settings = MOST
TestTransitionsUnderTcg = CrashesBesideTcg.TestCase
TestTransitionsUnderTcg.settings = MOST
TestTransitionsUnderNewerTcg = CrashesBesideNewerTcg.TestCase
TestTransitionsUnderNewerTcg.settings = MOST
