"""What SAFE, PPO, GRPO and CISPO are: losses, advantages, critic and controller, as functions of tensors and numbers.

`registry` names the algorithms. Nothing here imports another folder of `safe_train`.
"""
