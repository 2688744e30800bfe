"""A local page on which runs are watched while they go on: `safe-train watch`. It imports no PyTorch."""
