"""What a guest can do with vCPUs that come and go, each ability tried for real and proven.

::

    async with qmpvcpu.attach("/run/vm.qmp") as vm, contextlib.aclosing(certify(vm)) as rows:
        async for row in rows:
            print(row)

The VM is disturbed: vCPUs are plugged and unplugged, it is paused and reset. At the end it has the vCPUs that it had
before, also if the certification is stopped half-way.

- `certifying`: `certify`.
- `trials`: one for each ability, and what each leaves for the next.
- `judging`: what an error or a verdict says of an ability.
- `refusing`: what makes a guest refuse.
- `waiting`: for the guest.
"""

from qmpvcpu.certify.certifying import certify
from qmpvcpu.certify.refusing import Provocation
from qmpvcpu.certify.waiting import wait_booted
from qmpvcpu.model.certificate import Ability, AbilityRow, AbilityVerdict, Certificate

__all__ = ["Ability", "AbilityRow", "AbilityVerdict", "Certificate", "Provocation", "certify", "wait_booted"]
