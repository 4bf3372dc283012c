"""The demo where the extra that has click and rich is not installed."""

import re

import pytest

from tests.cli.running import Ran, environment, run

pytestmark = pytest.mark.qemu

WITHOUT_EXTRA = "sys.modules['click'] = None"


def told(ran: Ran) -> list[str]:
    """What was said, without the times that it took."""
    return [re.sub(r" +[\d.]+ (ms|s)\b", " TIME", line).rstrip() for line in ran.out.splitlines()]


async def test_without_the_extra_the_demo_says_the_same() -> None:
    plain, rich = await run("demo", code=WITHOUT_EXTRA), await run("demo")
    assert (plain.code, rich.code) == (0, 0)
    assert told(plain) == told(rich)
    assert plain.err == f"{rich.err}\nAll other commands: pip install 'qmpvcpu[cli]'\n"


async def test_without_the_extra_the_demo_says_in_one_line_that_its_words_go_nowhere() -> None:
    full = f"{WITHOUT_EXTRA}; sys.stdout = open('/dev/full', 'w')"
    ran = await run("demo", code=full)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1] == "qmpvcpu: cannot print the answer: [Errno 28] No space left on device"


async def test_without_the_extra_the_demo_says_in_one_line_what_it_lacks() -> None:
    ran = await run("demo", code=WITHOUT_EXTRA, env=environment(QMPVCPU_QEMU="/bin/true"))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "qmpvcpu: QMPVCPU_QEMU=/bin/true is not a QEMU: it does not answer --version\n"
