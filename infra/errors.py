"""Errors that a user can act on.

    SagsmError
    |- ConfigError     a setting, an experiment or a command-line argument
    |- DataError       raw videos, annotations, shards, checkpoints
    |- PipelineError   a stage, the store, tracking
    `- ClusterError    Ray: resources, nodes, lost workers

A message says what was found, what was expected and what to do. The command line prints it and exits with 2; every other
exception is a defect of ours and keeps its traceback.
"""


class SagsmError(Exception):
    """Base of all errors that are shown to the user without a traceback."""


class ConfigError(SagsmError):
    """A setting, an experiment or a command-line argument is wrong."""


class DataError(SagsmError):
    """Raw videos, annotations, shards or checkpoints are missing, broken or do not fit together."""


class PipelineError(SagsmError):
    """A stage failed, or the store or the tracking server cannot be used."""


class ClusterError(SagsmError):
    """The Ray cluster cannot be reached or has not what a stage asks for."""
