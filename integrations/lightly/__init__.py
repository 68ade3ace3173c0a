"""mlviews in lightly: a complete example, and the page beside it."""
