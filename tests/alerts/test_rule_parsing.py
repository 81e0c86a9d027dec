"""Errors of alert rules name what is allowed for each key."""

import pytest

from marketflow.alerts.alert_model import KINDS, RuleOptions, Webhook
from marketflow.alerts.rule_parsing import InvalidRule, convert_rule


@pytest.mark.parametrize(("rule", "key"), [(rule, key) for rule in KINDS for key in rule.__struct_fields__])
def test_each_key_of_a_rule_says_what_is_allowed(rule: type[RuleOptions], key: str) -> None:
    with pytest.raises(InvalidRule, match=rf"^`{key}` must be .{{10}}"):
        convert_rule({"kind": KINDS[rule], key: ["neither a text nor a number"]})


@pytest.mark.parametrize("key", Webhook.__struct_fields__)
def test_each_key_of_a_webhook_says_what_is_allowed(key: str) -> None:
    with pytest.raises(InvalidRule, match=rf"^`webhook\.{key}` must be .{{10}}"):
        convert_rule({"kind": "stale", "webhook": {key: 1}})
