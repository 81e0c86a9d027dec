"""Alerts on the page: rules that are made and removed there, events as they come, and notifications."""

import re

from playwright.sync_api import Page, expect

from tests.browser.conftest import Look, Start, Visit
from tests.support.application import Application, ScriptedExchange

TOKEN = "a-token-of-the-tests"


def opened(page: Page) -> Page:
    expect(page.locator("#alert-form")).to_be_hidden()
    page.get_by_role("button", name="Alerts", exact=True).click()
    expect(page.locator("#alert-form")).to_be_visible()
    return page


def add(page: Page, level: float, direction: str) -> None:
    page.locator("[name=direction]").select_option(direction)
    page.get_by_label("Reference price", exact=True).fill(str(level))
    page.get_by_role("button", name="Add").click()


def test_rule_made_on_the_page_has_its_event_there(
    visit: Visit, application: Application, exchanges: list[ScriptedExchange]
) -> None:
    page = opened(visit.open())
    expect(page.locator("#alerts-none")).to_have_text("No event yet.")
    exchanges[0].send(100.0)
    expect(visit.price("exchange1")).to_have_text("100.000")
    add(page, 105, "up")
    rules, events = page.locator("#alert-rules li"), page.locator("#alert-events li")
    expect(rules).to_have_text([re.compile("BTCUSDT rises to 105")])
    exchanges[0].send(104.0)
    expect(visit.price("exchange1")).to_have_text("104.000")
    expect(events).to_have_count(0)
    exchanges[0].send(106.0)
    expect(events).to_have_text([re.compile("BTCUSDT.*106")])
    page.reload()
    visit.is_live()
    expect(events).to_have_count(1)
    page.get_by_role("button", name="Remove: BTCUSDT rises to 105").click()
    expect(rules).to_have_count(0)
    assert application.get("/alerts")["rules"] == []


def test_collapsed_panel_counts_new_events(visit: Visit, exchanges: list[ScriptedExchange]) -> None:
    page = opened(visit.open())
    exchanges[0].send(100.0)
    add(page, 105, "either")
    expect(page.locator("#alert-rules li")).to_have_count(1)
    page.get_by_role("button", name="Alerts", exact=True).click()
    exchanges[0].send(104.0)
    expect(visit.price("exchange1")).to_have_text("104.000")
    exchanges[0].send(106.0)
    expect(page.locator("#alerts-count")).to_have_text("1 new")
    page.get_by_role("button", name="Alerts", exact=True).click()
    expect(page.locator("#alerts-count")).to_have_text("")


def test_changing_alerts_asks_for_the_token(start: Start, look: Look) -> None:
    visit = look(start(HTTP__TOKEN=TOKEN).port)
    visit.expected.append("401")
    page = opened(visit.open())
    problem, token = page.locator("#alerts-problem"), page.locator("#alerts-token input")
    add(page, 105, "up")
    expect(problem).to_have_text("Changing alerts needs the token of this MarketFlow.")
    token.fill("another-token-of-16")
    page.get_by_role("button", name="Add").click()
    expect(problem).to_have_text("This token is not the right one.")
    token.fill(TOKEN)
    page.get_by_role("button", name="Add").click()
    expect(page.locator("#alert-rules li")).to_have_count(1)
    expect(problem).to_have_text("")
    expect(token).to_be_hidden()
    page.get_by_role("button", name=re.compile("^Remove")).click()
    expect(page.locator("#alert-rules li")).to_have_count(0)


def test_events_are_notified_where_that_is_allowed(
    look: Look, application: Application, exchanges: list[ScriptedExchange]
) -> None:
    visit = look(application.port, permissions=["notifications"])
    page = visit.page
    page.add_init_script(
        "window.notified = []; window.Notification = class { static permission = 'granted';"
        " static async requestPermission() { return 'granted'; }"
        " constructor(title, { body }) { window.notified.push([title, body]); } };"
    )
    opened(visit.open())
    exchanges[0].send(100.0)
    add(page, 105, "up")
    expect(page.locator("#alert-rules li")).to_have_count(1)
    notify = page.get_by_role("button", name="Notify")
    exchanges[0].send(104.0)
    expect(visit.price("exchange1")).to_have_text("104.000")
    exchanges[0].send(106.0)
    expect(page.locator("#alert-events li")).to_have_count(1)
    assert page.evaluate("window.notified") == []
    notify.click()
    expect(notify).to_have_attribute("aria-pressed", "true")
    add(page, 110, "up")
    expect(page.locator("#alert-rules li")).to_have_count(2)
    exchanges[0].send(111.0)
    expect(page.locator("#alert-events li")).to_have_count(2)
    ((title, body),) = page.evaluate("window.notified")
    assert title == "MarketFlow"
    assert "111" in body
