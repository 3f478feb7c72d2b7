"""Continuous-time consistency models (sCM) as PyTorch Lightning modules.

Read in this order: :mod:`sclightning.trigflow`, :mod:`sclightning.objective`, :mod:`sclightning.modules.consistency`.
"""

__version__ = "0.1.0"
