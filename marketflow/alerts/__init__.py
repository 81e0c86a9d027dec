"""Alerts: rules evaluated on candles in the flow, their events, and the delivery of these."""
