"""mlviews in plain torch: one script for a CPU, a GPU or several."""
