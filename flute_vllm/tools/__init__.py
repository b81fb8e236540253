"""Tools around a serving installation: what is installed, which kernel runs, how fast it is.

Nothing here is needed to load or serve a model.
"""
