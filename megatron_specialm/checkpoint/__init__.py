"""Checkpoints on disk: canonical tensors in files, for any layout.

slices.py        keys of slices, and the check that all slices make whole tensors
tensor_files.py  reading tensors, whole or in slices
steps.py         the folders of a training's steps, which step is its outcome, and removing steps
saving.py        writing a step
opening.py       verifying and reading a step; finding the newest good one
adopting.py      taking over the steps of another training
merged.py        the ordinary model of a checkpoint: one expert, adapters merged
"""
