"""`python -m safe_kernels`: what a bug report needs."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from . import dispatch, integrations

PACKAGES = ("triton", "numpy", "transformers", *integrations.DISTRIBUTIONS)
SWITCHES = ("SAFE_KERNELS_", "TRITON_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")


def main() -> None:
    """Versions, device, backend, the environment's switches, and the patches that are active in this process."""
    where, build = os.path.dirname(__file__), torch.version.cuda or torch.version.hip or "CPU"
    print(f"safe-kernels {version('safe-kernels') or 'of a checkout'}, {where}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    print(f"torch {torch.__version__} ({build})")
    print(f"beside it: {', '.join(f'{name} {found}' for name in PACKAGES if (found := version(name))) or 'nothing'}")
    device = torch.device("cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu")
    named = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device.type)
    print(f"device: {device.type if named is None else named.get_device_name(0)}")
    print(f"backend: {backend(device)}")
    switches = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(SWITCHES)]
    print(f"environment: {', '.join(switches) or 'no switch is set'}")
    active = [f"{package} ({', '.join(names)})" for package, names in integrations.status().items() if names]
    others = "none in this process; safe_kernels.integrations.status() tells those of yours"
    print(f"patches: {'; '.join(active) or others}")


def backend(device: torch.device) -> str:
    try:
        return dispatch.choose_backend(None, torch.empty(0, device=device))
    except ValueError as error:
        return f"none: {error}"


def version(distribution: str) -> str:
    """ "" where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main()
