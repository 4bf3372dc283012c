"""The only door to the NATS server of many hosts: requests, buckets of values, leases, and events.

Extra ``hosts``. nats-py is imported when a connection is opened.

- `address`: which servers, and how to log in there. Pure.
- `link`: one connection, which opens itself again; each question has a deadline, and says why there is no answer.
- `feed`: all messages of a stream in order, without a gap.
- `bucket`: keys and values, changed by compare-and-set.
- `lease`: who may do something, as long as it is alive.
- `service`: answers requests, as a micro service of NATS.
- `bus`: `Bus`, which has all of these.

Rule of this floor: it knows nothing of VMs. Values are bytes.

Logging: ``qmpvcpu.bus`` has each loss of the connection at WARNING.
"""

from typing import TYPE_CHECKING

from qmpvcpu.lazy import lazily

if TYPE_CHECKING:
    from qmpvcpu.bus.address import ServerAddress
    from qmpvcpu.bus.bucket import Bucket, Entry
    from qmpvcpu.bus.bus import Bus
    from qmpvcpu.bus.feed import Happened
    from qmpvcpu.bus.lease import Lease
    from qmpvcpu.bus.service import Endpoint, Request

__all__ = ["Bucket", "Bus", "Endpoint", "Entry", "Happened", "Lease", "Request", "ServerAddress"]

_HOMES = {
    "qmpvcpu.bus.address": "ServerAddress",
    "qmpvcpu.bus.bucket": "Bucket Entry",
    "qmpvcpu.bus.bus": "Bus",
    "qmpvcpu.bus.feed": "Happened",
    "qmpvcpu.bus.lease": "Lease",
    "qmpvcpu.bus.service": "Endpoint Request",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, _HOMES)
