"""Decoders read from a Hugging Face folder: what `config.json` says, and the network it describes."""
