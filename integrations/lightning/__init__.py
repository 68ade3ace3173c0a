"""mlviews in Lightning: a data module for both of its namespaces."""
