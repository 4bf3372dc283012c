"""What an error comes to: an exit code, a document in the words of the command line, and words that name options."""

from typing import TYPE_CHECKING, Any

from qmpvcpu.cli.reports import report_blocks, shortcoming
from qmpvcpu.cli.result import BadUsageError, CommandResult
from qmpvcpu.cli.show import state_text
from qmpvcpu.cli.wording import in_options
from qmpvcpu.documents.failures import code_of, error_json
from qmpvcpu.documents.form import NO_ANSWER, NOT_REACHED, NOT_SENT, document
from qmpvcpu.documents.layouts import state_json
from qmpvcpu.errors import MonitorConnectError, MonitorError, QmpVcpuError, TransitionError, Unreachable, printable

if TYPE_CHECKING:
    from qmpvcpu.cli.run import Shell


def failure(error: BaseException, shell: "Shell", code: int | None = None) -> CommandResult:
    """Return the result that tells of *error*, with the VM's state as far as it is known.

    *code* is the exit code where the error itself does not tell it.
    """
    message = _message_of(error, shell)
    if code is None:
        code = NO_ANSWER if shell.lost else NOT_SENT if isinstance(error, BadUsageError) else code_of(error)
    if code == NOT_SENT and shell.done:
        code = NOT_REACHED  # this step was not sent, those before it were
    report = error.report if isinstance(error, TransitionError) else None
    complaint = f"qmpvcpu: {message if report is None else shortcoming(report)}".split("\n")
    content: dict[str, Any] = {"error": printed_error(error, message), **shell.extra}
    if report is not None:
        content |= report.to_json()
    elif shell.done:
        content["steps"] = shell.done
    if shell.lost:
        content["lost"] = shell.lost
        complaint.append(shell.lost)
    if shell.not_sent:
        content["not_sent"] = ",".join(map(str, shell.not_sent))
        complaint.append(f"not asked for any more: {content['not_sent']}")
    if is_held(error):
        complaint.append("how to share a VM with who holds its socket: qmpvcpu --help, and docs/sharing.md")
    content |= {} if shell.vm is None else state_json(shell.vm.layout)
    if report is not None:
        return CommandResult(code, document(**content), report_blocks(report), tuple(map(printable, complaint)))
    if shell.vm is not None:
        when = "last seen" if isinstance(error, MonitorError) else "now"
        complaint.append(f"{when}: {state_text(shell.vm.layout)}")
    return CommandResult(code, document(**content), complaint=tuple(map(printable, complaint)))


def _message_of(error: BaseException, shell: "Shell") -> str:
    match error:
        case KeyboardInterrupt():  # what was sent before has been taken in while the VM was let go
            return f"stopped by {shell.signals.came or 'SIGINT'}"
        case OSError(filename=str(name), strerror=str(why)) if not isinstance(error, QmpVcpuError):
            return f"{name}: {why}"
    return in_options(str(error))


def is_held(error: BaseException) -> bool:
    """Return True where another client most likely holds the QMP socket; not where its QEMU is stopped."""
    return isinstance(error, MonitorConnectError) and error.reason is Unreachable.HELD


def printed_error(error: BaseException, message: str) -> dict[str, Any]:
    """Return *error* with all its evidence as a document has it, in the words of the command line."""
    told = {name: in_options(each) if isinstance(each, str) else each for name, each in error_json(error).items()}
    return told | {"message": message}
