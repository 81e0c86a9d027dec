"""Communication of ingest and API processes through Redis: the shard table, published states, commands.

Ingest processes divide the shards by that table (`shard_table`), publish their states and run commands (`member`). API
processes follow the states and send commands (`remote_control`). They share no memory and no port, so there may be any
number of both.
"""
