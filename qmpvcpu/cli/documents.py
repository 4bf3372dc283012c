"""What every JSON document begins with."""

from typing import Any

__all__ = ["SCHEMA", "document"]

SCHEMA = "qmpvcpu/1"


def document(**content: Any) -> dict[str, Any]:
    """Return a JSON document with its schema first."""
    return {"schema": SCHEMA, **content}
