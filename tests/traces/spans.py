"""Spans, as the tests look at them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


class Spans:
    """The spans that were exported so far.

    Args:
        exporter: Has them.
        processor: Hands them to it.
    """

    def __init__(self, exporter: "InMemorySpanExporter", processor: "SimpleSpanProcessor") -> None:
        self._exporter = exporter
        self.processor = processor

    @contextlib.contextmanager
    def caller(self, name: str = "caller") -> Iterator["ReadableSpan"]:
        """A span of the program's own, current in the context."""
        from opentelemetry import trace

        with trace.get_tracer("program").start_as_current_span(name) as span:
            yield span  # type: ignore[misc]  # the SDK's spans can be read

    @contextlib.contextmanager
    def unsampled(self) -> Iterator[None]:
        """A parent that the program, or somebody before it, has decided not to record."""
        from opentelemetry import trace

        context = trace.SpanContext(trace_id=1, span_id=1, is_remote=True, trace_flags=trace.TraceFlags(0))
        with trace.use_span(trace.NonRecordingSpan(context)):
            yield

    @property
    def all(self) -> list["ReadableSpan"]:
        """All of them, in the order of their end."""
        return list(self._exporter.get_finished_spans())

    def of(self, name: str) -> list["ReadableSpan"]:
        """Those of that name, without its ``qmpvcpu.``."""
        return [span for span in self.all if span.name.removeprefix("qmpvcpu.") == name]

    def one(self, name: str) -> "ReadableSpan":
        """The one of that name."""
        (span,) = self.of(name)
        return span

    def below(self, parent: "ReadableSpan") -> list["ReadableSpan"]:
        """The spans whose parent that is."""
        return [span for span in self.all if span.parent is not None and span.parent.span_id == id_of(parent)]


def id_of(span: "ReadableSpan") -> int:
    """The span's id."""
    return int(span.context.span_id)


def stages(span: "ReadableSpan") -> list[str]:
    """The names of its events, in order."""
    return [event.name for event in span.events]


def told(span: "ReadableSpan", *names: str) -> list[object]:
    """Its attributes of these names, without their ``qmpvcpu.``; None for one that it has not."""
    return [(span.attributes or {}).get(f"qmpvcpu.{name}") for name in names]


def failed(span: "ReadableSpan") -> bool:
    """Whether its status is that of an error."""
    return span.status.status_code.name == "ERROR"


def tree(spans: Spans, shown: "Callable[[ReadableSpan], str]") -> Iterator[str]:
    """Draw the spans, each below its parent, in the order of their beginning."""

    def below(parent: "ReadableSpan", indent: str) -> Iterator[str]:
        children = spans.below(parent)
        for number, child in enumerate(children, 1):
            is_last = number == len(children)
            yield f"{indent}{'└─' if is_last else '├─'} {shown(child)}"
            yield from below(child, f"{indent}{'   ' if is_last else '│  '}")

    for root in (span for span in spans.all if span.parent is None):
        yield shown(root)
        yield from below(root, "")


def check_times(spans: Spans) -> None:
    """Every span ends after it has begun, lies within its parent, and has its events in order and within itself."""
    known = {id_of(span): span for span in spans.all}
    for span in spans.all:
        assert span.start_time is not None
        assert span.end_time is not None
        times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
        assert times == sorted(times), span.to_json()
        parent = known.get(span.parent.span_id) if span.parent is not None else None
        if parent is not None and parent.name.startswith("qmpvcpu.") and span.name != "qmpvcpu.late_answer":
            assert parent.start_time is not None
            assert parent.end_time is not None
            assert parent.start_time <= span.start_time <= span.end_time <= parent.end_time
