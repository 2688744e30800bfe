"""The policy and its reference: loaded, checked, adapted, and laid out for the kernels."""
