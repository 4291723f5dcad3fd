"""One file per stage kind: `run(stage, context) -> Report`. Each reads input artifacts and writes one output artifact."""
