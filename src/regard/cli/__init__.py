"""The command `regard`: one file a subcommand, found by its name.

Belongs here: arguments, texts for people, exit codes.
Does not: anything that a program would want to call (that is public elsewhere).
Look at: `list.py` for a small command.
"""
