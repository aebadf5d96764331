"""Triton kernels, called by `kernels.device` alone. What the numbers of a work item mean is in `kernels.work_list`."""
