"""The explorer: look at views in a browser, and choose how far each level moves.

What computes knows nothing of the browser: :mod:`~mlviews.explorer.state` is what is on screen, as a value,
:mod:`~mlviews.explorer.costs` what it costs in nats, :mod:`~mlviews.explorer.session` makes its images. The
page over them is :mod:`~mlviews.explorer.page`, and :mod:`~mlviews.explorer.serving` puts it on a port.
"""
