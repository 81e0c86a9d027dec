"""Communication of the two roles through Redis: leader election, published state, commands.

The leader of the ingest role holds a lease (`lease`), publishes its state and runs commands (`leader`). The API role
follows that state and sends commands (`remote_control`). They share no memory and no port, so there may be any number
of API processes, and of standbys.
"""
