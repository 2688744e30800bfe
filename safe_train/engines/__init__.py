"""How gradients become steps: one process or DDP, FSDP2, DeepSpeed's ZeRO."""
