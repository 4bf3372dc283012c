"""Give a VM exactly the vCPUs that are wished for, and show the trace of it.

It is configured as any program that traces, before it attaches; qmpvcpu needs to be told nothing. Here the spans are
printed. To send them to a collector, replace ConsoleSpanExporter by OTLPSpanExporter (package
opentelemetry-exporter-otlp) and SimpleSpanProcessor by BatchSpanProcessor.

    pip install '.[traces]' opentelemetry-sdk
    python traced.py /run/vm.qmp 0,2-5
"""

import argparse
import asyncio
import sys

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

import qmpvcpu
from qmpvcpu import OnFailure


def configure() -> None:
    """Have spans made, and printed."""
    provider = TracerProvider(resource=Resource.create({"service.name": "traced.py"}))
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
    trace.set_tracer_provider(provider)


async def resize(address: str, wish: str) -> int:
    """Return 0 if the VM has the wished vCPUs; what is traced is below the span of this."""
    with trace.get_tracer("traced.py").start_as_current_span("resize"):
        async with qmpvcpu.attach(address) as vm:
            try:
                await vm.set_map(wish, on_failure=OnFailure.REVERT, timeout=30)
            except qmpvcpu.QmpVcpuError as error:
                print(error, file=sys.stderr)
                return 1
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="the VM's QMP socket")
    parser.add_argument("wish", help="the vCPUs that it should have, such as 0,2-5")
    options = parser.parse_args()
    configure()
    sys.exit(asyncio.run(resize(options.address, options.wish)))
