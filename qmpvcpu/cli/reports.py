"""How a whole map is shown: the plan, the report, and what was wanted when a change was cut short."""

from dataclasses import replace
from typing import Final

from qmpvcpu.cli.output import Block, ByWidth, Column, Line, Table
from qmpvcpu.cli.show import state_text
from qmpvcpu.cli.wording import in_options
from qmpvcpu.errors import milliseconds, printable
from qmpvcpu.model.transition import ConfigOutcome, Intent, StepReport, TransitionOutcome, TransitionReport
from qmpvcpu.model.vcpumap import union
from qmpvcpu.model.verdicts import Verdict

_OUTCOMES: Final = {
    TransitionOutcome.REACHED: "green",
    TransitionOutcome.REQUESTED: "yellow",
    TransitionOutcome.REVERTED: "yellow",
    TransitionOutcome.PARTIAL: "red",
    TransitionOutcome.REVERT_INCOMPLETE: "red",
}
_MOST_NAMED: Final = 4
# A longer reason is shown once for steps in a row that share it.
_SHORT: Final = 40
_AS_ABOVE: Final = "as above"
# On a narrower terminal the reasons would be columns of single words.
_TABLE_WIDTH: Final = 64


def plan_lines(explained: str) -> list[Block]:
    """Return the plan's own explanation in lines, the denied steps in red."""
    styles = {"denied": "red", "warning": "yellow"}
    return [
        Line(line, style=next((style for word, style in styles.items() if line.startswith(f"  {word}")), ""))
        for line in explained.split("\n")
    ]


def intent_text(intent: Intent) -> str:
    """Return what was wanted, in words."""
    steps = ", ".join(map(str, intent.steps))
    return (
        f"interrupted: vCPUs {intent.start} to {intent.target}, on failure {intent.on_failure.value},"
        f" {intent.timeout:g} s for each answer, {intent.direction.value}\n  in this order: {steps}"
        + ("" if intent.next_boot is None else f"\n  then at the next boot: {intent.next_boot}")
        + ("" if intent.next_placement is None else ", with another placement")
    )


def report_blocks(report: TransitionReport, *, looked: bool = False, proven: bool = False) -> tuple[Block, ...]:
    """Return how a transition ended: in a line, slot by slot, and as the map that is there now.

    *looked*: It was found by looking later, which cannot tell what was never sent from what was not answered.
    *proven*: Tell what was proven of each plug, and when; without it that is told where a proof is missing.
    """
    stopped = ", stopped" if report.cancelled else ""
    took = f" in {milliseconds(report.seconds)}" if report.seconds else ""
    nothing = "" if report.steps else ", nothing to do"
    outcome = (report.outcome.name.replace("_", " "), _OUTCOMES[report.outcome])
    undone = report.outcome in (TransitionOutcome.REVERTED, TransitionOutcome.REVERT_INCOMPLETE)
    wanted = "wanted was " if undone else ""
    head = Line(outcome, f"{stopped}{took}: {wanted}{report.start} -> {report.target}{nothing}")
    proven = any(map(_proven, report.steps)) and (proven or any(step.missing for step in report.steps))
    steps = _step_table(report.steps, "not done" if looked else "not sent", proven=proven)
    return (
        head,
        *([ByWidth(_TABLE_WIDTH, steps, [in_options(str(step)) for step in report.steps])] if report.steps else []),
        *([] if report.config is None else [str(report.config)]),
        *([f"not recorded: {printable(report.unrecorded)}"] if report.unrecorded else []),
        state_text(report.layout),
    )


def _step_table(steps: tuple[StepReport, ...], unanswered: str, *, proven: bool) -> Table:
    reverted = any(step.undone is not None for step in steps)
    columns = [Column("action"), Column("vCPU", "right"), Column("verdict"), Column("time", "right")]
    columns += [Column("undone")] if reverted else []
    columns += [Column("proven", fold=True)] if proven else []
    placed = any(step.placed is not None or step.unplaced for step in steps)
    columns += [Column("in its place")] if placed else []
    table = Table(*columns, Column("why", fold=True))
    above = ""
    for step in steps:
        reason = printable(in_options("; ".join(filter(None, (step.reason, step.unplaced)))))
        why = _AS_ABOVE if reason == above and len(reason) > _SHORT else reason
        above = reason
        verdict = step.word or unanswered
        took = milliseconds(step.seconds) if step.seconds else ""
        cells = [step.action.value, str(step.ids), Line((verdict, _style(step))), took]
        cells += [_undone(step)] if reverted else []
        cells += [_proven(step)] if proven else []
        cells += [_placed(step)] if placed else []
        table.add(*cells, why)
    return table


def _proven(step: StepReport) -> str:
    """Return what was proven of a plug beyond the verdict's own, with the seconds of each; "" if nothing was."""
    return "" if step.proofs is None else str(replace(step.proofs, present=None))


def _placed(step: StepReport) -> Line:
    """Return whether what a step plugged is in its place on the host; nothing if it plugged nothing, or anywhere."""
    if step.unplaced:
        return Line(("taken out", "red") if step.taken_out and step.undone else ("NO", "yellow"))
    return Line("" if step.placed is None else (f"in {milliseconds(step.placed)}", "green"))


def _undone(step: StepReport) -> Line:
    if step.undone is None:
        return Line("")
    return Line(("yes", "green")) if step.undone else Line(("NO", "bold red"))


def _style(step: StepReport) -> str:
    if step.verdict is None:
        return "dim"
    return "green" if step.ok else "yellow"


def shortcoming(report: TransitionReport) -> str:
    """Return in one line what was not reached, and because of which vCPUs."""
    wrong = [_wrong(each, each.verdict) for each in report.steps if each.verdict is not None and not each.ok]
    wrong += [f"{each.ids} NOT UNDONE" for each in report.steps if each.ok and each.undone is False]
    unsent = union(each.ids for each in report.steps if each.verdict is None)
    named = wrong[:_MOST_NAMED]
    named += [f"{len(wrong) - _MOST_NAMED} more"] if len(wrong) > _MOST_NAMED else []
    named += [f"not sent: {unsent}"] if unsent else []
    if report.config is not None and report.config.outcome is ConfigOutcome.FAILED:
        named.append(f"the next boot is as it was ({printable(report.config.reason)})")
    stopped = "stopped, " if report.cancelled else ""
    outcome = report.outcome.value
    return f"{report.target} not reached ({stopped}{outcome}): {', '.join(named) or 'changed by somebody else'}"


def _wrong(step: StepReport, verdict: Verdict) -> str:
    never = "" if step.missing is None else f" (never {step.missing.value})"
    never += f" (not in its place: {printable(step.unplaced)})" if step.taken_out else ""
    return f"{step.ids} {verdict.name}{never}"
