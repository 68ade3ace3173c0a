"""What encoders learn from views, on real images: the data, a linear probe and kNN, and a classifier."""
