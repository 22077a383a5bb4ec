"""Per-device kernels: `reference` (plain torch, the definition), `cpu` (numba), `cuda` (Triton)."""
