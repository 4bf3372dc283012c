"""Hypothesis: campaigns beside a model of everybody else, in any order of anything.

``QMPVCPU_MODEL_CASES=50000 pytest tests/hosts/test_campaign_model.py`` tries more of them.
"""

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.hosts.campaign_machine import Campaigns

CASES = int(os.environ.get("QMPVCPU_MODEL_CASES", "2000")) // 4

pytestmark = [pytest.mark.timeout(300 + CASES // 5), pytest.mark.no_cover]

TestCampaigns = Campaigns.TestCase
TestCampaigns.settings = settings(
    max_examples=CASES,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],  # where other tests keep the machine busy
)
