"""The recipe: layer dropout, the early-exit loss, its curricula, and the module that trains by them."""
