"""What prefix sharing saves, by count and by clock: `python -m bench.sharing`, one scenario for each claim."""
