"""Models for other programs: an exit as a model of its own, GGUF and packed files, and engines that
draft with them.
"""
