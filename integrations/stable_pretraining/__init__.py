"""mlviews in stable-pretraining: see the page beside this file."""
