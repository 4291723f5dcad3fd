"""What this machine can do for training, and how to install what is missing.

Every import of another package, every external command and every computation runs in its own process with a time limit: a
broken install or a crash becomes a line of the report. The process of the command does not import torch.
"""
