"""Training, tasks and experiments (extra ``recipes``). May import: all of the package, and what the extra names."""
