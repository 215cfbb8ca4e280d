"""What the bytes of an agent's memory are, and where they lie.

Formats (block, tail segment, card), codecs, and the store. Knows no engine, no cluster, no Ray.
"""
