"""Attention kernels and the plugin's own operations, against vLLM's kernel and the memory."""
