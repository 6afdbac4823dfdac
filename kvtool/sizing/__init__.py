"""How many bytes the caches of models take: by formula, as allocated, and what reading them costs."""
