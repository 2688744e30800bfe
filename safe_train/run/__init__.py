"""What a run checks before it starts, and what it leaves behind."""
