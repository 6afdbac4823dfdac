"""kvtool: a KV cache in 8, 4 or 2 bits, and an engine that serves from it."""
