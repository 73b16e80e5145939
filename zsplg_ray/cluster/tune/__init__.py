"""Ray Tune: thresholds of labels, and settings of training, found by trying them."""
