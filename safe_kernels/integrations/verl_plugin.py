"""The entry point `verl.plugins`, which verl imports in every process: SAFE_KERNELS_VERL=1 applies the patch."""

import os
import warnings

if os.environ.get("SAFE_KERNELS_VERL") == "1":
    try:
        from safe_kernels.integrations import verl

        verl.apply()
    except Exception as error:  # verl itself would drop it silently
        warnings.warn(f"SAFE_KERNELS_VERL=1 has no effect: {error}", stacklevel=1)
        raise
