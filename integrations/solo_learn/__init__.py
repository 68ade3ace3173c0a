"""mlviews in solo-learn: the user's own script, unmodified, on generated views.

The command is ``python -m mlviews.integrations.solo_learn main_pretrain.py ... data.format=mlvgm``; the
README.md beside this file has the rest. ``__main__.py`` launches the script, ``patches.py`` is all that
changes in solo-learn, and ``views.py`` makes the source from solo-learn's configuration.
"""
