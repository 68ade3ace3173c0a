"""mlviews in solo-learn: the user's own script, unmodified, on generated views."""
