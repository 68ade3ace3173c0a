"""Ready configurations; Hydra reads them as pkg://mlviews.integrations.solo_learn.configs.NAME."""
