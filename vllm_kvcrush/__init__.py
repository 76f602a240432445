"""KV-cache compression for vLLM, as a plugin."""

__version__ = "0.1.0"
