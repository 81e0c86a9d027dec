"""The findings as a table for a person, or as JSON for a script."""

from collections.abc import Sequence

import msgspec
from rich.text import Text

from marketflow.cli.check.findings import Finding, State, worst
from marketflow.cli.tables import print_table, print_text
from marketflow.text import visible

_STYLES = {State.OK: "green", State.HINT: "cyan", State.WARNING: "yellow", State.FAILED: "bold red"}


def print_report(findings: Sequence[Finding]) -> None:
    """Print a table, and a line that sums it up."""
    rows = [
        (_place(finding), Text(finding.state.value, _STYLES[finding.state]), _found(finding)) for finding in findings
    ]
    print_table(("what and where", "state", "found, and what to do"), rows, lines=True)
    print_text(Text(_summary(findings), _STYLES[worst(finding.state for finding in findings)]))


def print_json(findings: Sequence[Finding]) -> None:
    """Print an object: `ok`, and the list `findings` of what, where, state, found and advice."""
    print(msgspec.json.encode({"ok": is_well(findings), "findings": findings}).decode())


def is_well(findings: Sequence[Finding]) -> bool:
    """Whether MarketFlow would run well."""
    return worst(finding.state for finding in findings) is not State.FAILED


def _place(finding: Finding) -> Text:
    """In one cell, which leaves a narrow terminal room for sentences."""
    return Text(visible(finding.what), "bold").append(f"\n{visible(finding.where)}", "not bold")


def _found(finding: Finding) -> Text:
    text = Text(visible(finding.found))
    if finding.advice:
        text.append("\nTo do: ", "bold").append(visible(finding.advice), "not bold")
    return text


def _summary(findings: Sequence[Finding]) -> str:
    count = {state: sum(finding.state is state for finding in findings) for state in State}
    if count[State.FAILED]:
        verdict = "MarketFlow would not run well."
    elif count[State.WARNING]:
        verdict = "MarketFlow runs with these settings, but see the warnings."
    else:
        verdict = "MarketFlow runs well with these settings."
    counted = ", ".join(f"{number} {state}" for state, number in count.items() if number)
    return f"{verdict} ({counted})"
