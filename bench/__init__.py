"""What is measured here, and how: the commands are run.py, counts.py, tune.py, gpu.py and study/run.py.

measurement/  workloads, timing, the cost model, rows of results
providers/    who is measured: plain PyTorch, this project, its peers, functions of other trainers
suites/       the correctness gate, and what each suite times
gpu_session/  the parts of gpu.py
study/        SAFE against PPO and GRPO on rewards that can be hacked
results/      the rows
"""
