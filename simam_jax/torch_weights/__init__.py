"""Files of PyTorch weights: names and layouts, reading and writing."""
