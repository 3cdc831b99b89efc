"""The Spectral Dictionary model and its parts, in PyTorch."""
