"""How the built-in checkpoint `pando-tiny` was made: its corpus, its training, its checks.

Nothing here is needed to serve; the checkpoint itself lies in `pando/builtin/pando-tiny`.
"""
