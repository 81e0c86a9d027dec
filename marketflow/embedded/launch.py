"""Launcher: what a server's process does before it executes the server.

Run by a Python of its own, which needs nothing but the standard library. A function called between fork and exec
(subprocess's preexec_fn) would run in a copy of a process with threads, whose locks are never released.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1

NOBODY = "-"
"""In place of a user and a group: those of the parent."""


def main() -> None:
    """Arguments: the parent's pid, a signal, user and group, the log or -, and the command to become."""
    parent, number, user, group, *command = sys.argv[1:]
    libc = c_library()
    if user != NOBODY:
        os.setgroups([])
        os.setgid(int(group))
        os.setuid(int(user))
    end_with_parent(int(parent), int(number), libc)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and what is ignored would stay so
    try:
        os.execv(command[0], command)  # noqa: S606 - a list, no shell reads it
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error.strerror}")


def c_library() -> object:
    """Return the C library. To be called before the user changes, who may not be able to read Python's files."""
    try:
        import ctypes
    except ImportError:  # a Python without it, which has the watcher alone
        return None
    return ctypes.CDLL(None)


def end_with_parent(parent: int, number: int, libc: object) -> None:
    """Have the kernel send a signal to this process when the thread that started it has ended.

    After the user has changed, which would clear it. It outlives exec, but not fork.
    """
    if (prctl := getattr(libc, "prctl", None)) is not None:
        prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the kernel had been asked
        sys.exit("the process that started this one has ended")
