"""parity: are a JAX function and a PyTorch function the same function, to how many bits, and where do they part."""
