"""Hypothesis: the engine and its transitions beside a model of QEMU, in any order of anything."""

import os

from hypothesis import settings

from tests.engine.engine_machine import EngineBesideQemu
from tests.engine.transition_machine import TransitionsBesideQemu

CASES = int(os.environ.get("QMPVCPU_MODEL_CASES", "2000"))


class EngineBesideTcg(EngineBesideQemu):
    has_event = False


class TransitionsBesideTcg(TransitionsBesideQemu):
    has_event = False


TestEngineUnderKvm = EngineBesideQemu.TestCase
TestEngineUnderKvm.settings = settings(max_examples=CASES // 10, stateful_step_count=40, deadline=None)
TestEngineUnderTcg = EngineBesideTcg.TestCase
TestEngineUnderTcg.settings = settings(max_examples=CASES // 10, stateful_step_count=40, deadline=None)
TestTransitionsUnderKvm = TransitionsBesideQemu.TestCase
TestTransitionsUnderKvm.settings = settings(max_examples=CASES * 4 // 10, stateful_step_count=40, deadline=None)
TestTransitionsUnderTcg = TransitionsBesideTcg.TestCase
TestTransitionsUnderTcg.settings = settings(max_examples=CASES * 4 // 10, stateful_step_count=40, deadline=None)
