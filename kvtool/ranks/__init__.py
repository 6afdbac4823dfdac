"""Ranks that share a model, one process each, as rank 0 has them: it starts and finds the others, tells them what to
compute, and sees who is lost. What the others do all the while stands in `kvtool.follower`."""
