"""Other trainers on these kernels: one module a trainer, each with a `Patch` that is applied and undone as a whole."""
