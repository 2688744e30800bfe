"""What SAFE, PPO and GRPO are: credit, losses, critic and controller."""
