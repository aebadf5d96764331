"""Figures of the engine alone and of the multi-tenant workload beside peers, on CPU or CUDA, without Ray."""
