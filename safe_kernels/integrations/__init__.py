"""Other trainers on these kernels: one module a trainer, each a `Patch` that is applied and undone as a whole."""
