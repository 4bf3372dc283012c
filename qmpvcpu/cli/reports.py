"""What people and programs see of a whole map: the plan, the report, a transition that was cut short. No I/O."""

from typing import Any, Final

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from qmpvcpu.cli.show import in_options, milliseconds, state_text
from qmpvcpu.errors import printable
from qmpvcpu.model.report import ConfigOutcome, StepReport, TransitionOutcome, TransitionReport
from qmpvcpu.model.transition import Intent, Step
from qmpvcpu.model.verdicts import as_json
from qmpvcpu.planning.plan import Plan

_OUTCOMES: Final = {
    TransitionOutcome.REACHED: "green",
    TransitionOutcome.REVERTED: "yellow",
    TransitionOutcome.PARTIAL: "red",
    TransitionOutcome.REVERT_INCOMPLETE: "red",
}
_MOST_NAMED = 4
# On a narrower terminal the reasons would be columns of single words.
_TABLE_WIDTH = 64


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return what is planned, and what is denied of it."""
    return {
        "start": str(plan.start),
        "target": str(plan.target),
        "steps": [_step_json(step) for step in plan.steps],
        "denied": [as_json(each) for each in plan.denied],
        "warnings": list(plan.warnings),
    }


def _step_json(step: Step) -> dict[str, Any]:
    return {"action": step.action.value, "ids": str(step.ids), "qom_path": step.qom_path, "joins": step.joins}


def plan_text(plan: Plan) -> Text:
    """Return the plan's own explanation, with what is denied in red."""
    text = Text(in_options(str(plan)))
    text.highlight_regex(r"(?m)^  denied.*$", "red")
    text.highlight_regex(r"(?m)^  warning.*$", "yellow")
    return text


def intent_json(intent: Intent) -> dict[str, Any]:
    """Return what was wanted."""
    return {
        "start": str(intent.start),
        "target": str(intent.target),
        "steps": [_step_json(step) for step in intent.steps],
        "on_failure": intent.on_failure.value,
        "timeout": intent.timeout,
        "direction": intent.direction.value,
        **({} if intent.next_boot is None else {"next_boot": str(intent.next_boot), "config": intent.config}),
    }


def intent_text(intent: Intent) -> str:
    """Return what was wanted, in words."""
    steps = ", ".join(map(str, intent.steps))
    return (
        f"interrupted: vCPUs {intent.start} to {intent.target}, on failure {intent.on_failure.value},"
        f" {intent.timeout:g} s for each answer, {intent.direction.value}\n  in this order: {steps}"
        + ("" if intent.next_boot is None else f"\n  then at the next boot: {intent.next_boot}")
    )


def report_text(report: TransitionReport, *, looked: bool = False) -> Group:
    """Return how a transition ended, in a line, slot by slot, and as the map that is so now.

    *looked*: It is what a look afterwards shows, which cannot tell what was never sent from what was not answered.
    """
    stopped = ", stopped" if report.cancelled else ""
    took = f" in {milliseconds(report.seconds)}" if report.seconds else ""
    head = Text.assemble(
        (report.outcome.name.replace("_", " "), _OUTCOMES[report.outcome]),
        f"{stopped}{took}: {report.start} -> {report.target}",
    )
    if not report.steps:
        head.append(", nothing to do")
    now = Text(state_text(report.layout))
    lines = [] if report.config is None else [str(report.config)]
    lines += [f"not recorded: {printable(report.unrecorded)}"] if report.unrecorded else []
    return Group(
        head, *([_Steps(report.steps, "not done" if looked else "not sent")] if report.steps else []), *lines, now
    )


class _Steps:
    """The steps of a report: a table where there is room for it, else lines."""

    def __init__(self, steps: tuple[StepReport, ...], unanswered: str) -> None:
        self._steps = steps
        self._unanswered = unanswered

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        if options.max_width < _TABLE_WIDTH:
            yield from map(str, self._steps)
        else:
            yield _step_table(self._steps, self._unanswered)


def _step_table(steps: tuple[StepReport, ...], unanswered: str) -> Table:
    turned = any(step.undone is not None for step in steps)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("action", no_wrap=True)
    table.add_column("vCPU", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    if turned:
        table.add_column("undone", no_wrap=True)
    table.add_column("why", overflow="fold")
    for step in steps:
        verdict = unanswered if step.verdict is None else step.verdict.name
        took = milliseconds(step.seconds) if step.seconds else ""
        undone = (_undone(step),) if turned else ()
        table.add_row(
            step.action.value, str(step.ids), Text(verdict, _style(step)), took, *undone, Text(printable(step.reason))
        )
    return table


def _undone(step: StepReport) -> Text:
    if step.undone is None:
        return Text("")
    return Text("yes", "green") if step.undone else Text("NO", "bold red")


def _style(step: StepReport) -> str:
    if step.verdict is None:
        return "dim"
    return "green" if step.ok else "yellow"


def shortcoming(report: TransitionReport) -> str:
    """Return in one line what was not reached, and because of which vCPUs."""
    wrong = [f"{each.ids} {each.verdict.name}" for each in report.steps if each.verdict is not None and not each.ok]
    wrong += [f"{each.ids} NOT UNDONE" for each in report.steps if each.ok and each.undone is False]
    unsent = sum(each.verdict is None for each in report.steps)
    named = wrong[:_MOST_NAMED]
    named += [f"{len(wrong) - _MOST_NAMED} more"] if len(wrong) > _MOST_NAMED else []
    named += [f"{unsent} not sent"] if unsent else []
    if report.config is not None and report.config.outcome is ConfigOutcome.FAILED:
        named.append(f"the next boot is as it was ({printable(report.config.reason)})")
    stopped = "stopped, " if report.cancelled else ""
    outcome = report.outcome.value
    return f"{report.target} not reached ({stopped}{outcome}): {', '.join(named) or 'changed by somebody else'}"
