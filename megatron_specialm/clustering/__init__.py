"""Which windows are alike: sentence encoders, k-means, cluster histograms and importance weights."""
