"""What a page shows of an output, held against what was printed."""

import re


def is_as_shown(shown: str, printed: str) -> bool:
    """Whether an output is as a page shows it: times are any, ``...`` is anything, on a line of its own any lines."""
    pattern = re.escape(f"\n{_alike(shown)}").replace("\\\n\\.\\.\\.\\\n", r"\n(?:.*\n)*").replace(r"\.\.\.", ".*")
    return re.fullmatch(pattern, f"\n{_alike(printed)}") is not None


def _alike(text: str) -> str:
    text = re.sub(r"\d\d:\d\d:\d\d\.\d+", "TIME", text)
    return re.sub(r"in [\d.]+s =+", "in TIME", text)
