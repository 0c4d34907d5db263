"""The parts of `make gpu-check`, a module each, and what runs them."""
