"""One module per stage kind, with its name: `run(stage, context) -> Report` reads input artifacts and writes one artifact.

`graph/context.py` has what all get; `continuing.py` and `rates.py` belong to trainings, `generation.py` to the commands
`generate` and `samples`.
"""
