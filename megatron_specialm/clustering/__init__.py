"""Clustering of windows: text encoders, k-means, and how concentrated a set is in few clusters."""
