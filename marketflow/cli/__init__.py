"""The command line: `main` is the entry point, `root_command` the command `marketflow`, and `commands` has the others.

The modules of commands import what they run when they run it, so that `--help`, completion and a wrong argument are
answered at once, even by a broken installation.
"""
