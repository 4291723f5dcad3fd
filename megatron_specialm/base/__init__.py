"""What every other part stands on: errors, durable files, logs, the process environment. Imports nothing of ours."""
