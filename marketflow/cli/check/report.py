"""Reports of check results: a table for a person, or JSON for a script."""

from collections.abc import Sequence

import msgspec
from rich.text import Text

from marketflow.cli.check.check_result import CheckResult, CheckState, worst_state
from marketflow.cli.terminal_output import print_table, print_text
from marketflow.text import visible

_STYLES = {CheckState.OK: "green", CheckState.HINT: "cyan", CheckState.WARNING: "yellow", CheckState.FAILED: "bold red"}


def print_report(results: Sequence[CheckResult]) -> None:
    """Print a table, the commands that open what was checked, and a summary line."""
    rows = [(_place(result), Text(result.state.value, _STYLES[result.state]), _found(result)) for result in results]
    print_table(("what and where", "state", "found, and what to do"), rows, lines=True)
    for result in results:
        if result.command:  # a line of its own, as wide as it is: it is made to be copied
            print_text(f"To open {result.what}:")
            print(visible(result.command))
    print_text(Text(_summary(results), _STYLES[worst_state(result.state for result in results)]))


def print_json(results: Sequence[CheckResult]) -> None:
    """Print an object: `ok`, and the list `findings` of what, where, state, found and advice."""
    print(msgspec.json.encode({"ok": is_well(results), "findings": results}).decode())


def is_well(results: Sequence[CheckResult]) -> bool:
    """Return whether MarketFlow would run well."""
    return worst_state(result.state for result in results) is not CheckState.FAILED


def _place(result: CheckResult) -> Text:
    """Return what and where as one cell, so that a narrow terminal has space for sentences."""
    return Text(visible(result.what), "bold").append(f"\n{visible(result.where)}", "not bold")


def _found(result: CheckResult) -> Text:
    text = Text(visible(result.found))
    if result.advice:
        text.append("\nTo do: ", "bold").append(visible(result.advice), "not bold")
    return text


def _summary(results: Sequence[CheckResult]) -> str:
    count = {state: sum(result.state is state for result in results) for state in CheckState}
    if count[CheckState.FAILED]:
        verdict = "MarketFlow would not run well."
    elif count[CheckState.WARNING]:
        verdict = "MarketFlow runs with these settings, but see the warnings."
    else:
        verdict = "MarketFlow runs well with these settings."
    counted = ", ".join(f"{number} {state}" for state, number in count.items() if number)
    return f"{verdict} ({counted})"
