"""The parts a decoder is made of: plain objects that hold weights and call `kernels`."""
