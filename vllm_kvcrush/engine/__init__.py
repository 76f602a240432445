"""The only package that imports vLLM internals (apart from `plugin` and `server`)."""
