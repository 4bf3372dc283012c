"""The blocks of docs/testing.md, by what the comment above each calls it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def block(page: str, name: str) -> str:
    """The text of the block that is called *name*."""
    fence = rf"^<!-- run by tests/plugin: {re.escape(name)} -->\n```\w+\n(.*?)^```$"
    (found,) = re.findall(fence, (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


def is_as_shown(shown: str, printed: str) -> bool:
    """Whether an output is as a page shows it: times are any, ``...`` is anything, on a line of its own any lines."""
    pattern = re.escape(f"\n{_alike(shown)}").replace("\\\n\\.\\.\\.\\\n", r"\n(?:.*\n)*").replace(r"\.\.\.", ".*")
    return re.fullmatch(pattern, f"\n{_alike(printed)}") is not None


def _alike(text: str) -> str:
    text = re.sub(r"\d\d:\d\d:\d\d\.\d+", "TIME", text)
    return re.sub(r"in [\d.]+s =+", "in TIME", text)
