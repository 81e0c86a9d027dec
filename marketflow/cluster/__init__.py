"""What the two halves say to each other in Redis: which process takes ticks, how it does, and that it shall switch.

The half that takes ticks holds a lease (`lease`), publishes its state and carries out commands (`holder`). The half
that answers requests follows that state and sends commands (`remote`). They share no memory and no port, so there may
be any number of the second, and others of the first that stand by.
"""
