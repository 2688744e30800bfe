"""What settings may be called, how they are written, and what they may hold."""
