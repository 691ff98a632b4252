"""The settings of every command. What a user gives is checked. No heavy imports, so that the
command line starts fast.
"""
