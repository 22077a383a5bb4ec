"""Everything the library raises on purpose derives from `DGCError`."""


class DGCError(Exception):
    """Base of every error the library raises on purpose: it shows what was found and what to do."""


class ConfigError(DGCError, ValueError):
    """An option, optimizer, parameter list or launch environment that cannot work."""


class GradientError(DGCError):
    """Gradients that cannot be exchanged: non-finite too often, sparse, or exchanged twice."""


class StateError(DGCError):
    """A checkpoint that does not belong to this model, configuration or format version."""


class WireError(DGCError):
    """Bytes that are not a valid gradient message."""


class FileError(DGCError):
    """Bytes that are not a valid compressed model file."""


class CommError(DGCError):
    """A collective that failed or timed out, usually because another rank died."""


class MissingPackageError(DGCError, ImportError):
    """An optional package that is not installed; the message gives the pip command."""
