"""How good a bundled generator is, beside real images and by a classifier that was trained on them.

- *Fidelity*: the classifier's confidence on samples, the entropy of their classes, and the Fréchet distance
  in its feature space, of the anchors that a source draws (truncated) and of the full prior (or the other way
  round), beside the same figures for real images; and how many samples of a class-conditional generator are
  of their class.
- *Levels*: how often the class survives when one level is moved, and how many grey values that changes.
- *Memorisation*: how far samples are from the nearest training image, beside how far real test images are.
- *Likelihood*, of a VAE: the error of its reconstructions of real test images, and the evidence lower bound
  in bits per dimension.

batches < figures < pictures < measurement; tables show a measurement in a terminal.
``python -m mlviews.zoo.evaluate`` is the command.
"""
