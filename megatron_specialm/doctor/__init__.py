"""`specialm doctor`: what this machine provides for training, and how to install what is missing.

Every import of a third-party package, every external command and every computation runs in its own process with a time
limit, so a broken installation or a crash becomes a line of the report. Nothing here imports torch in the command's process.
"""
