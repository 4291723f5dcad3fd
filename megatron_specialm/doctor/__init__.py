"""What this machine can do for training, and how to get what it lacks.

Every import of a foreign package, every external command and every computation runs in a process of its own with a time
limit: a broken install or a crash becomes a line of the report. Nothing here imports torch in the process of the command.
"""
