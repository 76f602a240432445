"""What differs between the releases of vLLM that this package supports: one module for each
release, with the same names. This package imports the names of the installed release's module, or
of the newest module for a release that is newer still."""

from __future__ import annotations

from vllm_kvcrush import gate

if (gate.release() or (0, 0)) < (0, 33):
    from vllm_kvcrush.compat.v0_32 import CHAT_STREAM, prefix_hit
else:
    from vllm_kvcrush.compat.v0_33 import CHAT_STREAM, prefix_hit

__all__ = ["CHAT_STREAM", "prefix_hit"]
