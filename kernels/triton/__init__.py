"""The kernels in Triton, for NVIDIA GPUs from sm_80 on, one module for each: `score`, `adversary`, `hardest`."""
