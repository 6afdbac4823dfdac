"""Load on any engine, and what it took: our own in process, our server, or another by its URL."""
