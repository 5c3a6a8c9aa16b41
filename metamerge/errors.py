"""Every error that metamerge raises on purpose, in one tree.

A message says what is wrong, in which file and tensor, what was expected, what was found, and the
way out.
"""


class MetaMergeError(Exception):
    """Root of all errors of this package; ``exit_code`` is what a command line returns for it."""

    exit_code = 1


class ConfigError(MetaMergeError, ValueError):
    """An option, a name or a combination of options makes no sense."""

    exit_code = 2


class CheckpointError(MetaMergeError):
    """A checkpoint cannot be used as it is."""

    exit_code = 3


class Unreadable(CheckpointError):
    """The file is missing, empty, not a checkpoint, or contradicts itself."""


class Unsafe(CheckpointError):
    """Reading the file would run code that it carries, or leave its folder."""


class Truncated(CheckpointError):
    """The file ends before its tensors do."""


class TooLarge(CheckpointError):
    """The file claims more memory than it can hold or than the limit allows."""


class NonFinite(CheckpointError):
    """A tensor holds NaN or infinite values."""


class IncompatibleWeights(MetaMergeError, ValueError):
    """Weights differ in keys, shapes, data types or architecture where they must agree."""

    exit_code = 4


class StructureError(IncompatibleWeights):
    """The structure of a network could not be traced, or failed its proof."""


class ZooError(MetaMergeError):
    """A zoo, a task or a split is missing, damaged or cannot be built."""

    exit_code = 3


class ResumeError(MetaMergeError):
    """A training state cannot be resumed."""

    exit_code = 5
