"""GPU kernels of our own; each file imports triton, so it is loaded only where that is to run."""
