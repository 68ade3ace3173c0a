"""mlviews in solo-learn: the user's own script, unmodified, on generated views.

``python -m mlviews.integrations.solo_learn main_pretrain.py ... data.format=mlvgm``: see the README.md beside this file.
``__main__.py`` launches the script, ``patches.py`` is all that changes in solo-learn, ``views.py`` makes the source from its configuration.
"""
