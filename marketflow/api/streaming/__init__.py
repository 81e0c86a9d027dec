"""The price stream: one broadcaster per process, subscribers over server-sent events and WebSockets."""
