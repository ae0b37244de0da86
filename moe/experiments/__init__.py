"""Experiments that start runs through the command line's own entry and analyse what those wrote."""
