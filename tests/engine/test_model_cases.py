"""Orders of things that the machines of the model meet rarely, each told by hand."""

import pytest

from qmpvcpu import OnFailure, VcpuMap
from qmpvcpu.model.options import CheckedOptions
from tests.engine.model_qemu import OTHER
from tests.engine.transition_machine import TransitionsBesideQemu


@pytest.mark.parametrize("told_first", [True, False])
@pytest.mark.parametrize("reconnects", [True, False])
@pytest.mark.parametrize("timeout", [0.0, 5.0])
def test_a_loss_while_a_rejection_is_looked_into(timeout: float, *, reconnects: bool, told_first: bool) -> None:
    """The look is lost and the rejection told, so that the next command has its turn; whose loss is told after."""
    vm = TransitionsBesideQemu()
    vm.somebody_looks_for_qemu(reconnects=reconnects, has_agent=False)
    change = vm.wish_for(VcpuMap([0]), CheckedOptions(on_failure=OnFailure.CONTINUE, timeout=timeout, in_flight=1))
    vm.everything_arrives()
    vm.a_save_ends(succeeds=True, kept=True)
    (asked,) = vm.asked[vm.engine.begun[change]]
    vm.qemu.remove(vm.engine.layout.slot_of(asked).qom_path or "", OTHER)
    vm.qemu.eject(asked, silent=True)
    vm.qemu_executes()
    while vm.qemu.wire:
        vm.a_message_arrives()
    vm.a_reply_is_taken_in()
    (look,) = vm.commands
    assert vm.engine.purposes[look.number] == "rejection"
    vm.lose_the_connection(executed=0, told_first=told_first)
    assert not vm.commands
    vm.teardown()
    assert change in vm.settled
