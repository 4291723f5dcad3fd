"""Clustering of windows: text encoders, k-means, routers (vector -> cluster), concentration of a set in few clusters."""
