"""Tasks, metrics, and the two measurements over them: a sweep of exits and draft lengths, and a
benchmark of strategies.
"""
