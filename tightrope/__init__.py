"""Give a latency budget on your device; get the compressed PyTorch model that meets it."""

__version__ = "0.1.0"
