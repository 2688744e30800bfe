"""What `swift --external_plugins` runs; `python -m safe_kernels.integrations.ms_swift` prints its path."""

from safe_kernels import integrations
from safe_kernels.integrations import ms_swift

ms_swift.apply()
integrations.report()
