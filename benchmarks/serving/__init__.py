"""Measures requests, tokens and bytes of a server with a policy, against plain vLLM."""
