"""The kernels in Triton for NVIDIA GPUs from sm_80 on. `score`, `adversary` and `hardest` hold one kernel each."""
