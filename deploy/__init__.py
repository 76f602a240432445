"""How to run a fleet of vLLM servers with this plugin, and how to watch it (README.md)."""
