"""The old name of `mpo_kernels.oracle`."""

import warnings

from mpo_kernels.oracle import *  # noqa: F403

warnings.warn(
    "mpo_kernels.reference is now mpo_kernels.oracle; the old name goes in 0.3.",
    DeprecationWarning,
    stacklevel=2,
)
