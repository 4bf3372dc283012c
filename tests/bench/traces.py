"""What traces cost: ``python -m tests.bench.traces``. The bench itself measures programs that make none.

CPU time, each way in a process of its own: the tenth percentile of some hundred plugs, the best of several rounds.
"""

import asyncio
import subprocess
import sys
import time

import qmpvcpu
from qmpvcpu import OnFailure
from qmpvcpu.testing import MicroGuest

WAYS = {
    "none": "OpenTelemetry is not imported",
    "api": "only its API is: no tracer provider is set",
    "unsampled": "the SDK samples nothing",
    "sdk": "the SDK records two spans for each plug, and drops them in a BatchSpanProcessor",
}
ROUNDS = 5
_IMPORTS = """
import time, sys
{before}
begun = time.process_time()
import {module}
print(time.process_time() - begun)
"""


def configure(way: str) -> None:
    """Have this process trace that way."""
    if way == "none":
        return
    from opentelemetry import trace

    if way == "api":
        return
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON

    provider = TracerProvider(sampler=ALWAYS_OFF if way == "unsampled" else ALWAYS_ON)
    provider.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    trace.set_tracer_provider(provider)


async def seconds_of_a_plug() -> float:
    """CPU time of a plug, once all is warm."""
    async with MicroGuest(max_vcpus=200) as guest, qmpvcpu.attach(guest.qmp, resync_interval=None) as vm:
        taken = []
        for _ in range(3):
            for vcpu in range(1, 200):
                begun = time.process_time()
                await vm.plug(vcpu)
                taken.append(time.process_time() - begun)
            await vm.set_map("0", on_failure=OnFailure.CONTINUE)
    return sorted(taken)[len(taken) // 10]


def best_of(*command: str) -> float:
    """The least that *command* prints, in seconds."""
    return min(
        float(subprocess.run([sys.executable, *command], capture_output=True, check=True).stdout)
        for _ in range(ROUNDS)
    )


def tell(line: str) -> None:
    """Print *line*."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Print everything."""
    for module, before in (
        ("opentelemetry.trace", ""),
        ("opentelemetry.trace", "import qmpvcpu.vm.attaching"),
        ("qmpvcpu.traces", "import qmpvcpu.vm.attaching, opentelemetry.trace"),
    ):
        taken = best_of("-c", _IMPORTS.format(before=before, module=module))
        tell(f"import {module}{f', after {before}' if before else ''}: {taken * 1e3:.1f} ms")
    for way, meaning in WAYS.items():
        tell(f"a plug where {meaning}: {best_of('-m', __spec__.name, way) * 1e6:.0f} us")


if __name__ == "__main__":
    if sys.argv[1:]:
        configure(sys.argv[1])
        tell(str(asyncio.run(seconds_of_a_plug())))
    else:
        main()
