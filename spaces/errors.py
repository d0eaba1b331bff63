"""Every error that Tightrope raises on purpose.

TightropeError
├── FormatError     a file does not say what its reader needs
├── NetworkError    a network that no model could have
├── PolicyError     no model could satisfy the policy
├── SpaceError      a space that cannot be built or searched
├── BudgetError     a budget that cannot be read, costed or met
├── DeviceError     a device that is unknown or cannot run or cost what it is asked
├── TraceError      a model that cannot be traced
├── CompressError   a compression that went wrong
├── ExportError     an exported file that would not run as the policy says
├── DataError       loaders, metrics and models of the user's that do not fit together
├── ConfigError     a configuration that cannot be used
├── RunError        a run folder that is in use, torn or of another search
└── MissingExtra    an optional package is not installed
"""


class TightropeError(Exception):
    """Root of all errors of this library: catch it to catch ours."""


class FormatError(TightropeError, ValueError): ...


class NetworkError(TightropeError, ValueError): ...


class PolicyError(TightropeError, ValueError): ...


class SpaceError(TightropeError, ValueError): ...


class BudgetError(TightropeError, ValueError): ...


class DeviceError(TightropeError, ValueError): ...


class TraceError(TightropeError, RuntimeError): ...


class CompressError(TightropeError, RuntimeError): ...


class ExportError(TightropeError, RuntimeError): ...


class DataError(TightropeError, ValueError): ...


class ConfigError(TightropeError, ValueError): ...


class RunError(TightropeError, RuntimeError): ...


class MissingExtra(TightropeError, ImportError): ...
