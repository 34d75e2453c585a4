"""Attention over the paged KV cache: the page's layout and what is computed on it. Knows nothing of vLLM.

May import `limits`, `cache_folder`, `rotation`.
"""
