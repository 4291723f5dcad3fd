"""The errors a user can meet.

Each says what is wrong with which file, key and value, and what to do about it. The command line prints them without a
traceback and exits with `exit_code`; anything else that escapes is a bug of ours and keeps its traceback.
"""


class SpecialmError(ValueError):
    """Base of all errors that are the input's or the machine's doing, not ours."""

    exit_code = 2


class ConfigError(SpecialmError):
    """A pipeline page that does not say something we can run: unknown key, wrong type, cycle, missing stage."""


class DataError(SpecialmError):
    """Text that cannot be read or is too little: bad JSON, not UTF-8, empty corpus, fewer windows than a batch."""


class ArtifactError(SpecialmError):
    """An artifact on disk that is missing, incomplete, damaged, or made for something else."""


class CheckpointError(ArtifactError):
    """A checkpoint that does not verify or does not fit the model."""


class MachineError(SpecialmError):
    """The machine cannot do what is asked: no device, port in use, no write permission, full disk."""

    exit_code = 3


class TrainingError(SpecialmError):
    """Training cannot go on: the loss is not finite, or a rank has died."""

    exit_code = 4
