"""Drafts by the served model itself, with the layers' sparse attention, on the KV cache that it is served from.

vLLM asks for drafts after every step, and verifies them in the next one, in which all tokens attend densely. With n'
tokens whose keys and values are confirmed and x_0 the token sampled last, step i runs x_i at position n' + i, writes
its keys and values there, and samples x_i+1. The verifying step runs x_0 to x_g at n' to n' + g and writes all of these
again, so nothing of a draft is left where it counts. Slots up to there are the scheduler's lookahead, and lie in pages
that are not full, which no other request shares.

Each of vLLM's model runners has a class of its own for what drafts, so there is a module for each.
"""
