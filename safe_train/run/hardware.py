"""What a run's and a benchmark's records call the processor."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def processor() -> str:
    """The CPU's name, and how many cores there are."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    name = re.sub(r"\((R|TM)\)", "", names[0]) if names else platform.processor() or platform.machine()
    return f"{name} {os.cpu_count()} cores"
