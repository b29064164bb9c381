"""The ``lossplug`` command: ``demo``, ``fit``, ``evaluate``, ``export``, ``list`` and ``show``."""
