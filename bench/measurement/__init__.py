OURS = "safe-kernels"  # how the names of this project's providers begin
