"""A small resize service: many clients, one VM, one line of JSON for each request and each answer.

Each request is carried out whole, or undone: the policy is REVERT. The answer is the report, slot by slot. A guest
may answer after its deadline; every client that is connected then is told, so that nobody believes an old report.

    python resize_service.py /run/vm.qmp /run/vm.resize --record /var/lib/vmm/vm.xml

    $ echo '{"map": "0,2-5"}' | socat -t 60 - UNIX:/run/vm.resize
    $ echo '{"count": 4}' | socat -t 60 - UNIX:/run/vm.resize
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import qmpvcpu
from qmpvcpu import OnFailure, Recovery, VcpuController
from qmpvcpu.events import UnplugRefused, VcpuUnplugged


class ResizeService:
    """Takes requests from any number of clients; qmpvcpu carries them out in the order in which they came."""

    def __init__(self, vm: VcpuController, timeout: float) -> None:
        self._vm = vm
        self._timeout = timeout
        self._clients: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client until it hangs up."""
        self._clients.add(writer)
        try:
            async for line in reader:
                self._tell(writer, await self._answer(line))
                await writer.drain()
        except (ConnectionError, ValueError):  # it is gone, or sends a line without an end
            pass
        finally:
            self._clients.discard(writer)
            writer.close()

    async def tell_late_answers(self) -> None:
        """Tell everybody what comes after a deadline, until the VM is gone."""
        async for event in self._vm.events():
            match event:
                case VcpuUnplugged(ids=ids, late=True):
                    told = {"late": "UNPLUGGED", "ids": str(ids)}
                case UnplugRefused(ids=ids, reason=reason, late=True):
                    told = {"late": "REFUSED", "ids": str(ids), "reason": reason}
                case _:
                    continue
            for client in self._clients:
                self._tell(client, told | {"plugged": str(self._vm.layout.enabled)})

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            match json.loads(line):
                case {"map": str(wish)}:
                    done = self._vm.set_map(wish, on_failure=OnFailure.REVERT, timeout=self._timeout)
                case {"count": int(count)}:
                    done = self._vm.set_count(count, on_failure=OnFailure.REVERT, timeout=self._timeout)
                case _:
                    return {"error": 'a request is {"map": "0,2-5"} or {"count": 4}'}
            report = await done
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            return {"error": f"no JSON: {error}"}
        except qmpvcpu.TransitionError as error:
            report = error.report  # refused, pending, undone: the report tells which, and what could not be
        except qmpvcpu.QmpVcpuError as error:
            return {"error": str(error), "state": error.outcome.value}
        return {
            "outcome": report.outcome.name,
            "plugged": str(report.layout.enabled),
            "pending": str(report.layout.pending),
            "steps": report.to_json()["steps"],
        }

    @staticmethod
    def _tell(writer: asyncio.StreamWriter, content: dict[str, Any]) -> None:
        writer.write(json.dumps(content).encode() + b"\n")


async def main() -> None:
    """Serve until the VM is gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="the VM's QMP socket")
    parser.add_argument("socket", type=Path, help="where to listen")
    parser.add_argument("--record", type=Path, help="the domain XML that follows the VM, and outlives a crash")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds that the guest has for each answer")
    options = parser.parse_args()
    async with qmpvcpu.attach(options.address, record=options.record, on_interrupted=Recovery.REVERT) as vm:
        service = ResizeService(vm, options.timeout)
        async with await asyncio.start_unix_server(service.serve, options.socket):
            print(f"listening on {options.socket}", flush=True)
            await service.tell_late_answers()
    raise SystemExit(f"the VM at {options.address} is gone")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except qmpvcpu.QmpVcpuError as error:  # it says what is so, and what to do
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
