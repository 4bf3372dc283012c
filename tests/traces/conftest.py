"""OpenTelemetry's real SDK, for these tests alone: all others run as programs do that have not imported it."""

import sys
from functools import cache
from typing import TYPE_CHECKING

import pytest

from tests.traces.spans import Spans

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Spans:
    """What was exported; OpenTelemetry is imported for the time of the test."""
    processor = _processor()
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    monkeypatch.setitem(sys.modules, "opentelemetry.trace", trace)
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(processor, "span_exporter", exporter)
    return Spans(exporter, processor)


@cache
def _processor() -> "SimpleSpanProcessor":
    """Configure tracing, which a process may do once, and return what hands spans to the exporter."""
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    processor = SimpleSpanProcessor(InMemorySpanExporter())
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    trace.set_tracer_provider(provider)
    del sys.modules["opentelemetry.trace"]
    return processor
