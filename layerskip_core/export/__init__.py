"""Models for other programs: an exit as a model of its own, and how engines draft with it."""
