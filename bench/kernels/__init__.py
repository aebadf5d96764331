"""How fast the attention kernels are on this machine's GPU, beside what its memory and matrix units allow."""
